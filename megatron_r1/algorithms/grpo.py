"""Group relative policy optimization as DeepSeek-R1 uses it (Nature 645, equations 1-3; arXiv 2501.12948v2).

    J = 1/S sum_i 1/|o_i| sum_t [ min(ratio A, clip(ratio, 1 - low, 1 + high) A) - beta (exp(d) - d - 1) ]
    ratio = policy / old,  d = log reference - log policy,  A = (r - mean) / (std + epsilon) over the group's rewards

The print is ambiguous in places: every reading is a named option, with its source beside it; so is what later papers add.
Shapes: P problems, G completions a problem, T packed tokens, N sequences in a pack, S sequences in the optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_r1.policy_loss.loss import from_gain, policy_ratio
from megatron_r1.policy_loss.options import PolicyLossOptions
from megatron_r1.types import LossOutput, Microbatch


@dataclass(frozen=True)
class Options(PolicyLossOptions):
    """The paper's hyper-parameters and one option for each thing it leaves open; the defaults are R1's."""

    # Nature: 10 for R1's first RL stage ("lower truncates gradients of many tokens"), unstated for R1-Zero. 1 - 10 < 0, so
    # only ratios above 11 with a positive advantage are ever clipped; there is no dual clip for negative ones in the paper.
    clip_epsilon: float = 10.0
    clip_epsilon_low: float | None = None  # None: clip_epsilon (the paper has one epsilon)
    clip_epsilon_high: float | None = None  # None: clip_epsilon
    # c > 1: with A < 0 the gain is at least c A, whatever the ratio (Ye et al., arXiv 1912.09729; c = 3). None: off
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip = {self.dual_clip}: use a number above 1 (the paper: 3)")

    @property
    def clip_range(self) -> tuple[float, float]:
        """Lower and upper limit of the ratio."""
        low = self.clip_epsilon if self.clip_epsilon_low is None else self.clip_epsilon_low
        high = self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high
        return 1 - low, 1 + high


def advantages(rewards_PG: torch.Tensor, *, options: PolicyLossOptions) -> torch.Tensor:
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
    scaled_PG = centred_PG if options.std == "off" else centred_PG / (std_P1 + options.std_epsilon)
    return torch.where(equal_P1, 0.0, scaled_PG).float()


def loss(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: Microbatch, *, options: Options) -> LossOutput:
    """The negated objective, summed over this microbatch; the optimizer step divides by the global count.

    logprobs_T  log-prob of labels_T under the policy at the sampling temperature, with grad
    entropy_T   entropy of the policy at each position; only a metric
    batch       with advantages_T, old_logprobs_T (or sampler_logprobs_T), and ref_logprobs_T unless kl_coefficient is 0
    """
    advantages_T = batch.advantages_T
    assert advantages_T is not None, f"{advantages_T=}"
    logprobs_T = logprobs_T.float()
    ratio_T = policy_ratio(logprobs_T, batch, options=options)
    low, high = options.clip_range
    gain_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    clipped_T = ((advantages_T > 0) & (ratio_T > high)) | ((advantages_T < 0) & (ratio_T < low))
    if options.dual_clip is not None:
        bounded_T = (advantages_T < 0) & (ratio_T > options.dual_clip)
        gain_T, clipped_T = torch.where(bounded_T, options.dual_clip * advantages_T, gain_T), clipped_T | bounded_T
    return from_gain(gain_T, ratio_T, clipped_T, logprobs_T=logprobs_T, entropy_T=entropy_T, batch=batch, options=options)
