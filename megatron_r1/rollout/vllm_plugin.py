"""Our plug-in of vLLM, loaded by each of its processes (entry point group `vllm.general_plugins`).

It registers weight-transfer backends for which our own ranks send, has tokens sent in packets (vllm_outputs.py), and mends what vLLM
0.32.0 gets wrong, most of it in the CPU build alone and without an error: the model simply computes something else. Each mend has a
test that fails when the stock build no longer needs it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.rollout.server_process import SENDING

ENGINES = dict.fromkeys(SENDING.values(), "GroupWeightTransferEngine") | {"file": "FileWeightTransferEngine"}
ANSWER_SECONDS = 60.0  # for the other workers to answer where one has failed


def register() -> None:
    """The entry point. vLLM may call it more than once in a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    from megatron_r1.rollout import vllm_outputs

    vllm_outputs.install()
    for name, engine in ENGINES.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, "megatron_r1.rollout.vllm_engines", engine)
    for mend in (*MENDS, *CPU_MENDS) if current_platform.is_cpu() else MENDS:
        apply(mend)


@dataclass(frozen=True)
class Mend:
    """One replaced function of vLLM."""

    name: str
    why: str
    target: str  # "module:Class.function"
    build: Callable[[Callable], Callable]  # the stock function -> the right one, which keeps the stock one as __wrapped__


def apply(mend: Mend) -> None:
    """Put the mended function in the stock one's place, once."""
    module, _, path = mend.target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, import_module(module))
    stock = getattr(owner, name)
    if not hasattr(stock, "is_mended"):
        mended = functools.wraps(stock)(mend.build(stock))
        mended.is_mended = True
        setattr(owner, name, mended)


class Answer:
    """A worker's queue of answers, and whether that to this call is still to come."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.is_due = queue, True

    def dequeue(self, timeout: float | None = None) -> Any:
        self.is_due = False
        return self.queue.dequeue(timeout=timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)  # a worker that dies has the executor shut all queues down


def _all_answers(stock: Callable) -> Callable:
    def collective_rpc(self: Any, *call: Any, unique_reply_rank: int | None = None, **named: Any) -> Any:
        if unique_reply_rank is not None:
            return stock(self, *call, unique_reply_rank=unique_reply_rank, **named)
        queues = self.response_mqs
        self.response_mqs = answers = [Answer(queue) for queue in queues]
        try:
            return stock(self, *call, **named)
        except RuntimeError:
            with contextlib.suppress(TimeoutError):  # of one that waits for the worker that failed
                for answer in answers:
                    if answer.is_due:
                        answer.dequeue(timeout=ANSWER_SECONDS)
            raise
        finally:
            if self.response_mqs is answers:  # else it has shut down
                self.response_mqs = queues

    return collective_rpc


def _rotate_3d(stock: Callable) -> Callable:
    def forward_cpu(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        rotate = self.forward_native if query.dim() == 3 else functools.partial(stock, self)
        return rotate(positions, query, key)

    return forward_cpu


def _prepack_again(stock: Callable) -> Callable:
    def setup_kernel(self: Any, layer: torch.nn.Module, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_update = self.moe_kernel is not None
        stock(self, layer=layer, w13=w13, w2=w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    return setup_kernel


def _expand(stock: Callable) -> Callable:
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
        replaced = torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype), x)
        return replaced.repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


def _local_experts(stock: Callable) -> Callable:
    def experts(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *rest: Any,
        **named: Any,
    ) -> None:
        if expert_map is not None:  # global expert -> local expert, -1 where another rank has it
            local = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(local < 0, 0.0)
            topk_ids = local.clamp(min=0).to(topk_ids.dtype)
        stock(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, None, *rest, **named)

    return experts


def _all_gatherv(stock: Callable) -> Callable:
    def all_gatherv(self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None) -> Any:
        assert dim == 0, f"{dim=}"
        if isinstance(input_, list | tuple):
            return [all_gatherv(self, x, dim, sizes) for x in input_]
        sizes = sizes or [input_.shape[0]] * self.world_size
        rows = max(sizes)
        padded = torch.cat([input_, input_.new_zeros(rows - input_.shape[0], *input_.shape[1:])])
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self.device_group)
        return torch.cat([x[:size] for x, size in zip(gathered, sizes, strict=True)])

    return all_gatherv


def _reduce_scatterv(stock: Callable) -> Callable:
    def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
        assert dim % input_.dim() == 0, f"{dim=} {input_.shape=}"
        sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
        total = input_.contiguous().clone()
        dist.all_reduce(total, group=self.device_group)
        start = sum(sizes[: self.rank_in_group])
        return total[start : start + sizes[self.rank_in_group]].contiguous()

    return reduce_scatterv


LAYERS = "vllm.model_executor.layers"
COMMUNICATOR = "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator"
MENDS = (
    Mend(
        "all_answers",
        "where one worker fails the others' answers stay in their queues, and the next call takes them for its own",
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
        _all_answers,
    ),
)
CPU_MENDS = (
    Mend(
        "rope_3d",
        "the C++ rotary_embedding reads [tokens, heads, size] queries with the strides of [tokens, heads * size]",
        f"{LAYERS}.rotary_embedding.base:RotaryEmbedding.forward_cpu",
        _rotate_3d,
    ),
    Mend(
        "moe_reload",
        "experts are packed for the CPU kernel at the first load only; after a weight update it reads raw weights as packed ones",
        f"{LAYERS}.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
        _prepack_again,
    ),
    Mend(
        "speculative_expand",
        "writes each token's temperature and top_p into a converted copy, so speculative decoding samples with uninitialised ones",
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        _expand,
    ),
    Mend(
        "expert_map",
        "under expert parallelism the CPU experts index local weights with global expert numbers",
        f"{LAYERS}.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply",
        _local_experts,
    ),
    Mend("all_gatherv", "missing, and data with expert parallelism calls it", f"{COMMUNICATOR}.all_gatherv", _all_gatherv),
    Mend("reduce_scatterv", "missing, and data with expert parallelism calls it", f"{COMMUNICATOR}.reduce_scatterv", _reduce_scatterv),
)
