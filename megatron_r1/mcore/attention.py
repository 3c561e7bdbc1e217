"""Causal attention over packed sequences (thd) with torch's scaled_dot_product_attention.

The sequences are laid side by side in dense batches, padded on the right: there `is_causal=True` is exact, because a
token never sees the padding after it. Legend: T packed tokens, N sequences, L the longest of a batch, H heads of this
rank, K its key and value heads, D head dimension of queries and keys, E of values.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class DenseBatches:
    """How T packed tokens lie in dense batches; the batches one after another have P >= T places."""

    shapes: list[tuple[int, int]]  # (sequences, L) of each batch
    source_P: torch.Tensor  # the token in each place; in padding, the sequence's last one
    place_T: torch.Tensor  # the place of each token


def dense_batches(cu_seqlens: torch.Tensor) -> DenseBatches:
    """Batches of sequences of similar length, so that padding at most doubles the tokens."""
    starts = cu_seqlens.tolist()
    spans = sorted(((stop - start, start) for start, stop in pairwise(starts) if stop > start), reverse=True)
    batches: list[list[tuple[int, int]]] = []
    for length, start in spans:
        if not batches or 2 * length < batches[-1][0][0]:
            batches.append([])
        batches[-1].append((length, start))

    sources = []
    for batch in batches:
        longest = batch[0][0]
        lengths, firsts = (torch.tensor(column) for column in zip(*batch, strict=True))
        sources.append(firsts[:, None] + torch.minimum(torch.arange(longest), lengths[:, None] - 1))
    source = torch.cat([s.flatten() for s in sources])
    places = torch.arange(len(source))
    place = torch.full((starts[-1],), len(source)).scatter_reduce_(0, source, places, reduce="amin")
    shapes = [(len(batch), batch[0][0]) for batch in batches]
    return DenseBatches(shapes, source.to(cu_seqlens.device), place.to(cu_seqlens.device))


class PackedAttention(torch.nn.Module):
    """Core attention for Megatron's layers, also where values are narrower than queries and keys (MLA)."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale  # MLA passes its own, with the square of YaRN's mscale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """query [T, H, D], key [T, K, D], value [T, K, E] -> [T, H * E]; `cu_seqlens_q` must cover all T tokens.

        With K < H, key head k serves the query heads k * H / K to (k + 1) * H / K - 1.
        """
        assert packed_seq_params is not None, "only packed sequences"
        batches = getattr(packed_seq_params, "dense_batches", None)
        if batches is None:  # the first layer of this microbatch
            batches = packed_seq_params.dense_batches = dense_batches(packed_seq_params.cu_seqlens_q)
        assert len(batches.place_T) == len(query), f"{len(batches.place_T)=} {len(query)=}"

        if (queries := query.shape[1] // key.shape[1]) > 1:
            key, value = (tensor.repeat_interleave(queries, dim=1) for tensor in (key, value))
        width = value.shape[-1]
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))  # one width for all: torch's fused kernel on CPU
        sizes = [count * length for count, length in batches.shapes]
        pieces = [tensor[batches.source_P].split(sizes) for tensor in (query, key, value)]
        outputs = []
        for shape, *qkv in zip(batches.shapes, *pieces, strict=True):
            q, k, v = (piece.unflatten(0, shape).transpose(1, 2) for piece in qkv)  # [N, H, L, D]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[batches.place_T, :, :width].flatten(1)


class GroupedAttention(SelfAttention):
    """Megatron's grouped-query attention, where a model asks for it with a bias in the output projection too.

    Megatron has that only together with biases in the MLP.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if config.attention_output_bias:
            config = copy(config)
            config.add_bias_linear = True
        super().__init__(config, *args, **kwargs)


class LatentAttention(MLASelfAttention):
    """MLA for the local layers, whose down projections are whole on every tensor-parallel rank.

    Megatron's divide them, and then lose gradient: all heads share the rotary part of the key, but each rank's part of
    kv_down_proj gets back only what its own heads say. Transformer Engine's layers keep them whole too.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.q_lora_rank)
        self.linear_kv_down_proj = WholeLinear(config, config.kv_lora_rank + config.qk_pos_emb_head_dim)


class WholeLinear(torch.nn.Linear):
    """A linear layer that tensor parallelism does not divide: each rank applies it to its part of the sequence."""

    def __init__(self, config: TransformerConfig, out_features: int) -> None:
        super().__init__(config.hidden_size, out_features, bias=False, dtype=config.params_dtype)
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # so Megatron sums the gradient over the ranks

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[T / TP, 1, hidden] -> ([T / TP, 1, out_features], no bias), as Megatron's linear layers return it."""
        return super().forward(hidden_states), None
