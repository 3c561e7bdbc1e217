"""GRPO and SFT losses against a float64 reference that follows the printed equations one sequence at a time."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from megatron_r1.algorithms import grpo, sft
from megatron_r1.packing import TokenSequence, pack, plan
from megatron_r1.types import LossOutput, Microbatch

OPTIONS = [
    grpo.Options(ratio=ratio, aggregation=aggregation, clip_epsilon=epsilon, kl_coefficient=beta)
    for ratio, aggregation, epsilon, beta in itertools.product(
        ("token", "sequence"), ("sequence_mean", "token_mean"), (10.0, 0.2), (0.0, 0.001, 0.5)
    )
] + [grpo.Options(clip_epsilon_low=0.1, clip_epsilon_high=0.3), grpo.Options(old_logprobs="sampler", clip_epsilon=0.2)]


class Rollout:
    """Sequences with random old, reference and sampler log-probs of their learned tokens, each a list of float64."""

    def __init__(self, seed: int = 0, count: int = 12):
        rng = random.Random(seed)
        self.sequences = []
        self.values = []  # per sequence: policy, old, ref log-probs of its learned tokens
        for _ in range(count):
            prompt, completion = rng.randint(1, 4), rng.randint(1, 7)
            policy = [-rng.random() * 3 for _ in range(completion)]
            old, ref, sampler = ([p + rng.gauss(0, 0.4) for p in policy] for _ in range(3))
            self.values.append((policy, old, ref, sampler))
            self.sequences.append(
                TokenSequence(
                    ids=[rng.randrange(50) for _ in range(prompt + completion)],
                    learned=[0] * prompt + [1] * completion,
                    advantage=rng.gauss(0, 1),
                    sampler_logprobs=[0.0] * prompt + sampler,
                )
            )

    def scatter(self, batch: Microbatch, which: int) -> torch.Tensor:
        """The values at the positions that predict them, garbage elsewhere, as a model would leave it."""
        values_T = torch.full((len(batch.tokens_T),), -7.0, dtype=torch.float32)
        values_T[batch.loss_mask_T > 0] = torch.tensor([v for i in batch.indices for v in self.values[i][which]])
        return values_T

    def run(self, chunks: list[list[int]], options: grpo.Options, **padding: int) -> tuple[float, list[float], list[LossOutput]]:
        """Loss over the whole step and its gradient by the policy's log-probs, in the sequences' order."""
        gradients: dict[int, list[float]] = {}
        outputs = []
        for batch in pack(self.sequences, chunks, **padding):
            logprobs_T = self.scatter(batch, 0).requires_grad_()
            batch.old_logprobs_T, batch.ref_logprobs_T = self.scatter(batch, 1), self.scatter(batch, 2)
            output = grpo.loss(logprobs_T, torch.ones_like(batch.loss_mask_T), batch, options=options)
            output.loss_sum.backward()
            outputs.append(output)
            assert (logprobs_T.grad[batch.loss_mask_T == 0] == 0).all()
            for n, index in enumerate(batch.indices):
                gradients[index] = logprobs_T.grad[(batch.sequence_T == n) & (batch.loss_mask_T > 0)].tolist()
        count = sum(o.count for o in outputs)
        loss = sum(float(o.loss_sum.detach()) for o in outputs) / count
        return loss, [g / count for i in sorted(gradients) for g in gradients[i]], outputs


def reference(rollout: Rollout, options: grpo.Options) -> tuple[float, list[float]]:
    """Equations 1 and 2 read aloud, float64, one sequence at a time; the gradient is autograd's over these few lines."""
    low = options.clip_epsilon if options.clip_epsilon_low is None else options.clip_epsilon_low
    high = options.clip_epsilon if options.clip_epsilon_high is None else options.clip_epsilon_high
    variables, per_sequence, tokens = [], [], 0
    for sequence, (policy, old, ref, sampler) in zip(rollout.sequences, rollout.values):
        lp = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in policy]
        old = sampler if options.old_logprobs == "sampler" else old
        variables += lp
        tokens += len(lp)
        terms = []
        for t in range(len(lp)):
            if options.ratio == "token":
                ratio, ref_over_policy = torch.exp(lp[t] - old[t]), torch.exp(ref[t] - lp[t])
            else:
                ratio, ref_over_policy = torch.exp(sum(lp) - sum(old)), torch.exp(sum(ref) - sum(lp))
            clipped = min(max(ratio, torch.tensor(1.0 - low)), torch.tensor(1.0 + high))
            gain = min(ratio * sequence.advantage, clipped * sequence.advantage)
            kl = ref_over_policy - torch.log(ref_over_policy) - 1
            terms.append(gain - options.kl_coefficient * kl)
        per_sequence.append(terms)
    if options.aggregation == "sequence_mean":
        objective = sum(sum(terms) / len(terms) for terms in per_sequence) / len(per_sequence)
    else:
        objective = sum(sum(terms) for terms in per_sequence) / tokens
    (-objective).backward()
    return -float(objective.detach()), [float(v.grad) for v in variables]


def one_chunk(rollout: Rollout) -> list[list[int]]:
    return [list(range(len(rollout.sequences)))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradient_equal_the_float64_reference(options: grpo.Options):
    rollout = Rollout()
    loss, gradient, _ = rollout.run(one_chunk(rollout), options, multiple=16)
    expected_loss, expected_gradient = reference(rollout, options)
    assert loss == pytest.approx(expected_loss, abs=1e-6, rel=1e-6)
    assert gradient == pytest.approx(expected_gradient, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_neither_packing_nor_microbatching_changes_loss_gradient_or_metrics(options: grpo.Options):
    rollout = Rollout(seed=1)
    loss, gradient, outputs = rollout.run(one_chunk(rollout), options)
    single = [[i] for i in range(len(rollout.sequences))]
    packed = [c for chunks in plan([len(s.ids) for s in rollout.sequences], chunk_tokens=24, num_groups=2) for c in chunks]
    for chunks, padding in ((single, {"pad_to": 16}), (packed, {"multiple": 8}), ([*packed, []], {})):
        other_loss, other_gradient, other_outputs = rollout.run(chunks, options, **padding)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert other_gradient == pytest.approx(gradient, abs=1e-6)
        assert sum(o.count for o in other_outputs) == sum(o.count for o in outputs)
        for name, (value, weight) in outputs[0].sums.items():
            assert sum(o.sums[name][1] for o in other_outputs) == weight
            assert sum(o.sums[name][0] for o in other_outputs) == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for name, value in outputs[0].maxima.items():
            assert max(o.maxima[name] for o in other_outputs) == pytest.approx(value, rel=1e-5), name


def test_metrics_are_those_of_the_learned_tokens():
    rollout = Rollout(seed=2)
    _, _, (output,) = rollout.run(one_chunk(rollout), grpo.Options(clip_epsilon=0.2), multiple=32)
    policy, old, ref, sampler = ([v for values in rollout.values for v in values[k]] for k in range(4))
    advantage = [s.advantage for s, values in zip(rollout.sequences, rollout.values) for _ in values[0]]
    ratio = [math.exp(p - o) for p, o in zip(policy, old)]
    n = len(policy)
    mean = {name: value / weight for name, (value, weight) in output.sums.items()}
    assert mean["policy/ratio"] == pytest.approx(sum(ratio) / n, rel=1e-5)
    assert mean["policy/kl"] == pytest.approx(sum(math.exp(r - p) - (r - p) - 1 for p, r in zip(policy, ref)) / n, rel=1e-5)
    assert mean["policy/entropy"] == 1.0
    assert mean["policy/clip_share"] == pytest.approx(sum((a > 0 and r > 1.2) or (a < 0 and r < 0.8) for a, r in zip(advantage, ratio)) / n)
    assert mean["sync/logprob_gap"] == pytest.approx(sum(abs(o - s) for o, s in zip(old, sampler)) / n, rel=1e-5)
    assert output.maxima["sync/logprob_gap_max"] == pytest.approx(max(abs(o - s) for o, s in zip(old, sampler)), rel=1e-5)
    assert output.maxima["policy/ratio_max_negative"] == pytest.approx(max(r for a, r in zip(advantage, ratio) if a < 0), rel=1e-5)


def test_a_negative_advantage_is_never_clipped_above_as_the_paper_has_no_dual_clip():
    rollout = Rollout(seed=3, count=1)
    policy, _, ref, sampler = rollout.values[0]
    rollout.values[0] = (policy, [p - math.log(50) for p in policy], ref, sampler)
    rollout.sequences[0] = replace(rollout.sequences[0], advantage=-1.0)
    loss, gradient, _ = rollout.run([[0]], grpo.Options(kl_coefficient=0.0))
    assert loss == pytest.approx(50, rel=1e-5)
    assert min(gradient) > 0


def test_absurd_logprobs_and_garbage_at_unlearned_positions_leave_loss_and_gradient_finite():
    (batch,) = pack(Rollout().sequences[:2], [[0, 1]], multiple=16)
    nowhere = batch.loss_mask_T == 0
    batch.old_logprobs_T = torch.full_like(batch.loss_mask_T, -500.0).masked_fill(nowhere, -math.inf)
    batch.ref_logprobs_T = torch.zeros_like(batch.loss_mask_T).masked_fill(nowhere, math.nan)
    for ratio in ("token", "sequence"):
        logprobs_T = torch.full_like(batch.loss_mask_T, -200.0).masked_fill(nowhere, -math.inf).requires_grad_()
        output = grpo.loss(logprobs_T, torch.zeros_like(logprobs_T), batch, options=grpo.Options(ratio=ratio))
        output.loss_sum.backward()
        assert output.loss_sum.isfinite()
        assert logprobs_T.grad.isfinite().all()
        assert all(math.isfinite(value) for value, _ in output.sums.values())


@pytest.mark.parametrize(("std", "deviation"), [("population", statistics.pstdev), ("sample", statistics.stdev)])
def test_advantages_are_rewards_normalised_in_their_group(std, deviation):
    rewards = [[1.5, 0.5, 0.0, 0.5], [0.1] * 4, [1.0, 0.0, 0.0, 0.0]]
    found = grpo.advantages(torch.tensor(rewards), options=grpo.Options(std=std)).tolist()
    for group, advantages in zip(rewards, found):
        spread = deviation(group)
        expected = [(r - statistics.mean(group)) / (spread + 1e-6) if len(set(group)) > 1 else 0.0 for r in group]
        assert advantages == pytest.approx(expected, rel=1e-6)
    assert found[1] == [0.0] * 4


def test_a_completion_whose_verifier_failed_leaves_its_group_untouched():
    nan = math.nan
    with_failures = grpo.advantages(torch.tensor([[1.0, nan, 0.0, 1.0, nan], [nan] * 5, [nan, 1.0, nan, nan, nan]]), options=grpo.Options())
    without = grpo.advantages(torch.tensor([[1.0, 0.0, 1.0]]), options=grpo.Options())
    assert with_failures[0, [0, 2, 3]].tolist() == without[0].tolist()
    assert with_failures[0, [1, 4]].tolist() == [0.0, 0.0]
    assert with_failures[1:].abs().sum() == 0


def test_options_refuse_what_is_not_a_choice():
    for wrong in ({"ratio": "word"}, {"aggregation": "sum"}, {"std": "none"}, {"clip_epsilon": -1.0}, {"kl_coefficient": math.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            grpo.Options(**wrong)


def test_sft_loss_is_the_mean_over_all_learned_tokens_however_packed():
    rollout = Rollout(seed=4)
    policy = [p for values in rollout.values for p in values[0]]
    for chunks in (one_chunk(rollout), [[i] for i in range(12)], [[3, 1, 0], [2], [4, 5, 6, 7, 8, 9, 10, 11]]):
        total, count = 0.0, 0
        for batch in pack(rollout.sequences, chunks, multiple=8):
            logprobs_T = rollout.scatter(batch, 0).requires_grad_()
            output = sft.loss(logprobs_T, torch.ones_like(logprobs_T), batch)
            output.loss_sum.backward()
            assert torch.equal(logprobs_T.grad, -batch.loss_mask_T)
            total, count = total + float(output.loss_sum.detach()), count + output.count
        assert count == len(policy)
        assert total / count == pytest.approx(-sum(policy) / count, rel=1e-6)
