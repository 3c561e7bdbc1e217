"""Small models of every family as Hugging Face folders of random weights, for the tests of the converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mcore_runs import model
from safetensors.torch import save_file

from megatron_r1.weights import conversion
from megatron_r1.weights.rules import rules

FAMILIES = {
    "deepseek_v3": {},
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def config(family: str) -> dict[str, Any]:
    """A small model of a family."""
    if family == "deepseek_v3":
        return model()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"vocab_size": 320, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"}
    return {"model_type": family, **shape, **rest, **FAMILIES[family]}


def write(folder: Path, hf: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A Hugging Face folder of random bf16 weights, the router's bias in float32; returns them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for rule in rules(hf):
        for source in rule.hf:
            value = torch.randn(source.shape, generator=generator)
            tensors[source.name] = value if source.name.endswith("e_score_correction_bias") else value.bfloat16()
        tensors |= {copy: tensors[rule.hf[0].name].clone() for copy in rule.copies}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))
    return tensors


def convert(plan: conversion.Plan, target: Path) -> Path:
    """Carry it out."""
    return conversion.run(plan, target, workers=2, resume=False, overwrite=False)
