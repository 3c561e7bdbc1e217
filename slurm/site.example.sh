# shellcheck shell=bash
# Copy to slurm/site.sh: what this cluster needs, for all jobs.
# export SBATCH_ACCOUNT=my_account SBATCH_PARTITION=gpu      # in your shell: sbatch reads them before a job exists
# IMAGE=/shared/images/megatron_r1.sqsh MOUNTS=/shared:/shared
# PYTHON=/shared/venvs/megatron_r1/bin/python                # without a container
# module load cuda/13.0
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=ib0
# export CUDA_DEVICE_MAX_CONNECTIONS=1                       # Hopper and older, with tensor or context parallelism
# export TRITON_CACHE_DIR=/tmp/triton-$USER                  # caches off the shared file system
