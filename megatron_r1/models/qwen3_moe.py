"""Qwen3 with a mixture of experts: Qwen3 in which some layers, or all, choose experts by a softmax router."""

from __future__ import annotations

from typing import Any

from megatron_r1.models import decoder, qwen3
from megatron_r1.weights.rules import Rule, rule, swiglu

REQUIRED = ("num_key_value_heads", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def _experts(hf: dict[str, Any]) -> int:
    """How many a layer has; transformers 5 writes the field under another name."""
    return hf.get("num_experts") or hf.get("num_local_experts") or 0


def _is_sparse(hf: dict[str, Any], layer: int) -> bool:
    return layer not in (hf.get("mlp_only_layers") or ()) and (layer + 1) % (hf.get("decoder_sparse_step") or 1) == 0


def check(hf: dict[str, Any]) -> None:
    """Raise ValueError with one line for the first field of `hf` that is missing or that is not built."""
    decoder.check(hf, required=REQUIRED)
    experts, chosen = _experts(hf), hf["num_experts_per_tok"]
    if not experts:
        raise ValueError("config.json: num_experts is missing; take it from the model's own config.json")
    if not 1 <= chosen <= experts:
        raise ValueError(f"config.json: num_experts_per_tok = {chosen}: must be 1 to num_experts = {experts}")
    if chosen == 1 and hf["norm_topk_prob"]:
        raise ValueError("config.json: norm_topk_prob = True: with num_experts_per_tok = 1 the gates would all be 1; use False")
    if not any(_is_sparse(hf, layer) for layer in range(hf["num_hidden_layers"])):
        raise ValueError("config.json: mlp_only_layers and decoder_sparse_step leave no layer with experts; use model_type = 'qwen3'")


def transformer_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GroupedConfig. Raises ValueError as `check` does."""
    check(hf)
    return decoder.transformer_arguments(hf, qwen3.options(hf)) | {
        "num_moe_experts": _experts(hf),
        "moe_layer_freq": [int(_is_sparse(hf, layer)) for layer in range(hf["num_hidden_layers"])],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not hf["norm_topk_prob"],  # a softmax over the chosen alone is the normalised one
        "moe_router_load_balancing_type": "none",  # no auxiliary loss
    }


def rules(hf: dict[str, Any]) -> tuple[Rule, ...]:
    """The weights, in the order of the checkpoint."""
    return decoder.rules(hf, qwen3.options(hf), mlp=_mlp)


def _mlp(hf: dict[str, Any], layer: int, *, source: str, target: str) -> list[Rule]:
    if not _is_sparse(hf, layer):
        return decoder.dense(hf, layer, source=source, target=target)
    experts, shape = _experts(hf), (hf["moe_intermediate_size"], hf["hidden_size"])
    table = [rule(f"{target}router", f"{source}gate", (experts, hf["hidden_size"]))]
    for e in range(experts):
        table += swiglu(f"{source}experts.{e}.", f"{target}experts.{e}.", shape, expert=e)
    return table
