"""Group relative policy optimization as DeepSeek-R1 uses it (Nature 645, equations 1-3; arXiv 2501.12948v2).

    J = 1/S sum_i 1/|o_i| sum_t [ min(ratio A, clip(ratio, 1 - low, 1 + high) A) - beta (exp(d) - d - 1) ]
    ratio = policy / old,  d = log reference - log policy,  A = (r - mean) / (std + epsilon) over the group's rewards

The print is ambiguous in places: every reading is a named option, with its source beside it.
Shapes: P problems, G completions a problem, T packed tokens, N sequences in a pack, S sequences in the optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_r1.types import LossOutput, Microbatch

# exp(20) is 5e8: past it a ratio says only "broken"; unclamped it overflows float32 and one token turns the step into NaN.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Options:
    """The paper's hyper-parameters and one option for each thing it leaves open; the defaults are R1's."""

    # Nature: 10 for R1's first RL stage ("lower truncates gradients of many tokens"), unstated for R1-Zero. 1 - 10 < 0, so
    # only ratios above 11 with a positive advantage are ever clipped; there is no dual clip for negative ones in the paper.
    clip_epsilon: float = 10.0
    clip_epsilon_low: float | None = None  # None: clip_epsilon (the paper has one epsilon)
    clip_epsilon_high: float | None = None  # None: clip_epsilon
    kl_coefficient: float = 0.001  # beta; Nature. The KL term is in the loss, not in the reward
    # "token": DeepSeekMath (arXiv 2402.03300), which R1 cites, and R1's text speaks of clipping tokens.
    # "sequence": equations 1 and 2 as printed, ratio and KL of whole outputs.
    ratio: Literal["token", "sequence"] = "token"
    # "sequence_mean": each output's mean over its tokens, then the mean over outputs (1/G sum_i 1/|o_i| sum_t, DeepSeekMath).
    # "token_mean": the mean over all tokens of the optimizer step (DAPO, arXiv 2503.14476).
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    # The paper writes std without saying which: "population" divides by G, "sample" by G - 1 (verl's torch.std).
    std: Literal["population", "sample"] = "population"
    std_epsilon: float = 1e-6  # not in the paper; verl's value
    # "trainer": pi_old recomputed by the trainer before the first minibatch. "sampler": the rollout engine's own
    # log-probs, which saves a forward and corrects for the engines' difference (verl's bypass mode).
    old_logprobs: Literal["trainer", "sampler"] = "trainer"

    def __post_init__(self) -> None:
        choices = {
            "ratio": ("token", "sequence"),
            "aggregation": ("sequence_mean", "token_mean"),
            "std": ("population", "sample"),
            "old_logprobs": ("trainer", "sampler"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("clip_epsilon", "clip_epsilon_low", "clip_epsilon_high", "kl_coefficient", "std_epsilon"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} = {value}: use a number that is not negative")

    @property
    def clip_range(self) -> tuple[float, float]:
        """Lower and upper limit of the ratio."""
        low = self.clip_epsilon if self.clip_epsilon_low is None else self.clip_epsilon_low
        high = self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high
        return 1 - low, 1 + high


def advantages(rewards_PG: torch.Tensor, *, options: Options) -> torch.Tensor:
    """Rewards normalised within each group, float32 [P, G]; a group of equal rewards gets zeros.

    NaN marks a completion whose verifier failed: it is left out of its group's mean and std and gets advantage 0.
    Rewards are normalised in float64, so that 16 equal rewards of 0.1 do not differ by rounding.
    """
    scored_PG = ~rewards_PG.isnan()
    rewards_PG = rewards_PG.double().nan_to_num(0.0)
    count_P1 = scored_PG.sum(dim=1, keepdim=True).clamp(min=1)
    centred_PG = (rewards_PG - rewards_PG.sum(dim=1, keepdim=True) / count_P1) * scored_PG
    degrees_P1 = (count_P1 - int(options.std == "sample")).clamp(min=1)
    std_P1 = (centred_PG.square().sum(dim=1, keepdim=True) / degrees_P1).sqrt()
    # Rounding of the mean leaves 1e-17 in a group of equal rewards; dividing it by the tiny std would make noise a signal.
    equal_P1 = std_P1 <= 1e-9 * rewards_PG.abs().amax(dim=1, keepdim=True)
    return torch.where(equal_P1, 0.0, centred_PG / (std_P1 + options.std_epsilon)).float()


def sum_by_sequence(values_T: torch.Tensor, batch: Microbatch) -> torch.Tensor:
    """Sums over each sequence, [N + 1]; the last row is the padding's."""
    sums = torch.zeros(batch.num_sequences + 1, dtype=values_T.dtype, device=values_T.device)
    return sums.index_add(0, batch.sequence_T, values_T)


def loss(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: Microbatch, *, options: Options) -> LossOutput:
    """The negated objective, summed over this microbatch; the optimizer step divides by the global count.

    logprobs_T  log-prob of labels_T under the policy at the sampling temperature, with grad
    entropy_T   entropy of the policy at each position; only a metric
    batch       with advantages_T, old_logprobs_T (or sampler_logprobs_T), and ref_logprobs_T unless kl_coefficient is 0
    The count is sequences for "sequence_mean" and learned tokens for "token_mean".
    """
    mask_T = batch.loss_mask_T
    old_T = batch.old_logprobs_T if options.old_logprobs == "trainer" else batch.sampler_logprobs_T
    assert old_T is not None, f"{options.old_logprobs=} is missing from the batch"
    assert batch.advantages_T is not None, f"{batch.advantages_T=}"
    logprobs_T = logprobs_T.float()
    ratio_T = _log_ratio(logprobs_T, old_T, batch=batch, options=options).exp()
    low, high = options.clip_range
    gain_T = torch.minimum(ratio_T * batch.advantages_T, ratio_T.clamp(low, high) * batch.advantages_T)
    kl_T = torch.zeros_like(gain_T)
    if options.kl_coefficient:
        assert batch.ref_logprobs_T is not None, f"{options.kl_coefficient=} needs reference log-probs"
        d_T = -_log_ratio(logprobs_T, batch.ref_logprobs_T, batch=batch, options=options)
        kl_T = torch.expm1(d_T) - d_T  # the paper's k3; expm1 keeps it exact near 0
    objective_T = (gain_T - options.kl_coefficient * kl_T) * mask_T
    tokens_N = sum_by_sequence(mask_T, batch)
    if options.aggregation == "sequence_mean":
        loss_sum, count = -(sum_by_sequence(objective_T, batch) / tokens_N.clamp(min=1)).sum(), batch.num_sequences
    else:
        loss_sum, count = -objective_T.sum(), int(tokens_N.sum())
    sums, maxima = _metrics(ratio_T.detach(), kl_T.detach(), entropy_T=entropy_T, batch=batch, options=options)
    sums["policy/loss"] = (float(loss_sum.detach()), float(count))
    return LossOutput(loss_sum, count, sums, maxima)


def _log_ratio(logprobs_T: torch.Tensor, other_T: torch.Tensor, *, batch: Microbatch, options: Options) -> torch.Tensor:
    """log(policy / other), 0 where nothing is learned; of whole outputs, at each of their positions, for ratio "sequence"."""
    # where and not a product: what stands at unlearned positions may be inf, and inf * 0 is NaN
    log_ratio_T = torch.where(batch.loss_mask_T > 0, logprobs_T - other_T, 0.0)
    if options.ratio == "sequence":
        log_ratio_T = sum_by_sequence(log_ratio_T, batch)[batch.sequence_T]
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@torch.no_grad()
def _metrics(
    ratio_T: torch.Tensor, kl_T: torch.Tensor, *, entropy_T: torch.Tensor, batch: Microbatch, options: Options
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Sums and maxima over this microbatch's learned tokens, read back from the device in one transfer."""
    learned_T = batch.loss_mask_T > 0
    positive_T, negative_T = learned_T & (batch.advantages_T > 0), learned_T & (batch.advantages_T < 0)
    low, high = options.clip_range
    clipped_T = (positive_T & (ratio_T > high)) | (negative_T & (ratio_T < low))
    names = ["policy/kl", "policy/entropy", "policy/ratio", "policy/clip_share"]
    values = [kl_T, entropy_T, ratio_T, clipped_T]
    maxima = {"policy/ratio_max_negative": ratio_T.where(negative_T, 0.0).max()}  # unbounded without a dual clip: watch its tail
    if batch.old_logprobs_T is not None and batch.sampler_logprobs_T is not None:
        gap_T = (batch.old_logprobs_T - batch.sampler_logprobs_T).abs()  # same weights, two engines
        names.append("sync/logprob_gap")
        values.append(gap_T)
        maxima["sync/logprob_gap_max"] = gap_T.where(learned_T, 0.0).max()
    sums = [value_T.float().where(learned_T, 0.0).sum() for value_T in values]
    numbers = torch.stack([*sums, *maxima.values(), learned_T.sum().float()]).tolist()
    tokens = numbers[-1]
    return {n: (v, tokens) for n, v in zip(names, numbers)}, dict(zip(maxima, numbers[len(names) :]))
