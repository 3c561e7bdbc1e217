"""Weights go from Hugging Face to Megatron and back unchanged, in every layout; broken files say what is wrong in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.weights.hf import SafetensorsReader, write
from megatron_r1.weights.names import Place, canonical
from megatron_r1.weights.rules import rules

TINY = Path(__file__).resolve().parents[1] / "configs/models/tiny_v3"


def tiny(**changes: Any) -> dict[str, Any]:
    return json.loads((TINY / "config.json").read_text()) | changes


def random_config(seed: int) -> dict[str, Any]:
    """A V3 of random shapes, all divisible by 4."""
    draw = random.Random(seed)
    return {
        "model_type": "deepseek_v3",
        "num_hidden_layers": (layers := draw.randint(1, 4)),
        "first_k_dense_replace": draw.randint(0, layers),
        "moe_layer_freq": draw.choice([1, 1, 2]),
        "num_nextn_predict_layers": draw.choice([None, 0, 1, 2]),
        "tie_word_embeddings": draw.random() < 0.3,
        "hidden_size": 4 * draw.randint(1, 4),
        "intermediate_size": 4 * draw.randint(1, 4),
        "moe_intermediate_size": 4 * draw.randint(1, 4),
        "n_routed_experts": draw.randint(1, 4),
        "n_shared_experts": draw.choice([None, 1, 2]),
        "num_attention_heads": 4 * draw.randint(1, 2),
        "q_lora_rank": draw.choice([None, 8, 12]),
        "kv_lora_rank": 4 * draw.randint(1, 3),
        "qk_nope_head_dim": draw.randint(1, 4),
        "qk_rope_head_dim": 4 * draw.randint(1, 2),
        "v_head_dim": draw.randint(1, 4),
        "vocab_size": 4 * draw.randint(2, 8),
    }


def checkpoint(hf: dict[str, Any], *, copies: bool = True) -> dict[str, torch.Tensor]:
    """Random values under every name of the family's table; a copy equals its original."""
    torch.manual_seed(0)
    tensors = {}
    for rule in rules(hf):
        tensors |= {t.name: torch.randn(t.shape) for t in rule.hf}
        if copies:
            tensors |= {name: tensors[rule.hf[0].name].clone() for name in rule.copies}
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
    different = [name for name in expected if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])]
    assert not different, different[:4]


@pytest.mark.parametrize("seed", range(20))
def test_every_rule_undoes_itself_at_every_tensor_parallel_size(seed):
    hf = random_config(seed)
    expected = checkpoint(hf)
    for parts in (1, 2, 4):
        found = {}
        for rule in rules(hf):
            n = parts if rule.divide is not None else 1
            ranks = [
                rule.to_megatron([expected[t.name][i] for t, i in zip(rule.hf, rule.slices(part, n), strict=True)]) for part in range(n)
            ]
            assert {tuple(r.shape) for r in ranks} == {rule.shape(n)}
            assert sum(r.numel() for r in ranks) == rule.numel
            found |= dict(rule.to_hf(ranks))
        assert_same(found, expected)


@pytest.mark.parametrize("seed", range(20))
def test_no_name_is_used_twice(seed):
    table = rules(random_config(seed))
    megatron = [rule.megatron for rule in table]
    hf = [name for rule in table for name in (*(t.name for t in rule.hf), *rule.copies)]
    assert len(set(megatron)) == len(megatron)
    assert len(set(hf)) == len(hf)


def test_tensor_parallel_rank_holds_its_rows_of_gate_above_its_rows_of_up():
    rule = next(r for r in rules(tiny()) if r.megatron == "decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = torch.zeros(rule.hf[0].shape), torch.ones(rule.hf[1].shape)
    rank_1 = rule.to_megatron([t[i] for t, i in zip((gate, up), rule.slices(1, 2), strict=True)])
    assert rank_1[:128].eq(0).all()
    assert rank_1[128:].eq(1).all()


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2, "first_k_dense_replace": 2}])
def test_names_and_shapes_are_those_that_transformers_saves(changes, tmp_path):
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    hf = tiny(num_nextn_predict_layers=0, **changes)
    AutoModelForCausalLM.from_config(DeepseekV3Config(**hf)).save_pretrained(tmp_path)
    saved = {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}
    assert {t.name: t.shape for rule in rules(hf) for t in rule.hf} == saved


def test_mtp_layer_has_the_names_of_the_published_checkpoint():
    hf = tiny(num_hidden_layers=61, first_k_dense_replace=3, num_nextn_predict_layers=1)
    names = {name for rule in rules(hf) for name in (*(t.name for t in rule.hf), *rule.copies)}
    extra = {name.removeprefix("model.layers.61.") for name in names if name.startswith("model.layers.61.")}
    own = {"embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight"}
    block = {n.removeprefix("model.layers.60.") for n in names if n.startswith("model.layers.60.")}
    assert extra == own | block


def test_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match="model_type = 'gpt2' has no weight table; use one of deepseek_v3"):
        rules({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.1.input_layernorm.weight", "decoder.layers.5.input_layernorm.weight"),
        ("decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight", "decoder.layers.4.self_attention.q_layernorm.weight"),
        ("decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight", "decoder.layers.4.self_attention.kv_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.4.pre_mlp_layernorm.weight"),
        ("decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight", "decoder.layers.4.mlp.experts.9.linear_fc2.weight"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight3", "decoder.layers.4.mlp.experts.11.linear_fc1.weight"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "decoder.layers.4.mlp.shared_experts.linear_fc1.weight"),
        ("decoder.layers.0.mlp.router.expert_bias", "decoder.layers.4.mlp.router.expert_bias"),
        ("mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc2.weight0", "mtp.layers.2.transformer_layer.mlp.experts.8.linear_fc2.weight"),
        ("mtp.layers.0.transformer_layer.pre_mlp_layernorm.weight", "mtp.layers.2.transformer_layer.pre_mlp_layernorm.weight"),
    ],
)
def test_local_names_become_global_ones_in_both_spellings(local, expected):
    place = Place(decoder_layers={0: 4, 1: 5}, mtp_layers={0: 2}, first_expert=8)
    assert canonical(local, place) == expected


def test_tied_head_on_the_last_stage_is_the_embedding():
    place = Place(decoder_layers={}, mtp_layers={})
    assert canonical("output_layer.weight", place) == "output_layer.weight"
    assert canonical("output_layer.weight", Place({}, {}, tied=True)) == "embedding.word_embeddings.weight"


@pytest.mark.parametrize("shard_bytes", [10**9, 2 * 10**6])
def test_written_folder_reads_back_and_has_what_transformers_needs(shard_bytes, tmp_path):
    expected = checkpoint(tiny())
    write(tmp_path / "out", iter(expected.items()), source_folder=TINY, shard_bytes=shard_bytes)
    reader = SafetensorsReader(tmp_path / "out")
    assert_same({name: reader[name] for name in reader.files}, expected)
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files
    assert ("model.safetensors.index.json" in files) == (shard_bytes < 10**9)
    assert all(f.stat().st_size <= shard_bytes + 10**5 for f in (tmp_path / "out").glob("*.safetensors"))


def test_dtype_casts_all_but_the_router_bias_and_config_json_says_so(tmp_path):
    write(tmp_path / "out", checkpoint(tiny()).items(), source_folder=TINY, dtype=torch.bfloat16)
    dtypes = {name: t.dtype for name, t in load_file(tmp_path / "out/model.safetensors").items()}
    assert {name for name, d in dtypes.items() if d == torch.float32} == {n for n in dtypes if n.endswith("e_score_correction_bias")}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="is not empty; name another folder or allow overwriting it"):
        write(tmp_path, {}.items(), source_folder=TINY)
    write(tmp_path, {"a": torch.ones(1)}.items(), source_folder=TINY, overwrite=True)
    assert not (tmp_path / "precious").exists()
    assert SafetensorsReader(tmp_path)["a"].item() == 1


def test_failed_write_leaves_no_folder(tmp_path):
    def broken():
        yield "a", torch.ones(1)
        raise RuntimeError("the trainer died")

    with pytest.raises(RuntimeError, match="the trainer died"):
        write(tmp_path / "out", broken(), source_folder=TINY)
    assert not (tmp_path / "out").exists()


def test_generation_config_is_made_where_the_source_has_none(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(tiny()))
    write(tmp_path / "out", {"a": torch.ones(1)}.items(), source_folder=tmp_path / "source")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 1


def truncate(folder: Path) -> None:
    data = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(data[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: [x.unlink() for x in f.iterdir()], "neither model.safetensors.index.json nor model.safetensors is there"),
        (lambda f: (f / "b.safetensors").unlink(), "b.safetensors: missing though model.safetensors.index.json names it"),
        (truncate, "b.safetensors: damaged or truncated"),
        (lambda f: (f / "b.safetensors").write_text("<html>"), "b.safetensors: damaged or truncated"),
        (lambda f: save_file({"x": torch.ones(2)}, f / "b.safetensors"), "b.safetensors: tensor b is missing though"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json: not an index of the form"),
        (lambda f: (f / "model.safetensors.index.json").write_text("<html>"), "index.json: not an index of the form"),
    ],
)
def test_damaged_checkpoint_is_named_in_one_line(damage, message, tmp_path):
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsReader(tmp_path)["b"]
    assert "\n" not in str(error.value)


def test_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no such folder; give one with"):
        SafetensorsReader("/nowhere/at/all")
