"""DeepSeek-V3, DeepSeek-R1, and others of their shape, such as Moonlight.

Multi-head latent attention (MLA) with RoPE or YaRN, leading dense layers, then mixture-of-experts layers with a sigmoid
router that limits each token to some groups of experts and chooses by a correction bias.
"""

from __future__ import annotations

from typing import Any

from megatron_r1.models import fields
from megatron_r1.weights.rules import HFTensor, Rule, rule, swiglu

SUPPORTED: fields.Supported = {
    "hidden_act": (("silu",), "experts are SwiGLU"),
    "scoring_func": (("sigmoid",), "V2's softmax router is another family"),
    "topk_method": (("noaux_tc",), "V2's routers are another family"),
    "moe_layer_freq": ((1,), "V3 has experts in every layer after the dense ones"),
    "attention_bias": ((False,), "V3 has no biases in its linear layers"),
    "attention_dropout": ((0.0,), "V3 trains without dropout"),
    "rope_interleave": ((True,), "V3 rotates adjacent pairs"),
    "num_nextn_predict_layers": ((0, 1, None), "V3 has one MTP layer; drop the others"),
    "quantization_config": ((None,), "convert FP8 weights to bf16, with their config.json, first"),
}
REQUIRED = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "vocab_size"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok"),
    *("first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor", "max_position_embeddings", "rms_norm_eps"),
)
NULLABLE = ("q_lora_rank", "n_shared_experts")  # null says that there are none; left out, transformers takes V3's own


def check(hf: dict[str, Any]) -> None:
    """Raise ValueError with one line for the first field of `hf` that is missing or that this model does not build."""
    fields.check(hf, required=REQUIRED, supported=SUPPORTED)
    for name in NULLABLE:
        if name not in hf:
            raise ValueError(f"config.json: {name} is missing; take it from the model's own config.json, or set null for none")
    heads, key_heads = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
    if key_heads != heads:
        raise ValueError(f"config.json: num_key_value_heads = {key_heads}: MLA has as many as num_attention_heads; use {heads}")
    _check_router(hf)
    _rope(hf)


def _check_router(hf: dict[str, Any]) -> None:
    experts, chosen = hf["n_routed_experts"], hf["num_experts_per_tok"]
    groups, chosen_groups = hf["n_group"], hf["topk_group"]
    if experts % groups:
        raise ValueError(f"config.json: n_group = {groups}: does not divide n_routed_experts = {experts}; choose one that does")
    if not 1 <= chosen_groups <= groups:
        raise ValueError(f"config.json: topk_group = {chosen_groups}: must be 1 to n_group = {groups}")
    if not 1 <= chosen <= experts // groups * chosen_groups:
        raise ValueError(
            f"config.json: num_experts_per_tok = {chosen}: topk_group = {chosen_groups} groups have only"
            f" {experts // groups * chosen_groups} experts; lower it"
        )
    if chosen_groups < groups and chosen // chosen_groups != 2:
        raise ValueError(
            f"config.json: topk_group = {chosen_groups}: Megatron scores a group by its best num_experts_per_tok // topk_group ="
            f" {chosen // chosen_groups} experts, V3 by its best 2; choose them so that it is 2"
        )
    normalised = bool(hf.get("norm_topk_prob", True))
    if normalised != (chosen > 1):
        raise ValueError(
            f"config.json: norm_topk_prob = {normalised}: Megatron normalises the gates exactly when num_experts_per_tok > 1,"
            f" and it is {chosen}; use {not normalised}"
        )


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """The rotary arguments."""
    kind, base, rope = fields.rotary(hf, {"yarn": ("factor", "original_max_position_embeddings")})
    if kind == "default":
        return {"rope_type": "rope", "rotary_base": base}
    if rope.get("attention_factor") is not None:
        factor = rope["attention_factor"]
        raise ValueError(f"config.json: rope_scaling's attention_factor = {factor}: not built; set mscale and mscale_all_dim")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim):
        raise ValueError(
            f"config.json: rope_scaling's mscale = {mscale}, mscale_all_dim = {all_dim}: transformers and vLLM disagree on one alone;"
            " set both or none"
        )
    return {
        "rope_type": "yarn",
        "rotary_base": base,
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": mscale or 1.0,
        "mscale_all_dim": all_dim or 0.0,
    }


def transformer_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of MLATransformerConfig that say what the model is; models/build.py adds how it is trained.

    Raises ValueError as `check` does.
    """
    check(hf)
    return {
        "multi_latent_attention": True,
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "q_lora_rank": hf["q_lora_rank"],
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "qk_layernorm": True,  # the norms of the two latents; without it they are left out
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mtp_num_layers": hf.get("num_nextn_predict_layers") or None,
        **_rope(hf),
        **_experts(hf),
    }


def _experts(hf: dict[str, Any]) -> dict[str, Any]:
    groups, chosen_groups = hf["n_group"], hf["topk_group"]
    limited = chosen_groups < groups
    shared = hf["n_shared_experts"] or 0
    return {
        "num_moe_experts": hf["n_routed_experts"],
        "moe_layer_freq": [int(i >= hf["first_k_dense_replace"]) for i in range(hf["num_hidden_layers"])],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": shared * hf["moe_intermediate_size"] or None,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_num_groups": groups if limited else None,
        "moe_router_group_topk": chosen_groups if limited else None,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",  # balanced by the bias alone
    }


def rules(hf: dict[str, Any]) -> tuple[Rule, ...]:
    """The decoder, then multi-token prediction (MTP) layers.

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

    head = ("lm_head.weight",) if tied else ()
    table = [rule("embedding.word_embeddings", "model.embed_tokens", (vocab, hidden), divide=0, copies=embed_copies, aliases=head)]
    for i in range(layers):
        table += _block(hf, f"model.layers.{i}.", f"decoder.layers.{i}.", dense=i < hf["first_k_dense_replace"])
    table.append(rule("decoder.final_layernorm", "model.norm", (hidden,)))
    if not tied:
        table.append(rule("output_layer", "lm_head", (vocab, hidden), divide=0, copies=head_copies))
    for k, layer in enumerate(extra):
        table += [
            rule(f"mtp.layers.{k}.enorm", f"{layer}enorm", (hidden,)),
            rule(f"mtp.layers.{k}.hnorm", f"{layer}hnorm", (hidden,)),
            # both sides take [embedding; hidden state], in this order
            rule(f"mtp.layers.{k}.eh_proj", f"{layer}eh_proj", (hidden, 2 * hidden), divide=0),
        ]
        table += _block(hf, layer, f"mtp.layers.{k}.transformer_layer.", dense=False)
        table.append(rule(f"mtp.layers.{k}.final_layernorm", f"{layer}shared_head.norm", (hidden,)))
    return tuple(table)


def _block(hf: dict[str, Any], source: str, target: str, *, dense: bool) -> list[Rule]:
    """One transformer layer: `source` and `target` are the prefixes of its names on the two sides."""
    hidden, expert_hidden = hf["hidden_size"], hf["moe_intermediate_size"]
    table = [rule(f"{target}input_layernorm", f"{source}input_layernorm", (hidden,))]
    table += _mla(hf, f"{source}self_attn.", f"{target}self_attention.")
    table.append(rule(f"{target}pre_mlp_layernorm", f"{source}post_attention_layernorm", (hidden,)))
    if dense:
        return table + swiglu(f"{source}mlp.", f"{target}mlp.", (hf["intermediate_size"], hidden))
    experts = hf["n_routed_experts"]
    table += [
        rule(f"{target}mlp.router", f"{source}mlp.gate", (experts, hidden)),
        Rule(f"{target}mlp.router.expert_bias", (HFTensor(f"{source}mlp.gate.e_score_correction_bias", (experts,)),)),
    ]
    for e in range(experts):
        table += swiglu(f"{source}mlp.experts.{e}.", f"{target}mlp.experts.{e}.", (expert_hidden, hidden), expert=e)
    if hf.get("n_shared_experts"):
        shared = hf["n_shared_experts"] * expert_hidden
        table += swiglu(f"{source}mlp.shared_experts.", f"{target}mlp.shared_experts.", (shared, hidden))
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
        table = [rule(f"{target}linear_q_proj", f"{source}q_proj", (query, hidden), divide=0)]
    else:
        table = [
            rule(f"{target}linear_q_down_proj", f"{source}q_a_proj", (q_rank, hidden), divide=0),
            rule(f"{target}q_layernorm", f"{source}q_a_layernorm", (q_rank,)),
            rule(f"{target}linear_q_up_proj", f"{source}q_b_proj", (query, q_rank), divide=0),
        ]
    return table + [
        rule(f"{target}linear_kv_down_proj", f"{source}kv_a_proj_with_mqa", (kv_rank + rope, hidden), divide=0),
        rule(f"{target}kv_layernorm", f"{source}kv_a_layernorm", (kv_rank,)),
        rule(f"{target}linear_kv_up_proj", f"{source}kv_b_proj", (heads * (nope + value), kv_rank), divide=0),
        rule(f"{target}linear_proj", f"{source}o_proj", (hidden, heads * value), divide=1),
    ]
