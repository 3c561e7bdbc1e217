#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --nodes=1 --ntasks-per-node=1 --exclusive --mem=0
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%j.out
# A conversion on one node; it needs no GPU and little memory. Submitted again it goes on where it was, and passes over
# what is whole; --overwrite starts anew.
#
#   sbatch slurm/convert.sh hf-to-megatron SOURCE TARGET [--workers N] [--overwrite]
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
if [ -z "${DRY_RUN:-}" ]; then mkdir -p "$LOG"; fi
case ${1:-} in
  hf-to-megatron | megatron-to-hf | fp8-cast) if [[ " $* " != *" --overwrite "* ]]; then set -- "$@" --resume; fi ;;
esac
(step convert "${HOSTS[0]}" 1 "$PYTHON" -m megatron_r1 convert "$@")
submit_next
