#!/usr/bin/env bash
#SBATCH --job-name=grpo
#SBATCH --nodes=6 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --mem=0
#SBATCH --time=24:00:00 --signal=B:USR1@900
#SBATCH --no-requeue --no-kill
#SBATCH --output=slurm-%x-%j.out
# GRPO on TRAIN_NODES nodes, their rollouts on ROLLOUT_NODES; what is left of the job is spare.
#
#   TRAIN_NODES=32 ROLLOUT_NODES=31 sbatch -J r1_zero --nodes=64 slurm/grpo.sh configs/r1_zero.toml [section.key=value ...]
#
# SERVERS is for each node; a model that needs more GPUs than a node has is served by SERVER_NODES nodes together.
# PLACEMENT=colocated: the servers share the trainer's nodes (and ROLLOUT_NODES is not used).
. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"
TRAIN_NODES=${TRAIN_NODES:-2} ROLLOUT_NODES=${ROLLOUT_NODES:-2} SERVERS=${SERVERS:-1} SERVER_NODES=${SERVER_NODES:-1} PORT=${PORT:-8000}
NEEDED=$((TRAIN_NODES + ROLLOUT_NODES))
if [ "${PLACEMENT:-dedicated}" = colocated ]; then NEEDED=$TRAIN_NODES; fi
set -- "$@" run.dir="$RUN" parallel.world_size=$((TRAIN_NODES * GPUS)) rollout.servers="$SERVERS" rollout.port="$PORT" rollout.nodes="$SERVER_NODES"
if [ "${#HOSTS[@]}" -lt "$NEEDED" ]; then say "TRAIN_NODES, ROLLOUT_NODES = $TRAIN_NODES, $ROLLOUT_NODES: more than the job's ${#HOSTS[@]} nodes; raise --nodes"; exit 2; fi
if [ $((ROLLOUT_NODES % SERVER_NODES)) != 0 ]; then say "ROLLOUT_NODES = $ROLLOUT_NODES: not a multiple of SERVER_NODES = $SERVER_NODES"; exit 2; fi
if [ "$SERVERS" != 1 ] && [ "$SERVER_NODES" != 1 ]; then say "SERVERS, SERVER_NODES = $SERVERS, $SERVER_NODES: one of them must be 1"; exit 2; fi
plan grpo "$@"
successor slurm/grpo.sh "${@:1:$#-5}"
preflight "$NEEDED"

TRAIN=("${HOSTS[@]:0:TRAIN_NODES}") ROLLOUT=("${HOSTS[@]:TRAIN_NODES:ROLLOUT_NODES}")
if [ "${PLACEMENT:-dedicated}" = colocated ]; then ROLLOUT=("${TRAIN[@]}"); fi
say "train ${TRAIN[*]} | rollout ${ROLLOUT[*]} | spare ${HOSTS[*]:NEEDED}"
URLS=$(for ((n = 0; n < ${#ROLLOUT[@]}; n += SERVER_NODES)); do
  for ((i = 0; i < SERVERS; i++)); do echo "\"http://${ROLLOUT[n]}:$((PORT + i))\""; done
done | paste -sd,)

# a node's servers are restarted there, up to rollout.max_restarts times; a node that is lost takes only its own with it
export SERVER_NODES ROLLOUT_HOSTS="${ROLLOUT[*]}"
(step rollout "$(join "${ROLLOUT[@]}")" 1 --no-kill --kill-on-bad-exit=0 bash slurm/server.sh "$PYTHON" -m megatron_r1 serve "$@") &
(train grpo "$(join "${TRAIN[@]}")" "$@" rollout.urls="[$URLS]") & T=$!
supervise
