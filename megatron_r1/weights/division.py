"""How the ranks of a trainer share the sending of weights: plain data, which knows neither Megatron nor vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class TensorInfo(NamedTuple):
    """What a receiver must know of a tensor before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Division:
    """`parts[i]` is what sender i sends, in its order; every tensor is in one of them. Sender 0 is rank 0."""

    parts: Sequence[Sequence[TensorInfo]]
    mine: int | None  # which of the senders this rank is; None: it only takes part in the gathering
