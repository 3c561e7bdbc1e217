"""The models of the check: DeepSeek-V3's layers in the sizes it has, as few as fit one GPU with their optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


def v3(**changes: Any) -> dict[str, Any]:
    """V3's config.json with other numbers of layers, experts and words; MTP is left out."""
    hf = json.loads((CONFIGS / "deepseek_v3" / "config.json").read_text())
    return hf | {"num_nextn_predict_layers": 0, "first_k_dense_replace": 1} | changes


def stack() -> dict[str, Any]:
    """What is timed: a dense layer and two of 16 experts, as a rank of 16 has them. 2.9B parameters, 52 GB with AdamW in float32."""
    return v3(num_hidden_layers=3, n_routed_experts=16, vocab_size=32_768)


def comparison() -> dict[str, Any]:
    """What is compared: two layers, small enough to be there twice. 1.2B parameters."""
    return v3(num_hidden_layers=2, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=4, vocab_size=4_096)


def served() -> dict[str, Any]:
    """What vLLM serves: V3 in small, for weights that come again and again; its words are those of tiny_v3's tokenizer."""
    tiny = json.loads((CONFIGS / "tiny_v3" / "config.json").read_text())
    changes = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }
    return tiny | changes
