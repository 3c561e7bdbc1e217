"""GSPO (arXiv 2507.18071): GRPO whose ratio, and so whose clip, is of the whole output, to the power 1/|o|.

    J = 1/S sum_i min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A),  s = (policy(o) / old(o))^(1/|o|)

s stands at each of the output's tokens, and the mean over them is s again, so the sum is GRPO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.algorithms import grpo

__all__ = ["Options", "advantages", "loss"]


@dataclass(frozen=True)
class Options(grpo.Options):
    """GRPO's, with the paper's values; it leaves the KL term out."""

    clip_epsilon: float = 3e-4
    clip_epsilon_high: float | None = 4e-4
    kl_coefficient: float = 0.0
    ratio: Literal["token", "sequence", "geometric"] = "geometric"


advantages, loss = grpo.advantages, grpo.loss
