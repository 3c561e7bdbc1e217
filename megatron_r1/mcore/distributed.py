"""Process groups: one place that starts torch.distributed and Megatron's parallel state, and talks over them."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel

from megatron_r1 import gloo
from megatron_r1.mcore import cpu
from megatron_r1.parallel import Parallel

_meeting_point: tuple[dist.Store, int, int] | None = None  # store, rank, world size: one for the life of the process
_layouts = _gatherings = 0
STORE_CALLS_A_SECOND = 5000  # that all ranks may make while they wait


def _join(*, timeout: timedelta) -> None:
    """Make the group of all processes. Each layout gets a prefix of its own in the store, which outlives them."""
    global _meeting_point, _layouts
    if _meeting_point is None:
        _meeting_point = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store, rank, world_size = _meeting_point
    _layouts += 1
    dist.init_process_group(
        "nccl" if cpu.has_cuda() else "gloo",
        store=dist.PrefixStore(f"layout{_layouts}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def init(parallel: Parallel, seed: int, *, timeout_minutes: float = 30.0) -> None:
    """Join the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, then make Megatron's groups.

    NCCL with CUDA, gloo without. Random numbers start from `seed`: the same on all data-parallel ranks. After
    `shutdown()` it may be called again with other sizes.
    """
    if cpu.has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        gloo.share_device()
    _join(timeout=timedelta(minutes=timeout_minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=True,  # the optimizer's state moves over them
    )
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def shutdown() -> None:
    """Undo `init`: drop every group with its threads and sockets, of which a layout has hundreds."""
    parallel_state.destroy_model_parallel()
    drop_models()  # they hold groups
    dist.destroy_process_group()


def drop_models() -> None:
    """Free what every policy of this process holds, in cycles; none may be used again."""
    for model in (thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel):
        vars(model).clear()  # its hooks hold it, and graphs the hooks: a way through C++, which the collector does not see
    gc.collect()


def rank() -> int:
    """This process among all of the run."""
    return dist.get_rank()


def any_rank(flag: bool) -> bool:
    """Whether any rank says so; all of them learn it."""
    said = torch.tensor(float(flag), device=_device())
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said.item())


def share(value: Any) -> Any:
    """Rank 0's `value`, on every rank; any object that pickles."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def together() -> None:
    """Wait for every rank, where some have waited for servers or verifiers, without the limit that a collective has: those take as
    long as a rollout takes. If one never comes, the run's watchdog ends the others. Collective.
    """
    global _gatherings
    store, _, world_size = _meeting_point
    _gatherings += 1
    arrived = f"together/{_layouts}/{_gatherings}"
    store.add(arrived, 1)
    while store.add(arrived, 0) < world_size:
        time.sleep(max(0.01, world_size / STORE_CALLS_A_SECOND))


def dp_rank() -> int:
    """Which part of the data this rank trains on."""
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    """Into how many parts the data is divided."""
    return parallel_state.get_data_parallel_world_size()


def is_model_parallel_leader() -> bool:
    """Whether this is the one of the ranks that train on the same data that talks to vLLM and writes metrics."""
    return dist.get_rank() == _first(parallel_state.get_model_parallel_group()) == _first(parallel_state.get_context_parallel_group())


def broadcast_in_model_parallel_group(value: Any) -> Any:
    """The leader's `value`, on every rank that trains on the same data; any object that pickles."""
    box = [value]
    for group in (parallel_state.get_context_parallel_group(), parallel_state.get_model_parallel_group()):
        if group.size() > 1:  # from the leader to those with its part of the model, then from each to those with the other parts
            dist.broadcast_object_list(box, src=_first(group), group=group, device=_device())
    return box[0]


def gather_over_dp(value: Any) -> list[Any]:
    """Every data-parallel rank's `value`, in order, on all of them."""
    values: list[Any] = [None] * dp_size()
    dist.all_gather_object(values, value, group=parallel_state.get_data_parallel_group())
    return values


def gather_from_leaders(values: list[Any]) -> list[Any]:
    """The lists of all model-parallel leaders, one after another in data-parallel order, on every rank."""
    return [value for part in gather_over_dp(broadcast_in_model_parallel_group(values)) for value in part]


def _first(group: dist.ProcessGroup) -> int:
    return dist.get_process_group_ranks(group)[0]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if cpu.has_cuda() else torch.device("cpu")
