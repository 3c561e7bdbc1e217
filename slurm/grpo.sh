#!/usr/bin/env bash
#SBATCH --job-name=grpo
#SBATCH --nodes=6 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0
#SBATCH --time=24:00:00 --signal=B:USR1@900
#SBATCH --no-requeue --no-kill
#SBATCH --output=slurm-%x-%j.out
# GRPO on TRAIN_NODES nodes, their rollouts on ROLLOUT_NODES; what is left of the job is spare.
#
#   TRAIN_NODES=32 ROLLOUT_NODES=30 SERVER_NODES=2 sbatch -J r1_zero --nodes=64 slurm/grpo.sh configs/r1_zero.toml [section.key=value ...]
#
# SERVERS is for each node; a model that needs more GPUs than a node has is served by SERVER_NODES nodes together.
# PLACEMENT=colocated: the servers share the trainer's nodes (ROLLOUT_NODES is not used).
# STAGE: another stage that samples; eval and reject have no trainer, ROLLOUT_NODES alone count.
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
STAGE=${STAGE:-grpo} PLACEMENT=${PLACEMENT:-dedicated} PORT=${PORT:-8000}
TRAIN_NODES=${TRAIN_NODES:-2} ROLLOUT_NODES=${ROLLOUT_NODES:-2} SERVERS=${SERVERS:-1} SERVER_NODES=${SERVER_NODES:-1}
case $STAGE in
  eval | reject) TRAIN_NODES=0 RANKS=1 ;; # the servers do the work, one process asks them
  *) RANKS=$((TRAIN_NODES * GPUS)) ;;
esac
case $PLACEMENT in
  dedicated) NEEDED=$((TRAIN_NODES + ROLLOUT_NODES)) ;;
  colocated) NEEDED=$TRAIN_NODES ROLLOUT_NODES=$TRAIN_NODES ;;
  *) refuse "PLACEMENT = $PLACEMENT: no such placement; use dedicated or colocated" ;;
esac
sizes="TRAIN_NODES, ROLLOUT_NODES = $TRAIN_NODES, $ROLLOUT_NODES"
if [ "${#HOSTS[@]}" -lt "$NEEDED" ]; then refuse "$sizes: more than the job's ${#HOSTS[@]} nodes; raise --nodes to $NEEDED"; fi
if [ $((ROLLOUT_NODES % SERVER_NODES)) != 0 ]; then refuse "$sizes: not in groups of SERVER_NODES = $SERVER_NODES"; fi
if [ "$SERVERS" != 1 ] && [ "$SERVER_NODES" != 1 ]; then refuse "SERVERS, SERVER_NODES = $SERVERS, $SERVER_NODES: set one to 1"; fi
given=("$@")
set -- "$@" run.dir="$RUN" parallel.world_size="$RANKS" \
  rollout.placement="$PLACEMENT" rollout.servers="$SERVERS" rollout.port="$PORT" rollout.nodes="$SERVER_NODES"
plan "$STAGE" "$@"
successor slurm/grpo.sh "${given[@]}"
preflight "$NEEDED"

TRAIN=("${HOSTS[@]:0:TRAIN_NODES}") ROLLOUT=("${HOSTS[@]:NEEDED-ROLLOUT_NODES:ROLLOUT_NODES}")
say "train ${TRAIN[*]:-no nodes} | rollout ${ROLLOUT[*]} | spare ${HOSTS[*]:NEEDED}"
URLS=$(for ((n = 0; n < ${#ROLLOUT[@]}; n += SERVER_NODES)); do
  for ((i = 0; i < SERVERS; i++)); do echo "\"http://${ROLLOUT[n]}:$((PORT + i))\""; done
done | paste -sd,)

# a node's servers are restarted there, up to rollout.max_restarts times; a node that is lost takes only its own with it
export SERVER_NODES ROLLOUT_HOSTS="${ROLLOUT[*]}"
(step rollout "$(join "${ROLLOUT[@]}")" 1 --no-kill --kill-on-bad-exit=0 \
  bash slurm/server.sh "$PYTHON" -m megatron_r1 serve "$STAGE" "$@") & R=$!
if [ "$TRAIN_NODES" = 0 ]; then TRAIN=("${ROLLOUT[0]}") GPUS=1; fi
(train "$STAGE" "$(join "${TRAIN[@]}")" "$GPUS" "$@" rollout.urls="[$URLS]") & T=$!
supervise
