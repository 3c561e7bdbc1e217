# shellcheck shell=bash
# Sourced by slurm/*.sh inside a job: settings, where things are, and what all jobs do alike. Site facts (account, image,
# network interfaces) come from the environment or from slurm/site.sh, which is not in git; see site.example.sh.
#
#   RUN         the run's folder on the shared file system   runs/<job name>: `sbatch -J NAME` names the run
#   IMAGE       a container (pyxis); else the PYTHON of site.sh, or .venv
#   DRY_RUN=1   print every srun line and start nothing; needs no job
set -euo pipefail
if [ -n "${DRY_RUN:-}" ]; then # a stand-in for the job: DRY_RUN=1 NODES=9 bash slurm/grpo.sh CONFIG
  : "${SLURM_SUBMIT_DIR:=$PWD}" "${SLURM_JOB_ID:=0}" "${SLURM_JOB_NAME:=dry}" "${SLURM_JOB_NUM_NODES:=${NODES:-6}}"
fi
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, or set DRY_RUN=1 to see what it would start}"
GPUS=${GPUS:-${SLURM_GPUS_PER_NODE:-8}} CPUS=${SLURM_CPUS_ON_NODE:-64} # a job that has nodes to itself is told of all their GPUs
GPUS=${GPUS##*:} # of h100:8
export RUN=${RUN:-$PWD/runs/$SLURM_JOB_NAME}
export LOG=$RUN/logs/$SLURM_JOB_ID
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CPUS / GPUS))}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # of this job; below the ports that the kernel hands out
# shellcheck source=/dev/null
if [ -f slurm/site.sh ]; then . slurm/site.sh; fi
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
CONTAINER=()
if [ -n "${IMAGE:-}" ]; then
  PYTHON=python
  CONTAINER=(--container-image="$IMAGE" --container-mounts="${MOUNTS:-$PWD:$PWD}" --container-workdir="$PWD" --no-container-mount-home)
fi

say() { echo "[$(date +%FT%T) $SLURM_JOB_ID] $*"; }
refuse() { say "error: $*"; exit 2; }
join() { local IFS=,; echo "$*"; }

# hosts: the job's nodes, into HOSTS
hosts() {
  if [ -n "${DRY_RUN:-}" ]; then mapfile -t HOSTS < <(printf 'node%03d\n' $(seq "$SLURM_JOB_NUM_NODES")); return; fi
  mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
}

# step NAME HOST,HOST,... TASKS_PER_NODE [srun option...] command...   every size is given: srun would take the job's
step() {
  local name=$1 nodes=$2 per=$3 n
  shift 3
  n=$(tr -cd , <<<"$nodes" | wc -c) n=$((n + 1))
  set -- srun --job-name="$name" --overlap --nodelist="$nodes" --nodes="$n" --ntasks=$((n * per)) --ntasks-per-node="$per" \
    --cpus-per-task=$((CPUS / per)) --output="$LOG/$name-%4t.log" "${CONTAINER[@]}" "$@"
  # a line is one write: steps that run beside each other print beside each other
  if [ -n "${DRY_RUN:-}" ]; then printf '%s\n' "$(printf '%q ' "$@")"; else exec "$@"; fi
}

# train STAGE HOST,HOST,... RANKS_PER_NODE ARG...: the trainer step
train() {
  local stage=$1 nodes=$2 per=$3
  shift 3
  MASTER_ADDR=${nodes%%,*} step "$stage" "$nodes" "$per" --kill-on-bad-exit=1 --wait=60 \
    bash slurm/rank.sh "$PYTHON" -m megatron_r1 "$stage" "$@"
}

# plan STAGE ARG...: the config checked against the job's size before anything starts; the effective one goes to the run's folder
plan() {
  if [ -n "${DRY_RUN:-}" ]; then return; fi
  mkdir -p "$LOG"
  ln -sfn "$SLURM_JOB_ID" "$RUN/logs/latest"
  { # outside a repository there is no commit to note
    date; git rev-parse HEAD; git status --short; scontrol show job "$SLURM_JOB_ID"
    env | grep -viE 'key|token|secret|passw|credential' | sort
  } >"$LOG/env.txt" 2>&1 || true
  "${PLAN[@]}" "$PYTHON" -m megatron_r1 plan --gpus "$GPUS" "$@" >"$LOG/$1.toml" || refuse "the config does not fit this job"
  cp "$LOG/$1.toml" "$RUN/$1.toml"
  grep '^# ' "$LOG/$1.toml"
}
PLAN=()
if [ -n "${IMAGE:-}" ]; then PLAN=(srun --overlap --nodes=1 --ntasks=1 --gpus-per-node=0 "${CONTAINER[@]}"); fi

# examine STEP TASKS_PER_NODE command...: run it on all HOSTS; those stay there that say "ok NODE", and after it what most say
examine() {
  local name=$1 per=$2
  shift 2
  (step "$name" "$(join "${HOSTS[@]}")" "$per" --kill-on-bad-exit=0 --no-kill "$@") || true
  if [ -n "${DRY_RUN:-}" ]; then return; fi
  mapfile -t HOSTS < <(awk 'FNR == NR {host[$1] = NR; next}
    /^ok / {node = $2; $1 = $2 = ""; said[node] = $0; if (++count[$0] > count[most]) most = $0}
    END {for (node in said) if (said[node] == most) print host[node], node}' \
    <(printf '%s\n' "${HOSTS[@]}") "$LOG/$name"-*.log | sort -n | cut -d' ' -f2)
}

# preflight NEEDED: leaves in HOSTS the nodes that pass; ends the job when fewer than NEEDED do
preflight() {
  local all=("${HOSTS[@]}") bad why floor=${NODE_GBPS:-}
  examine preflight 1 timeout 120 bash slurm/preflight.sh "$GPUS" "$PYTHON"
  if [ -z "$floor" ] && { command -v nvidia-smi >/dev/null || [ -n "${DRY_RUN:-}" ]; }; then floor=50; fi
  if [ "${floor:-0}" != 0 ] && [ "${#HOSTS[@]}" != 0 ]; then
    examine allreduce "$GPUS" timeout 240 bash slurm/rank.sh "$PYTHON" -m megatron_r1 allreduce "$floor" "${PAIR_GBPS:-5}" "${HOSTS[@]}"
  fi
  if [ -n "${DRY_RUN:-}" ]; then return; fi
  bad=$(comm -23 <(printf '%s\n' "${all[@]}" | sort) <(printf '%s\n' "${HOSTS[@]}" | sort) | paste -sd,)
  if [ -n "$bad" ]; then
    why=$(cat "$LOG"/{preflight,allreduce}-*.log 2>/dev/null | grep '^bad ' || true)
    say "bad nodes: $bad: ${why:-no answer, or other versions than most, see $LOG/preflight-*.log}"
    if [ -n "${NEXT:-}" ]; then scontrol update JobId="$NEXT" ExcNodeList="$bad"; fi
  fi
  if [ "${#HOSTS[@]}" -lt "$1" ]; then say "only ${#HOSTS[@]} of the $1 nodes that are needed are healthy"; exit 1; fi
}

# submit_next: what THEN says comes after this run
submit_next() {
  if [ -n "${THEN:-}" ]; then say "next: $(env -u THEN -u RUN -u STAGE bash -c "$THEN")"; fi
}

# successor SCRIPT ARG...: queue the job that goes on from the last checkpoint, whatever ends this one: the time limit, a
# crash, the loss of a node. It waits for this one, for both have one name (singleton). The chain ends where the work is done,
# where RUN/stop asks for it, and where the last MAX_IDLE jobs saved nothing new.
successor() {
  if [ -n "${DRY_RUN:-}" ]; then return; fi
  if [ -e "$RUN/done" ]; then
    say "$RUN is done"
    submit_next
    exit 0
  fi
  if [ -e "$RUN/stop" ]; then say "$RUN/stop is there: delete it to go on"; exit 0; fi
  local now was=- idle=0
  now=$(cat "$RUN/checkpoints/latest" 2>/dev/null || find "$RUN" -maxdepth 2 -regex '.*/\(conversations\|samples\).jsonl' -printf %s)
  now=${now:-none}
  read -r was idle 2>/dev/null <"$RUN/chain" || true
  if [ "$now" = "$was" ]; then idle=$((idle + 1)); else idle=0; fi
  echo "$now $idle" >"$RUN/chain"
  if [ "$idle" -ge "${MAX_IDLE:-2}" ]; then
    rm "$RUN/chain" # so that it can be started again by hand
    say "the last $idle jobs saved nothing new (at $now): giving up; see $RUN/logs"
    exit 1
  fi
  NEXT=$(sbatch --parsable --dependency=singleton --job-name="$SLURM_JOB_NAME" --nodes="$SLURM_JOB_NUM_NODES" "$@")
  say "successor $NEXT"
}

# supervise: wait for the trainer step, of process id $T, and for the rollout step $R, without which it cannot go on; hand USR1 on
# to every rank (the time limit is near: save and end); end the chain when the work is done or was asked to end
supervise() {
  if [ -n "${DRY_RUN:-}" ]; then wait; return; fi
  local rc=0
  trap 'say "USR1: save and end"; kill -USR1 "$T"' USR1 # srun hands it on to its tasks
  trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
  while kill -0 "$T" 2>/dev/null; do # a trapped signal ends a wait early
    wait -n "$T" ${R:+"$R"} || true
    if [ -n "${R:-}" ] && kill -0 "$T" 2>/dev/null && ! kill -0 "$R" 2>/dev/null; then say "no rollout server is left"; exit 1; fi
  done
  wait "$T" || rc=$?
  say "trainer ended with $rc"
  if [ -e "$RUN/done" ] || [ -e "$RUN/stop" ]; then
    scancel "$NEXT" || true
    rm -f "$RUN/chain"
    if [ -e "$RUN/done" ]; then submit_next; fi
    exit 0
  fi
  exit $((rc ? rc : 75)) # 75: no error, and not done: the successor goes on
}
hosts
