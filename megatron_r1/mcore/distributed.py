"""Process groups of the trainer ranks, and the few collectives the stages use on whole Python objects."""

from __future__ import annotations

import datetime
import os
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_r1.mcore import cpu
from megatron_r1.parallel import Parallel

T = TypeVar("T")


def init(parallel: Parallel, *, seed: int, timeout_minutes: int = 30) -> None:
    """Join the ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them) and lay out their groups.

    gloo on a CPU, nccl on GPUs. May be called again after `forget_layout`, for another layout of the same ranks.
    """
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if cpu.has_cuda():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if cpu.has_cuda() else "gloo", timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=True,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def forget_layout() -> None:
    """Drop the model-parallel groups, so that `init` can lay out others."""
    parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leave the ranks."""
    if dist.is_initialized():
        forget_layout()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def dp_rank() -> int:
    """Which share of the data this rank trains on; the same on all ranks of a model-parallel group."""
    return parallel_state.get_data_parallel_rank()


def dp_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def is_model_parallel_leader() -> bool:
    """True on the one rank of each model-parallel group that talks to the servers and verifies."""
    return parallel_state.get_model_parallel_group().rank() == 0


def any_rank(flag: bool) -> bool:
    """Whether any rank says so. Collective."""
    said = torch.tensor([float(flag)], device="cuda" if cpu.has_cuda() else "cpu")
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said.item())


def gather_from_leaders(items: list[T]) -> list[T]:
    """The leaders' lists joined in order of their data-parallel rank, on every rank. Collective."""
    mine = (dp_rank(), items) if is_model_parallel_leader() else None
    everyone: list[tuple[int, list[T]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    shares = sorted((share for share in everyone if share is not None), key=lambda share: share[0])
    return [item for _, share in shares for item in share]
