"""Each adaptation of Megatron-Core to the CPU is needed: training breaks without it, so that none outlives its reason."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from mcore_runs import model
from ranks import run_ranks

PIPELINE = {"pipeline_model_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2}
PIPELINE_ONLY = ("moves to the device", "synchronize")
UNEVEN = ("uneven all-gather",)  # all other patches are needed by any training


def train(hf: dict[str, Any], layout: dict[str, int]) -> None:
    """On a rank: build a model and do one optimizer step, with Megatron's own parts all through."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_r1.mcore import distributed
    from megatron_r1.mcore.optimizer import Training, make_optimizer, wrap
    from megatron_r1.models.build import build
    from megatron_r1.parallel import Parallel

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = None  # it would keep the stream of an earlier model
    bounds = torch.tensor([0, 7, 16], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=9, max_seqlen_kv=9)
    ids, positions = torch.arange(16)[None], torch.cat([torch.arange(7), torch.arange(9)])[None]

    def forward_step(_: None, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        output = chunk(input_ids=ids, position_ids=positions, attention_mask=None, packed_seq_params=packed)
        return output, lambda logits: (logits.logsumexp(-1).sum(), torch.tensor(16, dtype=torch.int), {})

    try:
        distributed.init(Parallel(**layout), seed=1)
        check_random_numbers(get_cuda_rng_tracker())
        chunks = wrap(build(hf, Parallel(**layout), recompute="selective"))
        optimizer, _ = make_optimizer(chunks, Training())
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=chunks,
            num_microbatches=2,
            seq_length=16,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        state = optimizer.state_dict()
        for part in state if isinstance(state, list) else [state]:  # one for dense parameters, one for experts
            assert all(group["step"] == 1 for group in part["optimizer"]["param_groups"])
        optimizer.load_state_dict(state)
    finally:
        distributed.shutdown()


def check_random_numbers(tracker: Any) -> None:
    """Each of Megatron's random streams has a seed of its own, and drawing from one leaves the others as they were."""
    import torch

    assert len({state.numpy().tobytes() for state in tracker.get_states().values()}) == 3
    before = torch.get_rng_state()
    with tracker.fork():
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)


def exchange_uneven_parts() -> None:
    """On a rank: what the dispatcher does under expert tensor parallelism, whose ranks have different numbers of tokens."""
    import torch
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from megatron_r1.mcore import distributed
    from megatron_r1.parallel import Parallel

    try:
        distributed.init(Parallel(tensor_model_parallel_size=2), seed=1)
        rank, sizes = distributed.rank(), [2, 3]
        part = torch.full((sizes[rank], 4), float(rank), requires_grad=True)
        whole = gather_from_sequence_parallel_region(part, output_split_sizes=sizes)
        assert whole[:, 0].tolist() == [0, 0, 1, 1, 1]
        (whole * (rank + 1)).sum().backward()
        assert part.grad.tolist() == [[3.0] * 4] * sizes[rank]  # of both ranks
    finally:
        distributed.shutdown()


def outcomes(hf: dict[str, Any]) -> dict[str, str | None]:
    """On a rank: how training fails without each patch in turn; None where it does not."""
    import logging

    from megatron_r1.mcore import cpu

    logging.disable()  # Megatron warns that the CPU's random state changes: here it is the one state there is
    found = {}
    for patch in cpu.PATCHES:
        with cpu.without(patch.name):
            try:
                if patch.name in UNEVEN:
                    exchange_uneven_parts()
                else:
                    train(hf, PIPELINE if patch.name in PIPELINE_ONLY else EXPERTS)
                found[patch.name] = None
            except Exception as error:  # each patch has a failure of its own
                found[patch.name] = f"{type(error).__name__}: {error}"
    for layout in (PIPELINE, EXPERTS):
        train(hf, layout)  # with all patches in place again
    exchange_uneven_parts()
    logging.disable(logging.NOTSET)
    return found


def test_training_breaks_without_each_patch():
    [found, _] = run_ranks(2, outcomes, model(num_hidden_layers=2))
    assert found
    needless = [name for name, failure in found.items() if failure is None]
    assert not needless, f"this Megatron trains without them; delete these patches: {needless}"


@pytest.mark.parametrize("module", ["megatron_r1.__main__", "megatron_r1.launch", "megatron_r1.rollout.vllm_server"])
def test_torch_cuda_is_left_alone_outside_trainer_ranks(module):
    code = f"import sys, {module}; print([m for m in ('megatron.core', 'megatron_r1.mcore.cpu') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
