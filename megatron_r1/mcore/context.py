"""Context parallelism: the ranks of a group share the tokens of each sequence, as Megatron and Transformer Engine divide them.

With C ranks a sequence is 2C chunks of equal size, and rank r has the chunks r and 2C - 1 - r, so that causal attention is equal
work for all. C = 2, a sequence of 8 tokens: rank 0 has tokens 0 1 6 7, rank 1 has 2 3 4 5.

Legend: T packed tokens of a microbatch, t = T / C those of one rank.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


class Division:
    """Which of a microbatch's tokens are whose; without context parallelism every rank has all, and nothing here does anything.

    cu_seqlens [N + 1]: where the sequences begin and end among the T tokens; all lengths are multiples of 2C.
    """

    def __init__(self, cu_seqlens: torch.Tensor) -> None:
        self.group = parallel_state.get_context_parallel_group(check_initialized=False)
        self.rank, self.size = (self.group.rank(), self.group.size()) if self.group else (0, 1)
        if self.size > 1:
            tokens = [tokens_of(cu_seqlens, rank, size=self.size) for rank in range(self.size)]
            self.tokens_t = tokens[self.rank].to(cu_seqlens.device)
            self.order_T = torch.cat(tokens).argsort().to(cu_seqlens.device)  # of each token, its place in all ranks' tokens, rank by rank

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [t, ...], this rank's."""
        return whole if self.size == 1 else whole.index_select(0, self.tokens_t)

    def join(self, mine: torch.Tensor, *, is_shared: bool = False) -> torch.Tensor:
        """[t, ...] of every rank -> [T, ...] on all.

        From what is joined every rank must go on to compute the same, as a loss, and takes its own part of that gradient; or, where it
        `is_shared`, each something of its own, as the attention of its tokens, and takes the sum of its part of all gradients.
        """
        return mine if self.size == 1 else _Join.apply(mine, self, is_shared)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, division: Division, is_shared: bool) -> torch.Tensor:
        ctx.division, ctx.is_shared = division, is_shared
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(division.size)]
        dist.all_gather(parts, mine.contiguous(), group=division.group)
        return torch.cat(parts).index_select(0, division.order_T)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.is_shared:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=ctx.division.group)
        return ctx.division.cut(gradient), None, None


def tokens_of(cu_seqlens: torch.Tensor, rank: int, *, size: int) -> torch.Tensor:
    """The tokens of a rank among `size`, in its order: int64 [T / size]."""
    chunks = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        length = (stop - start) // (2 * size)
        assert length * 2 * size == stop - start, f"{start=} {stop=} {size=}"
        chunks += [torch.arange(start + i * length, start + (i + 1) * length) for i in (rank, 2 * size - 1 - rank)]
    return torch.cat(chunks)
