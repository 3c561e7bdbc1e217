"""CISPO (MiniMax-M1, arXiv 2506.13585): the ratio is a clipped weight of each token's log-prob, so no token loses its gradient.

    J = 1/(sum_i |o_i|) sum_i sum_t stop_gradient(clip(ratio, 1 - low, 1 + high)) A log policy
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_r1.algorithms import grpo
from megatron_r1.policy_loss.loss import from_gain, policy_ratio
from megatron_r1.policy_loss.options import PolicyLossOptions
from megatron_r1.types import LossOutput, Microbatch

__all__ = ["Options", "advantages", "loss"]


@dataclass(frozen=True)
class Options(PolicyLossOptions):
    """The paper has no lower limit and no KL term, and does not print its upper limit."""

    clip_epsilon_low: float | None = None  # None: no lower limit
    clip_epsilon_high: float = 4.0  # a weight of at most 5: ms-swift's default
    kl_coefficient: float = 0.0
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "token_mean"

    @property
    def clip_range(self) -> tuple[float, float]:
        """Lower and upper limit of the weight."""
        return 0.0 if self.clip_epsilon_low is None else 1 - self.clip_epsilon_low, 1 + self.clip_epsilon_high


advantages = grpo.advantages


def loss(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: Microbatch, *, options: Options) -> LossOutput:
    """The negated objective, summed over this microbatch; arguments as those of grpo.loss."""
    assert batch.advantages_T is not None, f"{batch.advantages_T=}"
    # an unlearned position may hold -inf, and -inf * 0 is NaN
    logprobs_T = logprobs_T.float().where(batch.loss_mask_T > 0, 0.0)
    ratio_T = policy_ratio(logprobs_T, batch, options=options)
    low, high = options.clip_range
    gain_T = ratio_T.detach().clamp(low, high) * batch.advantages_T * logprobs_T
    clipped_T = (ratio_T < low) | (ratio_T > high)
    return from_gain(gain_T, ratio_T, clipped_T, logprobs_T=logprobs_T, entropy_T=entropy_T, batch=batch, options=options)
