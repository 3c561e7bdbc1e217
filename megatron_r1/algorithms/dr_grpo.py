"""Dr. GRPO (arXiv 2503.20783): GRPO without the two divisions that favour long wrong answers and groups of small std.

    J = 1/S sum_i 1/L sum_t min(ratio A, clip(ratio, 1 - 0.2, 1 + 0.2) A),  A = r - mean

L is a constant, `constant_tokens`, which the paper's code sets to the length limit of a completion; its equation omits it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.algorithms import grpo

__all__ = ["Options", "advantages", "loss"]


@dataclass(frozen=True)
class Options(grpo.Options):
    """GRPO's, with the paper's values; constant_tokens must be set."""

    clip_epsilon: float = 0.2
    kl_coefficient: float = 0.0
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "constant"
    std: Literal["population", "sample", "off"] = "off"


advantages, loss = grpo.advantages, grpo.loss
