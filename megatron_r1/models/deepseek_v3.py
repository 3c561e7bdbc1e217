"""DeepSeek-V3's architecture: its config.json in Megatron-Core's terms (arXiv 2412.19437, section 2)."""

from __future__ import annotations

from typing import Any

import torch

import megatron_r1.mcore  # noqa: F401  installs the CPU adaptations before the first import of Megatron

# isort: split
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_r1.mcore import cpu
from megatron_r1.parallel import Parallel

# fields of config.json that have one supported value
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "attention_bias": (False,),
    "moe_layer_freq": (1,),
    "num_nextn_predict_layers": (0, 1, None),
}


def transformer_config(
    hf: dict[str, Any],
    parallel: Parallel,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    train_mtp: bool = False,
    mtp_loss_scale: float = 0.1,
    router_bias_update_rate: float = 0.0,
) -> MLATransformerConfig:
    """Megatron's config of the model `hf` (a config.json) in the layout `parallel`.

    recompute                "none", "selective" (attention core) or "full" (each layer)
    train_mtp                give the MTP layer a loss; it is built either way, so that it is kept in checkpoints
    router_bias_update_rate  of the correction bias a step; 0 freezes it
    Raises ValueError for a field value that is not built here.
    """
    for name, allowed in FIXED.items():
        if hf.get(name, allowed[0]) not in allowed:
            raise ValueError(f"config.json: {name} = {hf[name]!r} is not built here; use {' or '.join(map(repr, allowed))}")
    layers, dense = hf["num_hidden_layers"], hf["first_k_dense_replace"]
    return MLATransformerConfig(
        num_layers=layers,
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        ffn_hidden_size=hf["intermediate_size"],
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        qk_layernorm=True,  # the norms of the two latents; without it they become identities
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=hf.get("attention_dropout", 0.0),
        init_method_std=hf.get("initializer_range", 0.02),
        q_lora_rank=hf["q_lora_rank"],
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        mtp_num_layers=hf.get("num_nextn_predict_layers") or None,
        mtp_loss_scaling_factor=mtp_loss_scale if train_mtp else 0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # gradients are sums; the global count divides them once
        **_rope(hf),
        **_experts(hf, layers=layers, dense=dense, bias_update_rate=router_bias_update_rate),
        **_layout(parallel, dtype=dtype),
        **_recompute(recompute),
        **_kernels(),
    )


def embedding_options(hf: dict[str, Any]) -> dict[str, Any]:
    """How GPTModel makes positions: MLA has a rotary embedding of its own, so the model's goes unused."""
    return {"position_embedding_type": "rope", "rotary_base": int(_rope_parameters(hf)["rope_theta"])}


def _rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and the scaling, as transformers 4 (rope_scaling) or transformers 5 (rope_parameters) writes them."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return {"rope_theta": hf.get("rope_theta", 10_000.0), **scaling}


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    rope = _rope_parameters(hf)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_type": "rope", "rotary_base": rope["rope_theta"]}
    if kind != "yarn":
        raise ValueError(f"config.json: rope type {kind!r} is not built here; use 'yarn' or no scaling")
    return {
        "rope_type": "yarn",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast", 32),
        "beta_slow": rope.get("beta_slow", 1),
        # Megatron's default of mscale_all_dim is 0: the softmax scale would lose a factor of 1.87 at V3's factor 40
        "mscale": rope.get("mscale", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0),
    }


def _experts(hf: dict[str, Any], *, layers: int, dense: int, bias_update_rate: float) -> dict[str, Any]:
    """Routing of V3 2.1.2: sigmoid scores, the best groups by their top-2, the best experts by score + bias."""
    return {
        "num_moe_experts": hf["n_routed_experts"],
        "moe_layer_freq": [0] * dense + [1] * (layers - dense),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": hf["n_shared_experts"] * hf["moe_intermediate_size"] or None,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_num_groups": hf["n_group"],
        "moe_router_group_topk": hf["topk_group"],
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": bias_update_rate,
        "moe_router_load_balancing_type": "none",  # aux-loss-free
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }


def _layout(parallel: Parallel, *, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_dtype": dtype,
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,  # packs differ in length
    }


def _recompute(kind: str) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


def _kernels() -> dict[str, Any]:
    """Fused kernels on a GPU; on a CPU plain torch, and weights initialised there."""
    gpu = cpu.has_cuda()
    fused = ("bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion", "persist_layer_norm")
    return {**dict.fromkeys(fused, gpu), "apply_rope_fusion": False, "moe_grouped_gemm": gpu, "use_cpu_initialization": not gpu}
