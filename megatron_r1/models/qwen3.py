"""Qwen3, dense: Llama with a norm on each head's query and key, and heads of a width of their own."""

from __future__ import annotations

from typing import Any

from megatron_r1.models import decoder
from megatron_r1.weights.rules import Rule


def options(hf: dict[str, Any]) -> decoder.Options:
    """With `attention_bias` all four projections have one."""
    bias = bool(hf.get("attention_bias"))
    return decoder.Options(qkv_bias=bias, output_bias=bias, qk_norm=True)


def check(hf: dict[str, Any]) -> None:
    """Raise ValueError with one line for the first field of `hf` that is missing or that is not built."""
    decoder.check(hf, required=("num_key_value_heads", "head_dim"))


def transformer_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GroupedConfig. Raises ValueError as `check` does."""
    check(hf)
    return decoder.transformer_arguments(hf, options(hf))


def rules(hf: dict[str, Any]) -> tuple[Rule, ...]:
    """The weights, in the order of the checkpoint."""
    return decoder.rules(hf, options(hf))
