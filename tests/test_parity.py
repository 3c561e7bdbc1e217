"""The Megatron model and transformers' DeepseekV3ForCausalLM give the same logits from the same files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

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


@contextmanager
def megatron_model(folder: str, ids: list[torch.Tensor]) -> Iterator[tuple[torch.nn.Module, dict[str, Any]]]:
    """On one rank: the model with the folder's weights, and the arguments that are the sequences packed into one row."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_r1.mcore import distributed
    from megatron_r1.models.build import build
    from megatron_r1.parallel import Parallel
    from megatron_r1.weights import shard
    from megatron_r1.weights.hf import SafetensorsReader

    hf = json.loads((Path(folder) / "config.json").read_text())
    distributed.init(Parallel(), seed=1)
    try:
        [model] = build(hf, Parallel(), mtp_loss_scale=0.5)
        shard.load([model], SafetensorsReader(folder), hf)
        bounds = torch.tensor([0, *(len(i) for i in ids)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        longest = max(len(i) for i in ids)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        positions = torch.cat([torch.arange(len(i)) for i in ids])[None]
        yield model, {"input_ids": torch.cat(ids)[None], "position_ids": positions, "attention_mask": None, "packed_seq_params": packed}
    finally:
        distributed.shutdown()


def packed_logits(folder: str, ids: list[torch.Tensor]) -> torch.Tensor:
    """On one rank: Megatron's logits of the packed sequences, [T, V]."""
    with megatron_model(folder, ids) as (model, inputs), torch.no_grad():
        return model(**inputs)[0]


def mtp_loss(folder: str, ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """On one rank: the MTP loss of the packed sequences, and the gradients that it alone gives."""
    with megatron_model(folder, ids) as (model, inputs):
        labels = torch.cat([i.roll(-1) for i in ids])[None]
        mask = torch.cat([(torch.arange(len(i)) < len(i) - 1).float() for i in ids])[None]
        logits = model(**inputs, labels=labels, loss_mask=mask)
        with torch.no_grad():
            assert torch.equal(model(**inputs), logits), "asking for the MTP loss must not change the logits"
            assert model.mtp_loss is None
            model(**inputs, labels=labels, loss_mask=mask)
        (0 * logits.sum()).backward()
        loss, tokens = model.mtp_loss
        gradients = {"eh_proj": model.mtp.layers[0].eh_proj.weight.grad, "embedding": model.embedding.word_embeddings.weight.grad}
        return {"loss": loss, "tokens": tokens, **gradients}


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


def reference_mtp_loss(folder: Path, ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same from transformers' modules: V3's equations 21 to 24, one sequence at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    hf = json.loads((folder / "config.json").read_text())
    depth, tensors = hf["num_hidden_layers"], load_file(folder / "model.safetensors")
    main = AutoModelForCausalLM.from_pretrained(folder)
    deeper = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=depth + 1)  # its last layer is that of MTP
    norms = {name: DeepseekV3RMSNorm(hf["hidden_size"]) for name in ("enorm", "hnorm", "shared_head.norm")}
    for name, norm in norms.items():
        norm.weight.data = tensors[f"model.layers.{depth}.{name}.weight"]
    eh_proj = tensors[f"model.layers.{depth}.eh_proj.weight"].requires_grad_()
    total, tokens = torch.zeros(()), 0
    for sequence in ids:
        if len(sequence) < 3:
            continue
        hidden = main.model(sequence[None]).last_hidden_state[:, :-1]
        embedded = main.model.embed_tokens(sequence[None, 1:])
        x = torch.cat([norms["enorm"](embedded), norms["hnorm"](hidden)], dim=-1) @ eh_proj.T
        rotation = deeper.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        x = deeper.model.layers[depth](x, attention_mask=None, position_embeddings=rotation)
        logits = main.lm_head(norms["shared_head.norm"](x))[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], sequence[2:], reduction="sum")
        tokens += len(sequence) - 2
    (0.5 * total).backward()
    return {
        "loss": total.detach(),
        "tokens": torch.tensor(tokens),
        "eh_proj": eh_proj.grad,
        "embedding": main.model.embed_tokens.weight.grad,
    }


def test_mtp_loss_stays_within_each_sequence_and_equals_v3s_formula(tmp_path):
    hf = random_config(0) | {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}
    write_model(hf, tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(hf["vocab_size"], (n,), generator=generator) for n in LENGTHS]
    [found] = run_ranks(1, mtp_loss, str(tmp_path), ids)
    for name, value in reference_mtp_loss(tmp_path, ids).items():
        assert torch.allclose(found[name].float(), value.float(), rtol=1e-4, atol=1e-5 * float(value.abs().max())), name
