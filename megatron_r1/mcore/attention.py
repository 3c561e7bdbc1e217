"""Causal attention over packed sequences (thd) with torch's scaled_dot_product_attention.

The sequences are laid side by side in dense batches, padded on the right: there `is_causal=True` is exact, because a
token never sees the padding after it. Under context parallelism a rank has the queries of its tokens, and gathers all keys and values.

Legend: T packed tokens, t those of this rank (context.py), N sequences, L the longest of a batch, l its part on this rank, H heads of
this rank, K its key and value heads, D head dimension of queries and keys, E of values.
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

from megatron_r1.mcore.context import Division


@dataclass
class DenseBatches:
    """How packed tokens lie in dense batches; the batches one after another have P >= T places."""

    shapes: list[tuple[int, int]]  # (sequences, L) of each batch
    source_P: torch.Tensor  # the token in each place; in padding, the sequence's last one
    place_T: torch.Tensor  # the place of each token

    def batches(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """[T, H, D] -> [N, H, L, D] of each batch; [T] -> [N, L]."""
        pieces = packed[self.source_P].split([count * length for count, length in self.shapes])
        laid = [piece.unflatten(0, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
        return [piece.transpose(1, 2) if packed.dim() == 3 else piece for piece in laid]


def dense_batches(cu_seqlens: torch.Tensor) -> DenseBatches:
    """Batches of sequences of similar length, so that padding at most doubles the tokens.

    They depend on the lengths' ratios alone: a rank's parts of the sequences lie as the sequences do.
    """
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
        """query [t, H, D], key [t, K, D], value [t, K, E] -> [t, H * E]; `cu_seqlens_q` must cover all T tokens.

        With K < H, key head k serves the query heads k * H / K to (k + 1) * H / K - 1.
        """
        assert packed_seq_params is not None, "only packed sequences"
        plan = getattr(packed_seq_params, "attention_plan", None)
        if plan is None:  # the first layer of this microbatch
            plan = packed_seq_params.attention_plan = Plan(packed_seq_params)
        assert len(plan.queries.place_T) == len(query), f"{len(plan.queries.place_T)=} {len(query)=}"

        width = value.shape[-1]
        key, value = (plan.division.join(tensor, is_shared=True) for tensor in (key, value))
        if (queries := query.shape[1] // key.shape[1]) > 1:
            key, value = (tensor.repeat_interleave(queries, dim=1) for tensor in (key, value))
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))  # one width for all: torch's fused kernel on CPU
        q, k, v = plan.queries.batches(query), plan.keys.batches(key), plan.keys.batches(value)  # of [N, H, l or L, D]
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale)
            for *qkv, mask in zip(q, k, v, plan.masks, strict=True)
        ]
        return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outputs])[plan.queries.place_T, :, :width].flatten(1)


class Plan:
    """What the attention of all layers to one microbatch has in common."""

    def __init__(self, packed: PackedSeqParams) -> None:
        self.division: Division = getattr(packed, "division", None) or Division(packed.cu_seqlens_q)
        self.keys = self.queries = dense_batches(packed.cu_seqlens_q)
        self.masks: list[torch.Tensor | None] = [None] * len(self.keys.shapes)  # [N, 1, l, L] each: whom a query sees; None: all before it
        if self.division.size > 1:
            self.queries = dense_batches(packed.cu_seqlens_q // self.division.size)
            starts_T = packed.cu_seqlens_q[:-1].repeat_interleave(packed.cu_seqlens_q.diff())
            positions_t = self.division.cut(torch.arange(len(starts_T), device=starts_T.device) - starts_T)
            here = self.queries.batches(positions_t)
            longest = [torch.arange(length, device=starts_T.device) for _, length in self.keys.shapes]
            self.masks = [(places <= at[..., None])[:, None] for at, places in zip(here, longest, strict=True)]


class GroupedAttention(SelfAttention):
    """Megatron's grouped-query attention, where a model asks for it with a bias in the output projection too.

    Megatron has that only together with biases in the MLP.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if config.attention_output_bias:
            config = copy(config)
            config.add_bias_linear = True
        super().__init__(config, *args, **kwargs)


class SpecifiedLatentAttention(MLASelfAttention):
    """MLA of the modules that its spec names.

    Megatron-Core 0.19 chooses some of them anew: before queries that are not compressed it puts a norm, which no model here has,
    and which the local layers cannot build.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class LatentAttention(SpecifiedLatentAttention):
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
