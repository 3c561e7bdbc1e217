"""Who has which tokens under context parallelism, and what joining them gives and returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

CU_SEQLENS = [0, 12, 16, 24]


@pytest.mark.parametrize("size", [1, 2])
def test_each_rank_has_a_chunk_of_the_front_and_its_mirror_image(size):
    found = run_ranks(1, tokens, [0, 8, 12], size)[0]
    assert found == {1: [[*range(12)]], 2: [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]}[size]


def tokens(cu_seqlens: list[int], size: int) -> list[list[int]]:
    from megatron_r1.mcore.context import tokens_of

    return [tokens_of(torch.tensor(cu_seqlens), rank, size=size).tolist() for rank in range(size)]


def there_and_back(is_shared: bool) -> tuple[Any, ...]:
    """On a rank: the whole, what cutting and joining makes of it, and the gradient of a sum that weights token i of rank r by (r + 1) i."""
    from megatron_r1.mcore import distributed
    from megatron_r1.mcore.context import Division
    from megatron_r1.parallel import Parallel

    distributed.init(Parallel(context_parallel_size=2), seed=1)
    try:
        division = Division(torch.tensor(CU_SEQLENS))
        whole = torch.arange(48.0).reshape(24, 2)
        mine = division.cut(whole).requires_grad_()
        joined = division.join(mine, is_shared=is_shared)
        weights = torch.arange(24.0)[:, None] * (division.rank + 1)
        (joined * weights).sum().backward()
        return torch.equal(joined, whole), division.tokens_t.tolist(), mine.grad[:, 0].tolist()
    finally:
        distributed.shutdown()


@pytest.mark.parametrize("is_shared", [True, False])
def test_joined_parts_are_the_whole_and_its_gradient_comes_back_to_its_owner(is_shared):
    for rank, (is_whole, tokens_t, gradient) in enumerate(run_ranks(2, there_and_back, is_shared)):
        assert is_whole
        assert gradient == [(1 + 2 if is_shared else rank + 1) * token for token in tokens_t]
