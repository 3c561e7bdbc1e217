"""Every algorithm and option against its paper's equation in float64: values and gradients in closed form, without autograd."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_r1 import plugins
from megatron_r1.algorithms import cispo, dapo, dr_grpo, grpo, gspo
from megatron_r1.packing import TokenSequence, pack, plan
from megatron_r1.policy_loss import kl
from megatron_r1.types import LossOutput, Microbatch


@dataclass
class Output:
    """One completion: its advantage and, for each learned token, log-probs that float32 represents."""

    advantage: float
    policy: list[float]
    old: list[float]
    ref: list[float]
    sampler: list[float]
    learned: list[int]  # of the whole sequence; several spans, as after a tool's answer

    def __len__(self) -> int:
        return len(self.policy)


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def make_outputs(seed: int, count: int = 24) -> list[Output]:
    """Ragged outputs; samplers from all but equal to far off, and now and then a token whose ratio is above R1's 11."""
    rng = random.Random(seed)
    outputs = []
    for i in range(count):
        learned = [0] * rng.randint(1, 4)
        for _ in range(rng.randint(1, 3)):
            learned += [1] * rng.randint(1, 6) + [0] * rng.randint(0, 2)
        policy = [float32(-rng.random() * 3) for _ in range(sum(learned))]
        stale, drift = rng.choice(((0.002, 0.0), (0.05, 0.05), (0.4, 0.0), (0.4, 0.3)))
        old = [float32(p + rng.gauss(drift, stale) - (2.7 if rng.random() < 0.08 else 0.0)) for p in policy]
        ref = [float32(p + rng.gauss(0, 0.4)) for p in policy]
        gap = (0.0003, 0.02, 0.7)[i % 3]
        sampler = [float32(o + rng.gauss(0, gap)) for o in old]
        outputs.append(Output(float32(rng.gauss(0, 1)), policy, old, ref, sampler, learned))
    return outputs


# --- the reference: a term is its values at the n tokens of an output, and their derivatives by the n log-probs ---

Term = tuple[list[float], list[list[float]]]


def diagonal(pairs: list[tuple[float, float]]) -> Term:
    """A term whose value at a token depends on that token's log-prob alone, from (value, derivative)."""
    n = len(pairs)
    return [v for v, _ in pairs], [[pairs[t][1] if t == u else 0.0 for u in range(n)] for t in range(n)]


def clipped(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """min(ratio A, clip(ratio) A) and its derivative by the ratio."""
    if (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low):
        return (high if ratio > high else low) * advantage, 0.0
    return ratio * advantage, advantage


def ppo(low: float, high: float, *, dual: float = math.inf, old: str = "old") -> Callable[[Output], Term]:
    def term(o: Output) -> Term:
        pairs = []
        for p, q in zip(o.policy, getattr(o, old)):
            ratio = math.exp(p - q)
            value, slope = clipped(ratio, o.advantage, low, high)
            if o.advantage < 0 and ratio > dual:
                value, slope = dual * o.advantage, 0.0
            pairs.append((value, slope * ratio))
        return diagonal(pairs)

    return term


def gspo_gain(o: Output) -> Term:
    n = len(o)
    s = math.exp((sum(o.policy) - sum(o.old)) / n)
    value, slope = clipped(s, o.advantage, 1 - 3e-4, 1 + 4e-4)
    return [value] * n, [[slope * s / n] * n for _ in range(n)]


def cispo_gain(low: float, high: float) -> Callable[[Output], Term]:
    def term(o: Output) -> Term:
        weights = [min(max(math.exp(p - q), low), high) for p, q in zip(o.policy, o.old)]
        return diagonal([(w * o.advantage * p, w * o.advantage) for w, p in zip(weights, o.policy)])

    return term


def k1(o: Output) -> Term:
    return diagonal([(p - r, 1.0) for p, r in zip(o.policy, o.ref)])


def k2(o: Output) -> Term:
    return diagonal([((p - r) ** 2 / 2, p - r) for p, r in zip(o.policy, o.ref)])


def k3(o: Output) -> Term:
    return diagonal([(math.exp(r - p) - (r - p) - 1, 1 - math.exp(r - p)) for p, r in zip(o.policy, o.ref)])


def k3_unbiased(o: Output, old: str = "old") -> Term:
    """r (e^d - d - 1); its derivative is r (e^d - d - 1) + r (1 - e^d) = r (log policy - log ref)."""
    pairs = []
    for p, r, q in zip(o.policy, o.ref, getattr(o, old)):
        ratio = math.exp(p - q)
        pairs.append((ratio * (math.exp(r - p) - (r - p) - 1), ratio * (p - r)))
    return diagonal(pairs)


def k3_unbiased_of_sampler(o: Output) -> Term:
    return k3_unbiased(o, old="sampler")


def k3_unbiased_of_outputs(o: Output) -> Term:
    n, d, ratio = len(o), sum(o.ref) - sum(o.policy), math.exp(sum(o.policy) - sum(o.old))
    return [ratio * (math.exp(d) - d - 1)] * n, [[-ratio * d] * n for _ in range(n)]


def whole_output_ppo(o: Output) -> Term:
    n, ratio = len(o), math.exp(sum(o.policy) - sum(o.old))
    value, slope = clipped(ratio, o.advantage, -9.0, 11.0)
    return [value] * n, [[slope * ratio] * n for _ in range(n)]


def gaps(o: Output) -> list[float]:
    """w_t = old / sampler."""
    return [math.exp(a - b) for a, b in zip(o.old, o.sampler)]


def tis(cap: float = 2.0) -> Callable[[Output], list[float]]:
    return lambda o: [min(w, cap) for w in gaps(o)]


def mis_sequence(o: Output) -> list[float]:
    product = math.prod(gaps(o))
    return [product if product <= 2.0 else 0.0] * len(o)


def mis_geometric(o: Output) -> list[float]:
    mean = math.prod(gaps(o)) ** (1 / len(o))
    return [1.0 if 0.999 <= mean <= 1.001 else 0.0] * len(o)


def icepop(low: float = 0.5, high: float = 5.0) -> Callable[[Output], list[float]]:
    return lambda o: [w if low <= w <= high else 0.0 for w in gaps(o)]


def opsm(delta: float) -> Callable[[Output], list[float]]:
    def weights(o: Output) -> list[float]:
        drift = sum(s - p for s, p in zip(o.sampler, o.policy)) / len(o)
        return [0.0 if o.advantage < 0 and drift > delta else 1.0] * len(o)

    return weights


def both(first: Callable[[Output], list[float]], second: Callable[[Output], list[float]]) -> Callable[[Output], list[float]]:
    return lambda o: [a * b for a, b in zip(first(o), second(o))]


@dataclass
class Equation:
    """J = sum_i share_i sum_t [ weight_t gain_t - beta kl_t ]."""

    gain: Callable[[Output], Term]
    share: str = "1/(S |o|)"
    kl: Callable[[Output], Term] | None = None
    beta: float = 0.0
    weights: Callable[[Output], list[float]] = lambda o: [1.0] * len(o)

    def loss(self, outputs: list[Output]) -> tuple[float, list[float]]:
        """-J, and its gradient by the policy's log-probs in the outputs' order."""
        total, gradient = 0.0, []
        for o in outputs:
            n, size = len(o), len(outputs)
            share = {"1/(S |o|)": 1 / (size * n), "1/sum |o|": 1 / sum(map(len, outputs)), "1/(S L)": 1 / (size * 50)}[self.share]
            weights, (gain, gain_by) = self.weights(o), self.gain(o)
            kl, kl_by = self.kl(o) if self.kl else ([0.0] * n, [[0.0] * n for _ in range(n)])
            total -= share * sum(w * g - self.beta * k for w, g, k in zip(weights, gain, kl))
            gradient += [-share * sum(weights[t] * gain_by[t][u] - self.beta * kl_by[t][u] for t in range(n)) for u in range(n)]
        return total, gradient


R1 = ppo(1 - 10, 1 + 10)
R1_LOSS = -1.2278195615650846  # equations 1-3 in float64 on make_outputs(0)
R1_KL = {"kl": k3, "beta": 0.001}
TOKENS = "1/sum |o|"
V32 = {"std": "off", "kl_estimator": "k3_unbiased", "kl_coefficient": 0.05, "old_logprobs": "sampler", "off_policy_delta": 0.01}

CASES: dict[str, tuple[Any, dict[str, Any], Equation]] = {
    "R1": (grpo, {}, Equation(R1, **R1_KL)),
    "dual clip": (grpo, {"dual_clip": 3.0, "kl_coefficient": 0.0}, Equation(ppo(-9, 11, dual=3.0))),
    "dual clip below the upper clip": (grpo, {"clip_epsilon": 0.2, "dual_clip": 1.1}, Equation(ppo(0.8, 1.2, dual=1.1), **R1_KL)),
    "DAPO": (dapo, {}, Equation(ppo(0.8, 1.28), TOKENS)),
    "Dr. GRPO": (dr_grpo, {"constant_tokens": 50}, Equation(ppo(0.8, 1.2), "1/(S L)")),
    "GSPO": (gspo, {}, Equation(gspo_gain)),
    "GSPO with KL": (gspo, {"kl_coefficient": 0.1}, Equation(gspo_gain, kl=k3, beta=0.1)),
    "CISPO": (cispo, {}, Equation(cispo_gain(0.0, 5.0), TOKENS)),
    "CISPO with a lower limit": (cispo, {"clip_epsilon_low": 0.3, "clip_epsilon_high": 0.2}, Equation(cispo_gain(0.7, 1.2), TOKENS)),
    "k1": (grpo, {"kl_estimator": "k1", "kl_coefficient": 0.2}, Equation(R1, kl=k1, beta=0.2)),
    "k2": (grpo, {"kl_estimator": "k2", "kl_coefficient": 0.2}, Equation(R1, kl=k2, beta=0.2)),
    "k3": (grpo, {"kl_coefficient": 0.2}, Equation(R1, kl=k3, beta=0.2)),
    "k3 unbiased": (grpo, {"kl_estimator": "k3_unbiased", "kl_coefficient": 0.2}, Equation(R1, kl=k3_unbiased, beta=0.2)),
    "k3 unbiased of outputs": (
        grpo,
        {"kl_estimator": "k3_unbiased", "kl_coefficient": 0.2, "ratio": "sequence"},
        Equation(whole_output_ppo, kl=k3_unbiased_of_outputs, beta=0.2),
    ),
    "TIS": (grpo, {"correction": "tis"}, Equation(R1, weights=tis(), **R1_KL)),
    "TIS with another cap": (grpo, {"correction": "tis", "correction_high": 1.1}, Equation(R1, weights=tis(1.1), **R1_KL)),
    "MIS of sequences": (grpo, {"correction": "mis_sequence"}, Equation(R1, weights=mis_sequence, **R1_KL)),
    "MIS, geometric": (grpo, {"correction": "mis_geometric"}, Equation(R1, weights=mis_geometric, **R1_KL)),
    "IcePop": (grpo, {"correction": "icepop"}, Equation(R1, weights=icepop(), **R1_KL)),
    "IcePop, narrower": (
        grpo,
        {"correction": "icepop", "correction_low": 0.9, "correction_high": 1.2},
        Equation(R1, weights=icepop(0.9, 1.2), **R1_KL),
    ),
    "off-policy sequence masking": (grpo, {"off_policy_delta": 0.01}, Equation(R1, weights=opsm(0.01), **R1_KL)),
    "V3.2": (grpo, V32, Equation(ppo(-9, 11, old="sampler"), kl=k3_unbiased_of_sampler, beta=0.05, weights=opsm(0.01))),
    "DAPO with TIS and masking": (
        dapo,
        {"correction": "tis", "off_policy_delta": 1e-4},
        Equation(ppo(0.8, 1.28), TOKENS, weights=both(tis(), opsm(1e-4))),
    ),
    "GSPO with IcePop": (gspo, {"correction": "icepop"}, Equation(gspo_gain, weights=icepop())),
    "CISPO with MIS": (cispo, {"correction": "mis_sequence"}, Equation(cispo_gain(0.0, 5.0), TOKENS, weights=mis_sequence)),
}


class Step:
    """One optimizer step's loss by the module under test."""

    def __init__(self, outputs: list[Output]) -> None:
        rng = random.Random(7)
        self.outputs = outputs
        self.sequences = [
            TokenSequence(
                ids=[rng.randrange(50) for _ in o.learned],
                learned=o.learned,
                advantage=o.advantage,
                sampler_logprobs=[next(sampler) if flag else 0.0 for flag in o.learned],
            )
            for o, sampler in ((o, iter(o.sampler)) for o in outputs)
        ]

    def scatter(self, batch: Microbatch, name: str) -> torch.Tensor:
        """The values at the positions that predict them, and elsewhere what a loss must not touch."""
        values_T = torch.full_like(batch.loss_mask_T, -math.inf)
        values_T[batch.loss_mask_T > 0] = torch.tensor([v for i in batch.indices for v in getattr(self.outputs[i], name)])
        return values_T

    def run(self, module: Any, options: Any, chunks: list[list[int]], **padding: int) -> tuple[float, list[float], list[LossOutput]]:
        gradients: dict[int, list[float]] = {}
        found = []
        for batch in pack(self.sequences, chunks, **padding):
            logprobs_T = self.scatter(batch, "policy").requires_grad_()
            batch.old_logprobs_T, batch.ref_logprobs_T = self.scatter(batch, "old"), self.scatter(batch, "ref")
            output = module.loss(logprobs_T, torch.ones_like(batch.loss_mask_T), batch, options=options)
            output.loss_sum.backward()
            found.append(output)
            assert (logprobs_T.grad[batch.loss_mask_T == 0] == 0).all()
            for n, index in enumerate(batch.indices):
                gradients[index] = logprobs_T.grad[(batch.sequence_T == n) & (batch.loss_mask_T > 0)].tolist()
        count = sum(o.count for o in found)
        loss = sum(float(o.loss_sum.detach()) for o in found) / count
        return loss, [g / count for i in sorted(gradients) for g in gradients[i]], found

    def metrics(self, module: Any, options: Any) -> dict[str, float]:
        _, _, [output] = self.run(module, options, [list(range(len(self.outputs)))], multiple=32)
        return {name: value / weight for name, (value, weight) in output.sums.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_paper_in_float64_however_packed(case: str, seed: int):
    module, values, equation = CASES[case]
    options = plugins.options(module.Options, values, where="algorithm.options")
    step = Step(make_outputs(seed))
    expected, expected_gradient = equation.loss(step.outputs)
    every = list(range(len(step.outputs)))
    packed = [c for chunks in plan([len(s.ids) for s in step.sequences], chunk_tokens=40, num_groups=2) for c in chunks]
    for chunks, padding in (([every], {"multiple": 16}), ([[i] for i in every], {"pad_to": 32}), ([*packed, []], {})):
        loss, gradient, _ = step.run(module, options, chunks, **padding)
        assert loss == pytest.approx(expected, abs=1e-6, rel=1e-6)
        assert gradient == pytest.approx(expected_gradient, abs=1e-6, rel=1e-6)


def test_every_case_is_another_equation():
    outputs = make_outputs(0)
    gradients = {name: equation.loss(outputs)[1] for name, (_, _, equation) in CASES.items()}
    names = list(gradients)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert max(abs(a - b) for a, b in zip(gradients[one], gradients[other])) > 1e-5, (one, other)


def test_the_defaults_are_r1s_and_nothing_later_is_on():
    assert dataclasses.asdict(grpo.Options()) == {
        "kl_coefficient": 0.001,
        "kl_estimator": "k3",
        "ratio": "token",
        "aggregation": "sequence_mean",
        "constant_tokens": None,
        "std": "population",
        "std_epsilon": 1e-6,
        "old_logprobs": "trainer",
        "correction": "none",
        "correction_low": None,
        "correction_high": None,
        "off_policy_delta": None,
        "clip_epsilon": 10.0,
        "clip_epsilon_low": None,
        "clip_epsilon_high": None,
        "dual_clip": None,
    }


def test_by_default_the_loss_is_the_papers_number_and_no_bit_of_it_depends_on_the_sampler():
    step = Step(make_outputs(0))
    assert CASES["R1"][2].loss(step.outputs)[0] == pytest.approx(R1_LOSS, rel=1e-12)
    chunks = [list(range(len(step.outputs)))]
    loss, gradient, _ = step.run(grpo, grpo.Options(), chunks)
    assert loss == pytest.approx(R1_LOSS, abs=1e-6)
    moved = Step([dataclasses.replace(o, sampler=[s - 1.0 for s in o.sampler]) for o in step.outputs])
    assert moved.run(grpo, grpo.Options(), chunks)[:2] == (loss, gradient)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (dapo, {"clip_range": (0.8, 1.28), "kl_coefficient": 0.0, "aggregation": "token_mean", "ratio": "token", "std": "population"}),
        (gspo, {"clip_range": (1 - 3e-4, 1 + 4e-4), "kl_coefficient": 0.0, "aggregation": "sequence_mean", "ratio": "geometric"}),
        (cispo, {"clip_range": (0.0, 5.0), "kl_coefficient": 0.0, "aggregation": "token_mean", "std": "population"}),
    ],
)
def test_an_algorithm_has_its_papers_values(module, expected):
    options = module.Options()
    assert {name: getattr(options, name) for name in expected} == expected


def test_every_algorithm_of_the_folder_has_what_the_stage_calls():
    names = [name for name in plugins.names("algorithms") if name not in ("sft", "reward_model")]
    assert {"cispo", "dapo", "dr_grpo", "grpo", "gspo"} <= set(names)
    for name in names:
        module = plugins.load("algorithms", name)
        assert {"Options", "advantages", "loss"} <= set(dir(module))


@pytest.mark.parametrize(
    ("correction", "weigh"), [("tis", tis()), ("mis_sequence", mis_sequence), ("mis_geometric", mis_geometric), ("icepop", icepop())]
)
def test_a_correction_logs_its_mean_weight_and_the_share_it_masks(correction: str, weigh: Callable[[Output], list[float]]):
    step = Step(make_outputs(1))
    weights = [w for o in step.outputs for w in weigh(o)]
    found = step.metrics(grpo, grpo.Options(correction=correction))
    assert found["policy/correction_weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    assert found["policy/correction_masked"] == pytest.approx(sum(w == 0 for w in weights) / len(weights), rel=1e-5)
    assert (found["policy/correction_masked"] > 0) == (correction != "tis")
    assert found["policy/correction_masked"] < 1


def test_off_policy_masking_logs_its_share_and_spares_positive_advantages():
    step = Step(make_outputs(2))
    masked = [w == 0 for o in step.outputs for w in opsm(0.01)(o)]
    found = step.metrics(grpo, grpo.Options(off_policy_delta=0.01))
    assert found["policy/off_policy_masked"] == pytest.approx(sum(masked) / len(masked), rel=1e-5)
    assert 0 < sum(masked) < len(masked)
    positive = Step([dataclasses.replace(o, advantage=abs(o.advantage)) for o in step.outputs])
    assert positive.metrics(grpo, grpo.Options(off_policy_delta=0.0))["policy/off_policy_masked"] == 0.0


def test_what_is_off_is_not_logged():
    names = set(Step(make_outputs(1)).metrics(grpo, grpo.Options()))
    assert names == {"policy/loss", "policy/kl", "policy/entropy", "policy/ratio", "policy/clip_share", "sync/logprob_gap"}


@pytest.mark.parametrize(
    ("module", "values", "is_clipped"),
    [
        (grpo, {"dual_clip": 3.0}, lambda ratio, a: (a > 0 and ratio > 11) or (a < 0 and ratio > 3)),
        (dapo, {}, lambda ratio, a: (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)),
        (cispo, {"clip_epsilon_high": 0.2, "clip_epsilon_low": 0.2}, lambda ratio, a: not 0.8 <= ratio <= 1.2),
    ],
)
def test_clip_share_counts_what_the_algorithm_clips(module, values, is_clipped):
    step = Step(make_outputs(3))
    flags = [is_clipped(math.exp(p - q), o.advantage) for o in step.outputs for p, q in zip(o.policy, o.old)]
    assert 0 < sum(flags) < len(flags)
    assert step.metrics(module, module.Options(**values))["policy/clip_share"] == pytest.approx(sum(flags) / len(flags), rel=1e-5)


def test_cispo_lets_every_token_learn_where_dapo_drops_some():
    step = Step(make_outputs(4))
    chunks = [list(range(len(step.outputs)))]
    assert 0.0 in step.run(dapo, dapo.Options(), chunks)[1]
    assert 0.0 not in step.run(cispo, cispo.Options(), chunks)[1]


def one_token_outputs(policy_V: torch.Tensor, ref_V: torch.Tensor, old_V: torch.Tensor) -> Microbatch:
    """An output of one token for each entry of the vocabulary."""
    size = len(policy_V)
    [batch] = pack([TokenSequence(ids=[0, v], learned=[0, 1]) for v in range(size)], [list(range(size))])
    for name, values_V in (("old_logprobs_T", old_V), ("ref_logprobs_T", ref_V)):
        setattr(batch, name, torch.zeros(2 * size, dtype=torch.float64).index_copy(0, torch.arange(0, 2 * size, 2), values_V))
    return batch


def expected_gradient(estimator: str, logits_V: torch.Tensor, ref_V: torch.Tensor, old_V: torch.Tensor) -> torch.Tensor:
    """The mean over tokens that old samples of the gradient of an estimate, by the policy's logits."""
    logits_V = logits_V.clone().requires_grad_()
    policy_V = logits_V.log_softmax(0)
    batch = one_token_outputs(policy_V, ref_V, old_V)
    logprobs_T = torch.zeros(2 * len(policy_V), dtype=torch.float64).index_copy(0, torch.arange(0, 2 * len(policy_V), 2), policy_V)
    estimate_V = kl.penalty(logprobs_T, batch, options=grpo.Options(kl_estimator=estimator))[::2]
    (old_V.exp() * estimate_V).sum().backward()
    return logits_V.grad


def test_only_v32s_kl_has_the_gradient_of_the_divergence_on_samples_of_an_older_policy():
    generator = torch.Generator().manual_seed(0)
    logits_V, ref_V, old_V = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    ref_V, old_V = ref_V.log_softmax(0), old_V.log_softmax(0)
    exact_V = logits_V.clone().requires_grad_()
    policy_V = exact_V.log_softmax(0)
    (policy_V.exp() * (policy_V - ref_V)).sum().backward()
    torch.testing.assert_close(expected_gradient("k3_unbiased", logits_V, ref_V, old_V), exact_V.grad, atol=1e-12, rtol=1e-12)
    for estimator in ("k1", "k2", "k3"):
        assert (expected_gradient(estimator, logits_V, ref_V, old_V) - exact_V.grad).abs().max() > 0.05, estimator
    on_policy_V = logits_V.log_softmax(0)
    torch.testing.assert_close(expected_gradient("k2", logits_V, ref_V, on_policy_V), exact_V.grad, atol=1e-12, rtol=1e-12)
    assert expected_gradient("k1", logits_V, ref_V, on_policy_V).abs().max() < 1e-12
    forward_V = logits_V.clone().requires_grad_()
    (ref_V.exp() * (ref_V - forward_V.log_softmax(0))).sum().backward()
    torch.testing.assert_close(expected_gradient("k3", logits_V, ref_V, on_policy_V), forward_V.grad, atol=1e-12, rtol=1e-12)


def test_advantages_without_std_are_the_rewards_less_their_mean():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0], [0.1] * 5, [1.0, math.nan, 0.0, math.nan, 0.5]])
    found = dr_grpo.advantages(rewards, options=dr_grpo.Options(constant_tokens=1)).tolist()
    assert found[0] == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4], rel=1e-6)
    assert found[1] == [0.0] * 5
    assert found[2] == pytest.approx([0.5, 0.0, -0.5, 0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize(
    ("module", "values", "words"),
    [
        (grpo, {"dual_clip": 1.0}, ("dual_clip = 1.0", "above 1")),
        (grpo, {"aggregation": "constant"}, ("constant_tokens = None", "sampling.max_tokens")),
        (grpo, {"constant_tokens": 8}, ("constant_tokens = 8", "only there")),
        (dr_grpo, {"constant_tokens": 0}, ("constant_tokens = 0",)),
        (grpo, {"correction_low": 0.5}, ("correction_low = 0.5", "no effect")),
        (dapo, {"correction": "icepop", "correction_high": 0.4}, ("correction_low = 0.5", "correction_high = 0.4", "swap")),
        (gspo, {"correction": "tis", "old_logprobs": "sampler"}, ("correction = 'tis'", "old_logprobs", "trainer")),
        (cispo, {"kl_estimator": "k4"}, ("kl_estimator", "k4", "k3")),
        (grpo, {"off_policy_delta": -0.1}, ("off_policy_delta = -0.1", "not negative")),
        (cispo, {"clip_epsilon": 0.2}, ("clip_epsilon", "clip_epsilon_")),
    ],
)
def test_a_wrong_option_gets_one_line_with_its_name_and_the_fix(module, values, words):
    with pytest.raises(ValueError) as error:
        plugins.options(module.Options, values, where="algorithm.options")
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
