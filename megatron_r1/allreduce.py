"""`python -m megatron_r1 allreduce NODE_GBPS PAIR_GBPS NODE...`: are these nodes' links as fast as they must be? One task a GPU.

A node measures alone, then with its neighbour on the one side, then on the other. One that is slow with both is bad; its neighbours
are not, for they are fast with their other one. Each measurement is a process group of its own: a node that hangs costs time only.
Bandwidth is the bus's, as nccl-tests count it: 2 (n - 1) / n x bytes / seconds.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = timedelta(seconds=60)  # of one measurement
MIB = {"nccl": 1024, "gloo": 1}  # to reduce
TIMES = 5


def allreduce(arguments: list[str]) -> int:
    """Measure and print one line "ok NODE" or "bad NODE: why" a node; returns 1 for a bad one. srun and slurm/rank.sh set the rest."""
    if len(arguments) < 3:
        raise ValueError("allreduce: give the two lowest bandwidths in GB/s and the nodes, as in: allreduce 50 5 node1 node2")
    node_gbps, pair_gbps, nodes = float(arguments[0]), float(arguments[1]), arguments[2:]
    node, local, port = os.environ["SLURMD_NODENAME"], int(os.environ["LOCAL_RANK"]), int(os.environ["MASTER_PORT"])
    tasks = int(os.environ["WORLD_SIZE"]) // len(nodes)
    place = nodes.index(node)
    alone = measure([node], node, local=local, tasks=tasks, port=port + 3 * place)
    pairs: dict[str, float] = {}
    for side in (0, 1):
        other = partner(place, side, count=len(nodes))
        if other is not None:
            first, second = sorted((place, other))
            members = [nodes[first], nodes[second]]
            pairs[nodes[other]] = measure(members, node, local=local, tasks=tasks, port=port + 3 * first + 1 + side)
    reason = fault(alone, pairs, node_gbps=node_gbps, pair_gbps=pair_gbps)
    if local == 0:
        print(f"all-reduce on {node}: {alone:.3g} GB/s", *(f"{gbps:.3g} with {name}" for name, gbps in pairs.items()), sep=", ")
        print(f"bad {node}: {reason}" if reason else f"ok {node}", flush=True)
    return int(reason is not None)


def partner(place: int, side: int, *, count: int) -> int | None:
    """The neighbour in a ring of `count`: pairs 0-1, 2-3, ... for side 0 and 1-2, 3-4, ... for side 1; None for one left over."""
    other = (place - side) % count ^ 1
    return (other + side) % count if other < count else None


def fault(alone: float, pairs: dict[str, float], *, node_gbps: float, pair_gbps: float) -> str | None:
    """Why a node with these bandwidths (GB/s) is bad, or None."""
    if alone < node_gbps:
        return f"all-reduce within the node: {alone:.3g} GB/s, {node_gbps:g} are needed (NODE_GBPS)"
    if pairs and max(pairs.values()) < pair_gbps:
        found = " and ".join(f"{gbps:.3g} GB/s with {name}" for name, gbps in pairs.items())
        return f"all-reduce between nodes: {found}, {pair_gbps:g} are needed (PAIR_GBPS)"
    return None


def measure(members: Sequence[str], node: str, *, local: int, tasks: int, port: int) -> float:
    """GB/s of an all-reduce over `tasks` ranks on each of these nodes; 0 where it fails, infinite for a rank alone."""
    world, rank = tasks * len(members), tasks * members.index(node) + local
    if world == 1:
        return math.inf
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a limit that runs out is an error here, not the process's end
    if backend == "nccl":
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(backend, init_method=f"tcp://{members[0]}:{port}", rank=rank, world_size=world, timeout=LIMIT)
        data = torch.zeros(MIB[backend] << 18, device="cuda" if backend == "nccl" else "cpu")  # fp32
        seconds = seconds_of(data)
        dist.destroy_process_group()
    except RuntimeError as error:  # torch's errors of connections and limits
        print(f"all-reduce of {', '.join(members)} on {node}: {' '.join(str(error).split())}", flush=True)
        return 0.0
    return 2 * (world - 1) / world * data.nbytes / seconds / 1e9


def seconds_of(data: torch.Tensor) -> float:
    """One all-reduce of `data`, the mean of TIMES after one that opens the connections."""
    dist.all_reduce(data)
    synchronize(data)
    start = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(data)
    synchronize(data)
    return (time.perf_counter() - start) / TIMES


def synchronize(data: torch.Tensor) -> None:
    """Wait for the device."""
    if data.is_cuda:
        torch.cuda.synchronize()
