#!/usr/bin/env bash
# Stages one after the other, each a chain of jobs: the next is submitted by the one before, when that is done. Run this on the
# login node; DRY_RUN=1 prints what would be submitted. Started again it passes over the stages that are done.
#
#   bash slurm/pipeline.sh STAGES.txt [FROM]      FROM: the stage to begin with, counted from 1
#
# STAGES.txt: a stage a line: the job's name (its folder is runs/NAME), the stage, the job's settings, the config and what overrides it.
#   cold_start sft  NODES=66 TRAIN_NODES=64 configs/v3_671b_sft.toml
#   r1_rl      grpo NODES=64 TRAIN_NODES=32 ROLLOUT_NODES=30 SERVER_NODES=2 configs/v3_671b_grpo.toml model.path=runs/cold_start/hf
set -euo pipefail
FILE=${1:?usage: bash slurm/pipeline.sh STAGES.txt [FROM]} FROM=${2:-1}
mapfile -t STAGES < <(sed 's/#.*//' "$FILE" | grep '[^[:space:]]')
if [ "$FROM" -gt "${#STAGES[@]}" ]; then echo "all ${#STAGES[@]} stages of $FILE are done"; exit; fi
read -ra words <<<"${STAGES[FROM - 1]}"
name=${words[0]} stage=${words[1]} settings=(STAGE="$stage")
set -- "${words[@]:2}"
while [[ ${1:-} =~ ^[A-Z_]+= ]]; do settings+=("$1") && shift; done
case $stage in
  sft | reward-model) script=slurm/sft.sh ;;
  convert) script=slurm/convert.sh ;;
  *) script=slurm/grpo.sh ;; # stages that sample
esac

# what the stage before was given is not for this one
unset RUN THEN STAGE NODES TRAIN_NODES ROLLOUT_NODES SERVERS SERVER_NODES PLACEMENT
export "${settings[@]}" THEN="bash slurm/pipeline.sh $FILE $((FROM + 1))"
if [ -n "${DRY_RUN:-}" ]; then
  echo "${settings[*]:1}" sbatch -J "$name" ${NODES:+--nodes="$NODES"} "$script" "$@"
  exec bash slurm/pipeline.sh "$FILE" "$((FROM + 1))"
fi
echo "$name: stage $FROM of ${#STAGES[@]}, job $(sbatch --parsable -J "$name" ${NODES:+--nodes="$NODES"} "$script" "$@")"
