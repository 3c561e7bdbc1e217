"""Packed attention equals attention over each sequence alone, and its padding stays bounded."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

LENGTHS = {
    "one": [9],
    "equal": [8, 8, 8],
    "mixed": [5, 1, 17, 3, 16, 2],
    "wild": [300, 1, 1, 2, 1, 150, 7],
    "empty one": [4, 0, 6],
}


def packed_attention(lengths: list[int], value_width: int, key_heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """On a rank: (packed, each sequence alone) for the output and the three gradients."""
    from types import SimpleNamespace

    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_r1.mcore.attention import PackedAttention

    torch.manual_seed(0)
    total, heads, width = sum(lengths), 2, 24
    shapes = [(heads, width), (key_heads, width), (key_heads, value_width)]
    inputs = [torch.randn(total, *shape, requires_grad=True) for shape in shapes]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    attention = PackedAttention(SimpleNamespace(), softmax_scale=0.3)
    packed = attention(*inputs, packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds))

    alone = []
    for query, key, value in zip(*(x.split(lengths) for x in inputs), strict=True):
        key, value = (torch.stack([x[:, h * key_heads // heads] for h in range(heads)], dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        alone.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(future, float("-inf")).softmax(-1), value).flatten(1))
    expected = torch.cat(alone)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(output, inputs, upstream) for output in (packed, expected)]
    return [(packed.detach(), expected.detach()), *zip(*gradients, strict=True)]


@pytest.mark.parametrize(("value_width", "key_heads"), [(24, 2), (16, 2), (24, 1)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_attention_equals_each_sequence_alone(lengths, value_width, key_heads):
    [pairs] = run_ranks(1, packed_attention, LENGTHS[lengths], value_width, key_heads)
    for found, expected in pairs:
        assert torch.allclose(found, expected, atol=2e-6), (found - expected).abs().max()


def places(lengths: list[int]) -> int:
    """On a rank: how many tokens' worth of memory the dense batches take."""
    from megatron_r1.mcore.attention import dense_batches

    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return len(dense_batches(bounds).source_P)


@pytest.mark.parametrize("lengths", [[4096] + [1] * 500, list(range(1, 400)), [2**i for i in range(12)]])
def test_padding_at_most_doubles_the_tokens(lengths):
    [count] = run_ranks(1, places, lengths)
    assert sum(lengths) <= count <= 2 * sum(lengths)
