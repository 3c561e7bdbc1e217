"""One table a model family: which Hugging Face tensors make which Megatron tensor, and how Megatron divides it.

The table is the only knowledge of names and layouts: Hugging Face -> Megatron, Megatron -> Hugging Face and the live
weight sync all read it. Tensor parallelism divides the Hugging Face tensors, before they are joined: rank r of n holds
`rule.to_megatron([slice r of n of every Hugging Face tensor])`. So a joined tensor such as linear_fc1 is
[gate_r; up_r] on each rank, and no operation needs to know about tensor parallelism.

Megatron names are the global ones of `names.canonical`: global layer and expert indices, unfused layer norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Operation(Protocol):
    """How the tensors of a rule become one, and its inverse: `split(join(tensors), len(tensors)) == tensors`."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def split(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]: ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        assert len(tensors) == 1, f"{len(tensors)=}"
        return tensors[0]

    def split(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        assert count == 1, f"{count=}"
        return (tensor,)


@dataclass(frozen=True)
class ConcatRows:
    """Tensors of equal height, one below the other: gate_proj over up_proj is linear_fc1."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def split(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        assert tensor.shape[0] % count == 0, f"{tensor.shape=} {count=}"
        return tensor.chunk(count)


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str  # canonical global name
    hf: tuple[HFTensor, ...]
    divide: int | None = None  # dimension of every HF tensor that (expert) tensor parallelism divides; None: replicated
    operation: Operation = Rename()
    expert: int | None = None  # routed expert: on one expert-parallel rank only, divided by expert tensor parallelism
    copies: tuple[str, ...] = ()  # further HF names of the same tensor, written but not read

    @property
    def numel(self) -> int:
        """Elements of the whole Megatron tensor."""
        return sum(math.prod(t.shape) for t in self.hf)

    def slices(self, part: int, parts: int) -> list[tuple[slice, ...]]:
        """What part `part` of `parts` holds of each HF tensor, as an index into it."""
        index = []
        for tensor in self.hf:
            where = [slice(0, size) for size in tensor.shape]
            if parts > 1:
                assert self.divide is not None, f"{self=} {parts=}"
                size, rest = divmod(tensor.shape[self.divide], parts)
                assert rest == 0, f"{self=} {parts=}"
                where[self.divide] = slice(part * size, (part + 1) * size)
            index.append(tuple(where))
        return index

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """HF tensors, whole or the same part of each, in the order of `hf` -> the Megatron tensor or its part."""
        return self.operation.join(tensors)

    def to_hf(self, parts: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """All parts of the Megatron tensor in rank order -> (name, whole HF tensor) in the order of `hf`, then copies."""
        split = [self.operation.split(part, len(self.hf)) for part in parts]
        whole = [pieces[0] if len(parts) == 1 else torch.cat(pieces, dim=self.divide) for pieces in zip(*split, strict=True)]
        named = [(t.name, tensor) for t, tensor in zip(self.hf, whole, strict=True)]
        return named + [(copy, whole[0]) for copy in self.copies]


def rules(hf: dict[str, Any]) -> tuple[Rule, ...]:
    """The table of the family that `hf` (a config.json) names, in the order of the Hugging Face checkpoint.

    Raises ValueError for a family without a table.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type = {family!r} has no weight table; use one of {', '.join(FAMILIES)}")
    return FAMILIES[family](hf)


def deepseek_v3(hf: dict[str, Any]) -> tuple[Rule, ...]:
    """DeepSeek-V3: MLA, leading dense layers, then mixture of experts, multi-token prediction (MTP) layers at the end.

    An MTP layer is stored as layer `num_hidden_layers + k`, with its own names for the shared embedding and head.
    """
    layers, mtp_layers = hf["num_hidden_layers"], hf.get("num_nextn_predict_layers") or 0
    hidden, vocab = hf["hidden_size"], hf["vocab_size"]
    extra = [f"model.layers.{layers + k}." for k in range(mtp_layers)]
    embed_copies = tuple(f"{layer}embed_tokens.weight" for layer in extra)
    head_copies = tuple(f"{layer}shared_head.head.weight" for layer in extra)
    tied = bool(hf.get("tie_word_embeddings"))
    if tied:
        embed_copies += head_copies

    table = [_rule("embedding.word_embeddings", "model.embed_tokens", (vocab, hidden), divide=0, copies=embed_copies)]
    for i in range(layers):
        table += _deepseek_v3_block(hf, f"model.layers.{i}.", f"decoder.layers.{i}.", dense=i < hf["first_k_dense_replace"])
    table.append(_rule("decoder.final_layernorm", "model.norm", (hidden,)))
    if not tied:
        table.append(_rule("output_layer", "lm_head", (vocab, hidden), divide=0, copies=head_copies))
    for k, layer in enumerate(extra):
        table += [
            _rule(f"mtp.layers.{k}.enorm", f"{layer}enorm", (hidden,)),
            _rule(f"mtp.layers.{k}.hnorm", f"{layer}hnorm", (hidden,)),
            # both sides take [embedding; hidden state], in this order
            _rule(f"mtp.layers.{k}.eh_proj", f"{layer}eh_proj", (hidden, 2 * hidden), divide=0),
        ]
        table += _deepseek_v3_block(hf, layer, f"mtp.layers.{k}.transformer_layer.", dense=False)
        table.append(_rule(f"mtp.layers.{k}.final_layernorm", f"{layer}shared_head.norm", (hidden,)))
    return tuple(table)


def _deepseek_v3_block(hf: dict[str, Any], source: str, target: str, *, dense: bool) -> list[Rule]:
    """One transformer layer: `source` and `target` are the prefixes of its names on the two sides."""
    hidden, expert_hidden = hf["hidden_size"], hf["moe_intermediate_size"]
    table = [_rule(f"{target}input_layernorm", f"{source}input_layernorm", (hidden,))]
    table += _mla(hf, f"{source}self_attn.", f"{target}self_attention.")
    table.append(_rule(f"{target}pre_mlp_layernorm", f"{source}post_attention_layernorm", (hidden,)))
    if dense:
        return table + _swiglu(f"{source}mlp.", f"{target}mlp.", (hf["intermediate_size"], hidden))
    experts = hf["n_routed_experts"]
    table += [
        _rule(f"{target}mlp.router", f"{source}mlp.gate", (experts, hidden)),
        Rule(f"{target}mlp.router.expert_bias", (HFTensor(f"{source}mlp.gate.e_score_correction_bias", (experts,)),)),
    ]
    for e in range(experts):
        table += _swiglu(f"{source}mlp.experts.{e}.", f"{target}mlp.experts.{e}.", (expert_hidden, hidden), expert=e)
    if hf.get("n_shared_experts"):
        shared = hf["n_shared_experts"] * expert_hidden
        table += _swiglu(f"{source}mlp.shared_experts.", f"{target}mlp.shared_experts.", (shared, hidden))
    return table


def _mla(hf: dict[str, Any], source: str, target: str) -> list[Rule]:
    """Multi-head latent attention, with or without low-rank queries.

    The down projections are divided by the local layers and replicated by Transformer Engine's: the size of the
    parameter at hand tells which, so `divide` says only along which dimension.
    """
    hidden, heads, nope, rope = hf["hidden_size"], hf["num_attention_heads"], hf["qk_nope_head_dim"], hf["qk_rope_head_dim"]
    q_rank, kv_rank, value = hf.get("q_lora_rank"), hf["kv_lora_rank"], hf["v_head_dim"]
    query = heads * (nope + rope)
    if q_rank is None:
        table = [_rule(f"{target}linear_q_proj", f"{source}q_proj", (query, hidden), divide=0)]
    else:
        table = [
            _rule(f"{target}linear_q_down_proj", f"{source}q_a_proj", (q_rank, hidden), divide=0),
            _rule(f"{target}q_layernorm", f"{source}q_a_layernorm", (q_rank,)),
            _rule(f"{target}linear_q_up_proj", f"{source}q_b_proj", (query, q_rank), divide=0),
        ]
    return table + [
        _rule(f"{target}linear_kv_down_proj", f"{source}kv_a_proj_with_mqa", (kv_rank + rope, hidden), divide=0),
        _rule(f"{target}kv_layernorm", f"{source}kv_a_layernorm", (kv_rank,)),
        _rule(f"{target}linear_kv_up_proj", f"{source}kv_b_proj", (heads * (nope + value), kv_rank), divide=0),
        _rule(f"{target}linear_proj", f"{source}o_proj", (hidden, heads * value), divide=1),
    ]


def _swiglu(source: str, target: str, shape: tuple[int, int], *, expert: int | None = None) -> list[Rule]:
    """Gated MLP; `shape` is that of gate_proj: (intermediate, hidden)."""
    gate, up = (HFTensor(f"{source}{name}.weight", shape) for name in ("gate_proj", "up_proj"))
    return [
        Rule(f"{target}linear_fc1.weight", (gate, up), divide=0, operation=ConcatRows(), expert=expert),
        _rule(f"{target}linear_fc2", f"{source}down_proj", shape[::-1], divide=1, expert=expert),
    ]


def _rule(target: str, source: str, shape: tuple[int, ...], **fields: Any) -> Rule:
    return Rule(f"{target}.weight", (HFTensor(f"{source}.weight", shape),), **fields)


FAMILIES = {"deepseek_v3": deepseek_v3}
