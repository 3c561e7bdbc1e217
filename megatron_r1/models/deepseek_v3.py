"""DeepSeek-V3: a Hugging Face config.json -> the arguments of Megatron's configuration of the same model.

Multi-head latent attention (MLA) with RoPE or YaRN, leading dense layers, then mixture-of-experts layers with a sigmoid
router that limits each token to some groups of experts and chooses by a correction bias. Imports no Megatron, so that a
config.json can be checked before a process starts.
"""

from __future__ import annotations

from typing import Any

# field -> (values that are built, where the first one is also the default; what to do about another one)
SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
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
    for name in REQUIRED:
        if hf.get(name) is None:
            raise ValueError(f"config.json: {name} is missing; take it from the model's own config.json")
    for name in NULLABLE:
        if name not in hf:
            raise ValueError(f"config.json: {name} is missing; take it from the model's own config.json, or set null for none")
    for name, (values, fix) in SUPPORTED.items():
        if hf.get(name, values[0]) not in values:
            raise ValueError(f"config.json: {name} = {hf[name]!r} is not built; use {values[0]!r}: {fix}")
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
    """The rotary arguments, from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before)."""
    field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(field) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    base = {"rotary_base": rope.get("rope_theta") or hf.get("rope_theta") or 10000.0}
    if kind == "default":
        return {"rope_type": "rope", **base}
    if kind != "yarn":
        raise ValueError(f"config.json: {field}.rope_type = {kind!r} is not built; use 'yarn' or 'default'")
    for name in ("factor", "original_max_position_embeddings"):
        if name not in rope:
            raise ValueError(f"config.json: {field}.{name} is missing; YaRN needs it")
    if rope.get("attention_factor") is not None:
        raise ValueError(f"config.json: {field}.attention_factor = {rope['attention_factor']}: not built; set mscale and mscale_all_dim")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim):
        raise ValueError(
            f"config.json: {field}.mscale = {mscale}, mscale_all_dim = {all_dim}: transformers and vLLM disagree on one alone;"
            " set both or none"
        )
    return {
        "rope_type": "yarn",
        **base,
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
