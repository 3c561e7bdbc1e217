"""Core attention over packed sequences for the local layer spec, with head sizes of query/key and value that may differ.

Legend: T packed tokens, N sequences, L the longest of a group, h heads of this rank, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

MAX_WASTE = 1.5  # padded tokens a real token, before sequences of other lengths get a call of their own


@dataclass(frozen=True)
class Group:
    """Sequences of similar length that share one attention call."""

    count: int  # N
    longest: int  # L
    source_T: torch.Tensor  # where each of their tokens stands in the pack
    target_T: torch.Tensor  # where it stands in the padded batch [N * L]


def groups(cu_seqlens: torch.Tensor) -> list[Group]:
    """Sequences of a pack in groups of similar length, longest first."""
    bounds = cu_seqlens.tolist()
    spans = sorted(((end - start, start) for start, end in zip(bounds, bounds[1:]) if end > start), reverse=True)
    found, members = [], []
    for length, start in spans:
        tokens = sum(size for size, _ in members) + length
        if members and members[0][0] * (len(members) + 1) > MAX_WASTE * tokens:
            found.append(_group(members))
            members = []
        members.append((length, start))
    return [*found, _group(members)]


def _group(members: list[tuple[int, int]]) -> Group:
    longest = members[0][0]
    lengths = torch.tensor([length for length, _ in members])
    starts = torch.tensor([start for _, start in members])
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    rows = torch.arange(len(members)) * longest
    return Group(len(members), longest, starts.repeat_interleave(lengths) + within, rows.repeat_interleave(lengths) + within)


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a thd pack.

    Sequences are padded on the right into a dense batch and attend causally: no real token sees the padding behind it, so
    one dense call is exact, and far cheaper on a CPU than one call a sequence.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale  # MLA's includes YaRN's mscale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """query, key [T, (1,) h, D], value [T, (1,) h, Dv] -> [T, h * Dv]."""
        assert packed_seq_params is not None, "the local attention takes packed sequences only"
        query, key, value = (x.flatten(0, 1) if x.dim() == 4 else x for x in (query, key, value))
        plan = packed_seq_params.__dict__.get("groups")  # made once a pack, used by every layer
        if plan is None:
            plan = packed_seq_params.groups = groups(packed_seq_params.cu_seqlens_q)
        attended = torch.cat([self._attend(group, query, key, value) for group in plan])
        return attended[torch.cat([group.source_T for group in plan]).argsort()]

    def _attend(self, group: Group, *tensors: torch.Tensor) -> torch.Tensor:
        """The group's tokens, attended, in the order of source_T: [tokens, h * Dv]."""
        size = group.count * group.longest

        def padded(x: torch.Tensor) -> torch.Tensor:
            batch = x.new_zeros(size, *x.shape[1:]).index_copy(0, group.target_T, x[group.source_T])
            return batch.view(group.count, group.longest, *x.shape[1:]).transpose(1, 2)

        query, key, value = (padded(x) for x in tensors)
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)
        return out.transpose(1, 2).reshape(size, -1)[group.target_T]
