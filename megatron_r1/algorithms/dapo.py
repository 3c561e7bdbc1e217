"""DAPO (arXiv 2503.14476): GRPO that clips higher above than below, weighs every token alike, and has no KL term.

    J = 1/(sum_i |o_i|) sum_i sum_t min(ratio A, clip(ratio, 1 - 0.2, 1 + 0.28) A)

What DAPO does to a rollout before that is in the section `batch`: dynamic_sampling (equation 11), overlong_tokens
(equation 13), mask_truncated (section 3.4). Its rewards are 1 and -1, which only matters beside overlong_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.algorithms import grpo

__all__ = ["Options", "advantages", "loss"]


@dataclass(frozen=True)
class Options(grpo.Options):
    """GRPO's, with the paper's values."""

    clip_epsilon: float = 0.2
    clip_epsilon_high: float | None = 0.28
    kl_coefficient: float = 0.0
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "token_mean"


advantages, loss = grpo.advantages, grpo.loss
