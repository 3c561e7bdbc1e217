"""Kimi-K2: DeepSeek-V3's shape and names under another model_type."""

from megatron_r1.models.deepseek_v3 import check, rules, transformer_arguments

__all__ = ["check", "rules", "transformer_arguments"]
