"""Small random models of every family with grouped-query attention: configs, weights, and what transformers makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_r1.weights.rules import rules

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
KIMI_K2 = json.loads("""{
    "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu", "attention_bias": false,
    "hidden_size": 64, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "vocab_size": 128,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.001, "seq_aux": true,
    "rms_norm_eps": 1e-6, "rope_theta": 50000.0, "tie_word_embeddings": false, "max_position_embeddings": 256, "ep_size": 1,
    "rope_scaling": {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": 1.0, "beta_slow": 1.0,
                     "mscale": 1.0, "mscale_all_dim": 1.0},
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
}""")  # the fields that it is published with, and small sizes
MOONLIGHT = {name: value for name, value in KIMI_K2.items() if name not in ("rope_scaling", "num_nextn_predict_layers")} | {
    "model_type": "deepseek_v3",
    "q_lora_rank": None,
    "rope_scaling": None,
    "routed_scaling_factor": 2.446,
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(family: str, **changes: Any) -> dict[str, Any]:
    """A tiny config.json; every size is divisible by 2, as are the layers."""
    hf = {
        "model_type": family,
        "architectures": [f"{ARCHITECTURES[family]}ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if family.startswith("qwen3"):
        hf |= {"head_dim": 32, "attention_bias": False}
    if family == "qwen3_moe":
        hf |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        hf |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return hf | changes


def random_config(family: str, seed: int) -> dict[str, Any]:
    """Of random shape: heads and groups, biases, tied or not, rotary settings in either spelling, where experts are."""
    draw = random.Random(f"{family} {seed}")
    heads, groups = draw.choice([(4, 4), (4, 2), (4, 1), (6, 3), (8, 2)])
    llama3 = LLAMA3 | {"factor": draw.choice([8.0, 32.0]), "original_max_position_embeddings": draw.choice([32, 64])}
    rope = draw.choice(
        [
            {"rope_theta": 10000.0},
            {"rope_theta": 500000.0, "rope_scaling": llama3},
            {"rope_parameters": llama3 | {"rope_theta": 1000.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        ]
    )
    hf = config(
        family,
        hidden_size=8 * heads,
        num_hidden_layers=draw.randint(2, 4),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=draw.choice([1e-5, 1e-6]),
        tie_word_embeddings=draw.random() < 0.4,
    )
    if family == "qwen3_moe":
        layers = range(hf["num_hidden_layers"])
        hf |= {"num_experts_per_tok": draw.choice([2, 3]), "norm_topk_prob": draw.random() < 0.5}
        hf |= draw.choice([{"decoder_sparse_step": 2}, {"mlp_only_layers": draw.sample(layers, 1)}, {}])
    if family != "qwen2":
        hf |= {"head_dim": draw.choice([8, 16]), "attention_bias": draw.random() < 0.5}
    hf.pop("rope_theta")
    return hf | rope


def weights(hf: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of the family's table, of a size at which attention, gates and logits are far from uniform."""
    torch.manual_seed(0)
    tensors = {}
    for entry in rules(hf):
        for source in entry.hf:
            scale = 0.2 if len(source.shape) == 1 else source.shape[-1] ** -0.5
            tensors[source.name] = torch.randn(source.shape) * scale + ("norm" in source.name)
    return tensors


def write_model(hf: dict[str, Any], folder: Path) -> str:
    """A Hugging Face folder of the config with `weights`."""
    save_file(weights(hf), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))
    return str(folder)
