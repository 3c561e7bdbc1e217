#!/usr/bin/env bash
# A rollout node's servers, or its part of one that spans SERVER_NODES nodes: those are neighbours among ROLLOUT_HOSTS.
read -ra hosts <<<"$ROLLOUT_HOSTS"
rank=$((SLURM_PROCID % SERVER_NODES))
exec "$@" rollout.host="$SLURMD_NODENAME" rollout.node_rank="$rank" rollout.head="${hosts[SLURM_PROCID - rank]}"
