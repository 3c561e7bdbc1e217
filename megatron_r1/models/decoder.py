"""What the families with grouped-query attention share: Llama's decoder, of which each of them changes a little.

Pre-norm layers with RMSNorm, rotary positions (plain, or scaled as Llama 3 does), grouped-query attention and a gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_r1.models import fields
from megatron_r1.weights.rules import GroupedQKV, HFTensor, Rule, rule, swiglu

SUPPORTED: fields.Supported = {
    "hidden_act": (("silu",), "the MLP is SwiGLU"),
    "attention_dropout": ((0.0, None), "a policy trains without dropout"),
    "use_sliding_window": ((False, None), "every layer sees the whole sequence"),
    "mlp_bias": ((False, None), "the MLP has no biases"),
    "quantization_config": ((None,), "convert FP8 weights to bf16, with their config.json, first"),
}
REQUIRED = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "rms_norm_eps"),
)
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Options:
    """What the families change of Llama's attention."""

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False  # of each head, before the rotation


def head_dim(hf: dict[str, Any]) -> int:
    """Width of a head: of its own where config.json has the field, otherwise the heads share the hidden size."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def key_heads(hf: dict[str, Any]) -> int:
    """Key and value heads; a Llama that does not say has one for each query head."""
    return hf.get("num_key_value_heads") or hf["num_attention_heads"]


def check(hf: dict[str, Any], *, required: tuple[str, ...] = ()) -> None:
    """Raise ValueError with one line for the first field of `hf` that is missing or that is not built."""
    fields.check(hf, required=(*REQUIRED, *required), supported=SUPPORTED)
    heads, groups, hidden = hf["num_attention_heads"], key_heads(hf), hf["hidden_size"]
    if heads % groups:
        raise ValueError(
            f"config.json: num_key_value_heads = {groups}: does not divide num_attention_heads = {heads}; choose one that does"
        )
    if not hf.get("head_dim") and hidden % heads:
        raise ValueError(f"config.json: num_attention_heads = {heads}: does not divide hidden_size = {hidden}; set head_dim")
    if head_dim(hf) % 2:
        raise ValueError(f"config.json: head_dim = {head_dim(hf)}: rotary positions turn pairs; use an even one")
    for kind in hf.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"config.json: layer_types has {kind!r}, which is not built; every layer must be 'full_attention'")
    fields.rotary(hf, {"llama3": LLAMA3})


def transformer_arguments(hf: dict[str, Any], options: Options) -> dict[str, Any]:
    """Arguments of GroupedConfig; `hf` must have passed the family's check."""
    kind, base, settings = fields.rotary(hf, {"llama3": LLAMA3})
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": key_heads(hf),
        "kv_channels": head_dim(hf),
        "rotary_base": base,
        "llama3_rope": {name: settings[name] for name in LLAMA3} if kind == "llama3" else None,
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": options.qkv_bias,
        "attention_output_bias": options.output_bias,
        "qk_layernorm": options.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def dense(hf: dict[str, Any], layer: int, *, source: str, target: str) -> list[Rule]:
    """The gated MLP of any layer; `source` and `target` are the prefixes of its names on the two sides."""
    return swiglu(source, target, (hf["intermediate_size"], hf["hidden_size"]))


def rules(hf: dict[str, Any], options: Options, *, mlp: Callable[..., list[Rule]] = dense) -> tuple[Rule, ...]:
    """The table of a decoder with these options; `mlp`, called like `dense`, makes the rules of one layer's MLP or experts."""
    hidden, vocab = hf["hidden_size"], hf["vocab_size"]
    tied = bool(hf.get("tie_word_embeddings"))
    head = ("lm_head.weight",) if tied else ()
    table = [rule("embedding.word_embeddings", "model.embed_tokens", (vocab, hidden), divide=0, aliases=head)]
    for i in range(hf["num_hidden_layers"]):
        source, target = f"model.layers.{i}.", f"decoder.layers.{i}."
        table.append(rule(f"{target}input_layernorm", f"{source}input_layernorm", (hidden,)))
        table += _attention(hf, options, source=f"{source}self_attn.", target=f"{target}self_attention.")
        table.append(rule(f"{target}pre_mlp_layernorm", f"{source}post_attention_layernorm", (hidden,)))
        table += mlp(hf, i, source=f"{source}mlp.", target=f"{target}mlp.")
    table.append(rule("decoder.final_layernorm", "model.norm", (hidden,)))
    if not tied:
        table.append(rule("output_layer", "lm_head", (vocab, hidden), divide=0))
    return tuple(table)


def _attention(hf: dict[str, Any], options: Options, *, source: str, target: str) -> list[Rule]:
    hidden, width, heads, groups = hf["hidden_size"], head_dim(hf), hf["num_attention_heads"], key_heads(hf)
    grouped = GroupedQKV(head_dim=width, queries=heads // groups)
    rows = {"q_proj": heads * width, "k_proj": groups * width, "v_proj": groups * width}

    def qkv(kind: str, *columns: int) -> Rule:
        sources = tuple(HFTensor(f"{source}{name}.{kind}", (count, *columns)) for name, count in rows.items())
        return Rule(f"{target}linear_qkv.{kind}", sources, divide=0, operation=grouped)

    table = [qkv("weight", hidden), rule(f"{target}linear_proj", f"{source}o_proj", (hidden, heads * width), divide=1)]
    if options.qkv_bias:
        table.append(qkv("bias"))
    if options.output_bias:
        table.append(Rule(f"{target}linear_proj.bias", (HFTensor(f"{source}o_proj.bias", (hidden,)),)))
    if options.qk_norm:
        table += [rule(f"{target}{name}_layernorm", f"{source}{name}_norm", (width,)) for name in "qk"]
    return table
