"""RMSNorm for the local layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark by which Megatron sums its gradient over the tensor-parallel group.

    Megatron's own wrapper of it refuses sequence parallelism, which a mixture of experts needs with tensor parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, *, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
