"""What a token's gain is multiplied by because another engine, or an older policy, sampled it. No gradient goes through.

With w_t = old / sampler, the trainer's and the sampler's probability under the same weights, and a band [low, high]:

    tis            clip(w_t, low, high)                    Yao et al., fengyao.notion.site/off-policy-rl; in arXiv 2510.18855
    mis_sequence   W if low <= W <= high else 0            W = prod_t w_t; Liu, Li et al., "When Speed Kills Stability"
    mis_geometric  1 if low <= W^(1/|o|) <= high else 0    the same; lengths are treated alike, but nothing is weighted
    icepop         w_t if low <= w_t <= high else 0        Ring-1T (arXiv 2510.18855)

Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556): 0 for outputs with A < 0 and mean_t log(sampler / policy) > delta.
A token that is masked keeps its KL term and its place in the denominators, as in the papers' equations.
"""

from __future__ import annotations

import torch

from megatron_r1.policy_loss import ratios
from megatron_r1.policy_loss.options import PolicyLossOptions
from megatron_r1.types import Microbatch

LEVELS = {"tis": "token", "mis_sequence": "sequence", "mis_geometric": "geometric", "icepop": "token"}


def sampler_weights(batch: Microbatch, *, options: PolicyLossOptions) -> torch.Tensor:
    """The weight of each position, float32 [T]; 1 or what the band makes of it where nothing is learned."""
    assert batch.old_logprobs_T is not None, f"{options.correction=}: {batch.old_logprobs_T=}"
    assert batch.sampler_logprobs_T is not None, f"{options.correction=}: {batch.sampler_logprobs_T=}"
    level = LEVELS[options.correction]
    w_T = ratios.log_ratio(batch.old_logprobs_T, batch.sampler_logprobs_T, batch, level=level).exp()
    low, high = options.correction_band
    if options.correction == "tis":
        return w_T.clamp(low, high)
    is_inside_T = (w_T >= low) & (w_T <= high)
    return is_inside_T.float() if options.correction == "mis_geometric" else torch.where(is_inside_T, w_T, 0.0)


def is_off_policy(logprobs_T: torch.Tensor, batch: Microbatch, *, delta: float) -> torch.Tensor:
    """Whether a position's output is to be masked, bool [T].

    V3.2's pi_old is what the inference framework returned, so the drift holds both the engines' difference and staleness.
    """
    assert batch.sampler_logprobs_T is not None, f"{delta=}: {batch.sampler_logprobs_T=}"
    drift_T = ratios.log_ratio(batch.sampler_logprobs_T, logprobs_T.detach(), batch, level="geometric")
    return (batch.advantages_T < 0) & (drift_T > delta)
