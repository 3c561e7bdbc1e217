"""An optimizer step is the same under every layout, packing and number of microbatches, and reports the same figures."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mcore_runs import GRPO, TEMPERATURE, Run, sequences
from ranks import run_ranks

from megatron_r1.algorithms import grpo, sft
from megatron_r1.packing import pack
from megatron_r1.parallel import Parallel
from megatron_r1.types import LossOutput

ONE = Parallel()
LAYOUTS = {  # ranks, sizes, packed tokens of a microbatch
    "DP2": (2, Parallel(), 512),
    "TP2": (2, Parallel(tensor_model_parallel_size=2), 512),
    "PP2": (2, Parallel(pipeline_model_parallel_size=2), 128),
    "VPP2": (2, Parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 128),
    "EP2": (2, Parallel(expert_model_parallel_size=2), 512),
    "TP2 x EP2, ETP1": (2, Parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1), 512),
    "TP2 x EP2, ETP2": (4, Parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2), 512),
    "EP2, ETP2": (4, Parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=2), 512),
    "PP2 x EP2": (4, Parallel(pipeline_model_parallel_size=2, expert_model_parallel_size=2), 128),
    "CP3": (3, Parallel(context_parallel_size=3), 128),
    "CP2 x TP2": (4, Parallel(context_parallel_size=2, tensor_model_parallel_size=2), 512),
    "CP2 x PP2": (4, Parallel(context_parallel_size=2, pipeline_model_parallel_size=2), 128),
    "CP2 x DP2, EP4": (4, Parallel(context_parallel_size=2, expert_model_parallel_size=4), 512),
}
PADDING = {2: 0.2, 3: 0.3}  # context parallelism pads each of these short sequences to a multiple of 4 or 6
Result = tuple[list[dict[str, float]], dict[str, Any]]


def three_grpo_steps(parallel: Parallel, chunk_tokens: int = 512, recompute: str = "none") -> Result:
    with Run(parallel, recompute=recompute) as run:
        run.policy.refresh_reference()
        metrics = [run.grpo_step(number, chunk_tokens=chunk_tokens) for number in range(3)]
        return metrics, run.weights()


def two_sft_steps(parallel: Parallel) -> Result:
    with Run(parallel) as run:
        return [run.sft_step(number, chunk_tokens=128) for number in range(2)], run.weights()


def two_sft_steps_sent_late(parallel: Parallel) -> Result:
    """One rank's sends read their memory a little later, as gloo's thread may; what Megatron frees is written over at once."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import schedules
    from torch.distributed import distributed_c10d

    sender = ThreadPoolExecutor(1)  # keeps the order
    send, free = dist.isend, schedules.deallocate_output_tensor

    def late(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        memory = tensor.detach()

        def read_and_send() -> Any:
            time.sleep(0.02 * (dist.get_rank() == 0))
            return send(memory, *args, **kwargs)

        future = sender.submit(read_and_send)
        return SimpleNamespace(wait=lambda: future.result().wait())

    def freed(output: Any, really: bool = False) -> None:
        if really and output is not None:
            output.detach().fill_(float("nan"))
        free(output, really)

    dist.isend = distributed_c10d.isend = late
    schedules.deallocate_output_tensor = freed
    try:
        return two_sft_steps(parallel)
    finally:
        dist.isend = distributed_c10d.isend = send
        schedules.deallocate_output_tensor = free


def three_sft_steps(parallel: Parallel, train_mtp: bool) -> Result:
    with Run(parallel, train_mtp=train_mtp, mtp_loss_scale=0.5) as run:
        return [run.sft_step(number, chunk_tokens=128) for number in range(3)], run.weights()


def without_load(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "moe/load" not in name}


def assert_same(got: Result, expected: Result, *, padding: float = 0.05) -> None:
    """`padding`: how much the experts' load may differ by, for they count the padding too."""
    for mine, theirs in zip(got[0], expected[0], strict=True):
        assert mine.keys() == theirs.keys()
        assert without_load(mine) == pytest.approx(without_load(theirs), rel=1e-5)
        assert mine == pytest.approx(theirs, abs=padding)
        assert mine["policy/loss"] == pytest.approx(theirs["policy/loss"], abs=1e-6)
        assert mine["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=3e-6)
    assert got[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        np.testing.assert_allclose(got[1][name], weight, rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone() -> Result:
    return run_ranks(1, three_grpo_steps, ONE)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps_of_grpo_are_those_of_one_rank(name: str, alone: Result):
    ranks, parallel, chunk_tokens = LAYOUTS[name]
    results = run_ranks(ranks, three_grpo_steps, parallel, chunk_tokens)
    for metrics, _ in results:
        assert metrics == results[0][0], "every rank reports the same"
    assert_same(results[0], alone, padding=PADDING.get(parallel.context_parallel_size, 0.05))


def test_what_a_stage_sends_is_there_until_the_next_stage_has_it():
    expected = run_ranks(1, two_sft_steps, ONE)[0]
    assert_same(run_ranks(2, two_sft_steps_sent_late, LAYOUTS["VPP2"][1])[0], expected)


@pytest.mark.parametrize("chunk_tokens", [0, 64, 256])
def test_packing_and_microbatches_change_nothing(chunk_tokens: int, alone: Result):
    assert_same(run_ranks(1, three_grpo_steps, ONE, chunk_tokens)[0], alone)


@pytest.mark.parametrize(("parallel", "ranks"), [(ONE, 1), (LAYOUTS["TP2"][1], 2)])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(recompute: str, parallel: Parallel, ranks: int, alone: Result):
    assert_same(run_ranks(ranks, three_grpo_steps, parallel, 512, recompute)[0], alone)


@pytest.mark.parametrize("name", ["TP2", "PP2", "VPP2", "EP2", "CP3"])
def test_sft_trains_the_mtp_layer_alike_in_every_layout(name: str):
    ranks, parallel, _ = LAYOUTS[name]
    expected = run_ranks(1, three_sft_steps, ONE, True)[0]
    assert expected[0][0]["policy/mtp_loss"] == pytest.approx(np.log(320), rel=0.2), "an untrained layer guesses"
    found = run_ranks(ranks, three_sft_steps, parallel, True)[0]
    assert_same(found, expected, padding=PADDING.get(parallel.context_parallel_size, 0.05))


def weights_before_and_after(train_mtp: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    with Run(ONE, train_mtp=train_mtp) as run:
        before = run.weights()
        run.sft_step(0)
        return before, run.weights()


@pytest.mark.parametrize("train_mtp", [True, False])
def test_only_training_it_moves_the_mtp_layer(train_mtp: bool):
    before, after = run_ranks(1, weights_before_and_after, train_mtp)[0]
    own = [name for name in before if name.startswith("model.layers.4.") and "embed_tokens" not in name and "shared_head.head" not in name]
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert own
    assert not [name for name in own if (name in moved) != train_mtp and "e_score" not in name and ".experts." not in name]
    assert "model.layers.0.self_attn.o_proj.weight" in moved


def old_logprobs_then_train(parallel: Parallel) -> dict[str, float]:
    with Run(parallel) as run:
        batches = run.batches(sequences(24, seed=0), chunk_tokens=128)
        run.policy.attach_logprobs(batches, "old", temperature=TEMPERATURE)
        loss = partial(grpo.loss, options=replace(GRPO, kl_coefficient=0.0, old_logprobs="trainer"))
        return run.policy.train_step(batches, loss, temperature=TEMPERATURE)


@pytest.mark.parametrize("name", ["DP2", "VPP2"])
def test_the_first_minibatch_is_on_policy(name: str):
    ranks, parallel, _ = LAYOUTS[name]
    metrics = run_ranks(ranks, old_logprobs_then_train, parallel)[0]
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["policy/clip_share"] == 0.0


def reference_and_policy(parallel: Parallel) -> tuple[list[bool], list[int | None]]:
    """Whether: the reference starts as the policy; it stays behind; the policy is itself again; a refresh catches up."""
    import torch

    with Run(parallel, lr=1e-2) as run:
        steps = [run.policy.reference_step]
        run.policy.refresh_reference()
        batches = run.batches(sequences(24, seed=0), chunk_tokens=128)

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            run.policy.attach_logprobs(batches, "old")
            run.policy.attach_logprobs(batches, "ref")
            return torch.cat([b.old_logprobs_T for b in batches]), torch.cat([b.ref_logprobs_T for b in batches])

        old, first = both()
        run.sft_step(0)
        weights = run.weights()
        new, second = both()
        steps.append(run.policy.reference_step)
        unchanged = all(np.array_equal(weights[name], value) for name, value in run.weights().items())
        run.policy.refresh_reference()
        steps.append(run.policy.reference_step)
        third = both()[1]
        stays = torch.equal(first, second) and not torch.equal(new, second)
        return [torch.equal(old, first), stays, unchanged, torch.equal(third, new)], steps


@pytest.mark.parametrize("name", ["EP2", "PP2"])
def test_the_reference_stays_as_it_was_taken_and_leaves_the_policy_alone(name: str):
    ranks, parallel, _ = LAYOUTS[name]
    for truths, steps in run_ranks(ranks, reference_and_policy, parallel):
        assert truths == [True] * 4
        assert steps == [None, 0, 1]


def with_an_empty_microbatch(parallel: Parallel) -> list[dict[str, float]]:
    found = []
    for extra in ([], pack([], [[]], multiple=2)):
        with Run(parallel) as run:
            batches = run.batches(sequences(8, seed=0)) + extra
            run.policy.attach_logprobs(batches, "old")
            found.append(run.policy.train_step(batches, sft.loss))
    return found


@pytest.mark.parametrize(("ranks", "parallel"), [(1, ONE), LAYOUTS["TP2"][:2], LAYOUTS["PP2"][:2]])
def test_a_microbatch_without_sequences_changes_nothing(ranks: int, parallel: Parallel):
    without, extra = run_ranks(ranks, with_an_empty_microbatch, parallel)[0]
    assert without_load(extra) == pytest.approx(without_load(without), rel=1e-6)


def router_bias(rate: float) -> tuple[dict[str, float], np.ndarray]:
    with Run(Parallel(expert_model_parallel_size=2), router_bias_update_rate=rate) as run:
        run.sft_step(0)
        metrics = run.sft_step(1)
        return metrics, run.weights()["model.layers.2.mlp.gate.e_score_correction_bias"]


def test_the_router_bias_moves_by_its_rate_and_by_default_not_at_all():
    (metrics, bias), (_, other) = run_ranks(2, router_bias, 0.01)
    assert np.array_equal(bias, other)
    assert set(np.round(np.abs(bias), 6)) <= {0.0, np.float32(0.01), np.float32(0.02)} and bias.any()
    assert metrics["moe/bias_range/2"] == pytest.approx(0.02), "of the forward: after one update"
    assert all(1.0 <= metrics[f"moe/load_max_over_mean/{layer}"] <= 8.0 for layer in (1, 2, 3))
    assert not run_ranks(2, router_bias, 0.0)[0][1].any()


def broken_loss(logprobs_T: Any, entropy_T: Any, batch: Any) -> LossOutput:
    return LossOutput(logprobs_T.sum() * float("nan"), 1)


def a_broken_step() -> str:
    with Run(ONE) as run:
        try:
            run.policy.train_step(run.batches(sequences(4, seed=0)), broken_loss)
        except FloatingPointError as error:
            return str(error)
    return "no error"


def test_a_gradient_that_is_not_finite_ends_the_run():
    assert "optimizer step 1: the gradient's norm is nan" in run_ranks(1, a_broken_step)[0]


def learning_rates(**training: Any) -> list[float]:
    with Run(ONE, **training) as run:
        return [run.sft_step(number)["policy/lr"] for number in range(4)]


def constant_rates() -> list[float]:
    return learning_rates(lr=1.0, lr_warmup_steps=2)


def linear_rates() -> list[float]:
    return learning_rates(lr=1.0, min_lr=0.5, lr_warmup_steps=0, lr_decay_style="linear", lr_decay_steps=4)


def test_the_learning_rate_warms_up_from_the_first_step_and_decays():
    assert run_ranks(1, constant_rates)[0] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert run_ranks(1, linear_rates)[0] == pytest.approx([1.0, 0.875, 0.75, 0.625])
