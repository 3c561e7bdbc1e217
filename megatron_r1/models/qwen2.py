"""Qwen2 and Qwen2.5, and R1's students of that shape: Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from megatron_r1.models import decoder
from megatron_r1.weights.rules import Rule

OPTIONS = decoder.Options(qkv_bias=True)


def check(hf: dict[str, Any]) -> None:
    """Raise ValueError with one line for the first field of `hf` that is missing or that is not built."""
    decoder.check(hf, required=("num_key_value_heads",))


def transformer_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GroupedConfig. Raises ValueError as `check` does."""
    check(hf)
    return decoder.transformer_arguments(hf, OPTIONS)


def rules(hf: dict[str, Any]) -> tuple[Rule, ...]:
    """The weights, in the order of the checkpoint."""
    return decoder.rules(hf, OPTIONS)
