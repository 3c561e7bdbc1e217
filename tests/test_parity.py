"""The Megatron model and transformers' DeepseekV3ForCausalLM give the same logits from the same files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file

from megatron_r1.weights.rules import rules

LENGTHS = (37, 1, 64, 12)


def random_config(seed: int) -> dict[str, Any]:
    """A V3 of random shape: low-rank queries or not, RoPE or YaRN in either spelling, 1 to 4 groups, MTP or not."""
    draw = random.Random(seed)
    groups, chosen_groups = draw.choice([(1, 1), (2, 1), (4, 2), (4, 4), (2, 2)])
    yarn = {"factor": draw.choice([4.0, 40.0]), "original_max_position_embeddings": draw.choice([16, 64]), "beta_fast": 32, "beta_slow": 1}
    if draw.random() < 0.7:
        yarn |= {"mscale": draw.choice([1.0, 0.707]), "mscale_all_dim": 1.0}
    rope = draw.choice(
        [
            {"rope_theta": 10000.0, "rope_scaling": None},
            {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **yarn}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, **yarn}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        ]
    )
    layers = draw.randint(2, 4)
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw.randint(0, layers - 1),
        "num_nextn_predict_layers": draw.choice([0, 1]),
        "num_attention_heads": (heads := draw.choice([2, 4])),
        "num_key_value_heads": heads,
        "q_lora_rank": draw.choice([None, 24]),
        "kv_lora_rank": 32,
        "qk_nope_head_dim": draw.choice([16, 32]),
        "qk_rope_head_dim": draw.choice([8, 16]),
        "v_head_dim": draw.choice([16, 24]),
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": draw.choice([1, 2]),
        "num_experts_per_tok": 2 * chosen_groups,
        "n_group": groups,
        "topk_group": chosen_groups,
        "norm_topk_prob": True,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 128,
        "tie_word_embeddings": draw.random() < 0.3,
        **rope,
    }


def write_model(hf: dict[str, Any], folder: Path) -> None:
    """config.json and weights of a size at which attention, gates and logits are far from uniform."""
    torch.manual_seed(0)
    tensors = {}
    for rule in rules(hf):
        for source in rule.hf:
            if "norm" in source.name:
                tensors[source.name] = 1 + 0.2 * torch.randn(source.shape)
            elif source.name.endswith("e_score_correction_bias"):
                tensors[source.name] = 0.3 * torch.rand(source.shape)  # transformers lets masked experts win from negative ones
            else:
                tensors[source.name] = torch.randn(source.shape) / source.shape[-1] ** 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))


def packed_logits(folder: str, ids: list[torch.Tensor]) -> torch.Tensor:
    """On one rank: Megatron's logits of the sequences packed into one row, [T, V]."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_r1.mcore import distributed
    from megatron_r1.models.build import build
    from megatron_r1.parallel import Parallel
    from megatron_r1.weights import shard
    from megatron_r1.weights.hf import SafetensorsReader

    hf = json.loads((Path(folder) / "config.json").read_text())
    distributed.init(Parallel(), seed=1)
    [model] = build(hf, Parallel())
    shard.load([model], SafetensorsReader(folder), hf)
    bounds = torch.tensor([0, *(len(i) for i in ids)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(len(i) for i in ids)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    positions = torch.cat([torch.arange(len(i)) for i in ids])
    with torch.no_grad():
        logits = model(torch.cat(ids)[None], positions[None], None, packed_seq_params=packed)
    distributed.forget_layout()
    return logits[0]


@pytest.mark.parametrize("seed", range(20))
def test_logits_equal_those_of_transformers(seed, tmp_path):
    from transformers import AutoModelForCausalLM

    hf = random_config(seed)
    write_model(hf, tmp_path)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(hf["vocab_size"], (n,), generator=generator) for n in LENGTHS]
    [found] = run_ranks(1, packed_logits, str(tmp_path), ids)

    reference, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        expected = torch.cat([reference(i[None]).logits[0] for i in ids])
    scale = expected.abs().max()
    assert scale > 1
    difference = (found - expected).abs().max()
    assert difference <= 1e-5 * scale, f"{difference=} {scale=} {hf=}"
