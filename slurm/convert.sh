#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --nodes=1 --ntasks-per-node=1 --exclusive --mem=0
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%j.out
# A conversion on one node; it needs no GPU and little memory. Submitted again with --resume it goes on where it was.
#
#   sbatch slurm/convert.sh hf-to-megatron SOURCE TARGET [--workers N] [--resume]
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
if [ -z "${DRY_RUN:-}" ]; then mkdir -p "$LOG"; fi
(step convert "${HOSTS[0]}" 1 "$PYTHON" -m megatron_r1 convert "$@")
submit_next
