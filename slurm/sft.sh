#!/usr/bin/env bash
#SBATCH --job-name=sft
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0
#SBATCH --time=24:00:00 --signal=B:USR1@900
#SBATCH --no-requeue
#SBATCH --output=slurm-%x-%j.out
# SFT, or with STAGE=reward-model a reward model, on TRAIN_NODES nodes (all of the job's unless given); what is left is spare.
#
#   TRAIN_NODES=64 sbatch -J cold_start --nodes=66 slurm/sft.sh configs/r1_cold_start_sft.toml [section.key=value ...]
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
STAGE=${STAGE:-sft} TRAIN_NODES=${TRAIN_NODES:-${#HOSTS[@]}}
case $STAGE in sft | reward-model) ;; *) refuse "STAGE = $STAGE: no stage that only trains; use slurm/grpo.sh" ;; esac
given=("$@")
set -- "$@" run.dir="$RUN" parallel.world_size=$((TRAIN_NODES * GPUS))
if [ "${#HOSTS[@]}" -lt "$TRAIN_NODES" ]; then refuse "TRAIN_NODES = $TRAIN_NODES: the job has ${#HOSTS[@]} nodes; raise --nodes"; fi
plan "$STAGE" "$@"
successor slurm/sft.sh "${given[@]}"
preflight "$TRAIN_NODES"
(train "$STAGE" "$(join "${HOSTS[@]:0:TRAIN_NODES}")" "$GPUS" "$@") & T=$!
supervise
