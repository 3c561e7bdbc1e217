"""Weights go from Hugging Face to Megatron and back unchanged, in every layout; broken files say what is wrong in one line."""

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
            assert len({r.shape for r in ranks}) == 1
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
    with pytest.raises(ValueError, match=r"model_type = 'gpt2' is not built here: .*; known: deepseek_v3"):
        rules({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.1.input_layernorm.weight", "decoder.layers.5.input_layernorm.weight"),
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.5.input_layernorm.weight"),
        ("decoder.layers.1.self_attention.linear_qkv.bias", "decoder.layers.5.self_attention.linear_qkv.bias"),
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


def test_config_json_of_a_written_folder_says_what_its_tensors_are_and_not_what_the_source_had(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(tiny(dtype="bfloat16", quantization_config={"quant_method": "fp8"})))
    write(tmp_path / "out", {"a": torch.ones(1)}.items(), source_folder=tmp_path / "source")
    assert json.loads((tmp_path / "out/config.json").read_text()) == tiny(dtype="float32")


def test_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="is not empty; name another folder or allow overwriting it"):
        write(tmp_path, {}.items(), source_folder=TINY)
    write(tmp_path, {"a": torch.ones(1)}.items(), source_folder=TINY, overwrite=True)
    assert not (tmp_path / "precious").exists()
    assert SafetensorsReader(tmp_path)["a"].item() == 1


def test_folder_that_is_a_link_is_written_where_it_leads(tmp_path):
    (tmp_path / "disk" / "hf").mkdir(parents=True)
    (tmp_path / "hf").symlink_to(tmp_path / "disk" / "hf")
    for value in (1, 2):
        write(tmp_path / "hf", {"a": torch.full((1,), float(value))}.items(), source_folder=TINY, overwrite=True)
        assert SafetensorsReader(tmp_path / "disk" / "hf")["a"].item() == value
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["hf"]


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


LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "ETP2": (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2 x EP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "EP2 x ETP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "PP2 x EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "CP2 x EP2": (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}),
}
SHAPES = {"low-rank queries": {}, "full-rank queries, tied": {"q_lora_rank": None, "tie_word_embeddings": True, "first_k_dense_replace": 2}}


@contextmanager
def loaded_model(hf: dict[str, Any], layout: dict[str, int], folder: str, **options: Any) -> Iterator[list[torch.nn.Module]]:
    """On a rank: the chunks of a model built under `layout` and filled from `folder`."""
    from megatron_r1.mcore import distributed
    from megatron_r1.models.build import build
    from megatron_r1.parallel import Parallel
    from megatron_r1.weights import shard

    parallel = Parallel(**layout)
    distributed.init(parallel, seed=1)
    try:
        chunks = build(hf, parallel, **options)
        shard.load(chunks, SafetensorsReader(folder), hf)
        yield chunks
    finally:
        distributed.shutdown()


def there_and_back(hf: dict[str, Any], layout: dict[str, int], folder: str) -> list[str]:
    """On a rank: load, export in one bucket and in many; the names in order."""
    from megatron_r1.weights.exporter import Exporter

    expected = load_file(Path(folder) / "model.safetensors")
    with loaded_model(hf, layout, folder) as chunks:
        for bucket_bytes in (2**29, 10**5):
            exporter = Exporter(chunks, hf, bucket_bytes=bucket_bytes)
            found = list(exporter)
            assert_same(dict(found), expected)
            assert [(name, t.dtype, tuple(t.shape)) for name, t in found] == [tuple(info) for info in exporter.division.parts[0]]
    return [name for name, _ in found]


def router_bias_stays_fp32(hf: dict[str, Any], layout: dict[str, int], folder: str) -> list[str]:
    """On a rank: the names that a bf16 model exports in fp32; the rest must be the rounded checkpoint."""
    from megatron_r1.weights.exporter import Exporter

    expected = load_file(Path(folder) / "model.safetensors")
    with loaded_model(hf, layout, folder, dtype=torch.bfloat16) as chunks:
        found = dict(Exporter(chunks, hf))
    assert_same(found, {name: tensor.to(found[name].dtype) for name, tensor in expected.items()})
    return [name for name, tensor in found.items() if tensor.dtype == torch.float32]


def test_bf16_model_keeps_the_router_bias_in_fp32(tmp_path):
    save_file(checkpoint(tiny()), tmp_path / "model.safetensors")
    layout = {"pipeline_model_parallel_size": 2}
    expected = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3, 4)]
    assert run_ranks(2, router_bias_stays_fp32, tiny(), layout, str(tmp_path)) == [expected, expected]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_return_bit_equal_from_every_layout(layout, shapes, tmp_path):
    hf = tiny(**SHAPES[shapes])
    save_file(checkpoint(hf), tmp_path / "model.safetensors")
    ranks, sizes = LAYOUTS[layout]
    orders = run_ranks(ranks, there_and_back, hf, sizes, str(tmp_path))
    assert all(order == orders[0] for order in orders)


def sent_by_a_rank(hf: dict[str, Any], layout: dict[str, int], folder: str, scope: str) -> tuple[int | None, list[list[str]], list[str]]:
    """On a rank: which sender it is, what each sender should send, and the names of what it sends, bit-equal to the folder's."""
    from megatron_r1.weights.exporter import Exporter

    expected = load_file(Path(folder) / "model.safetensors")
    with loaded_model(hf, layout, folder) as chunks:
        exporter = Exporter(chunks, hf, scope=scope, bucket_bytes=10**5)
        found, division = list(exporter), exporter.division
    assert_same(dict(found), {name: expected[name] for name, _ in found})
    if division.mine is not None:
        assert [(name, t.dtype, tuple(t.shape)) for name, t in found] == [tuple(info) for info in division.parts[division.mine]]
    return division.mine, [[info.name for info in part] for part in division.parts], [name for name, _ in found]


@pytest.mark.parametrize("scope", ["stages", "experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_senders_share_the_weights_without_a_tensor_that_is_sent_twice_or_not_at_all(layout, scope, tmp_path):
    hf = tiny()
    save_file(expected := checkpoint(hf), tmp_path / "model.safetensors")
    ranks, sizes = LAYOUTS[layout]
    found = run_ranks(ranks, sent_by_a_rank, hf, sizes, str(tmp_path), scope)
    senders = sizes.get("pipeline_model_parallel_size", 1) * (sizes.get("expert_model_parallel_size", 1) if scope == "experts" else 1)
    assert sorted(mine for mine, _, _ in found if mine is not None) == list(range(senders))
    assert found[0][0] == 0, "rank 0 is the first"
    assert sorted(name for _, _, names in found for name in names) == sorted(expected)
    for mine, parts, names in found:
        assert parts == found[0][1], "all ranks know who sends what"
        assert names == ([] if mine is None else parts[mine])


def save_from_ranks(hf: dict[str, Any], layout: dict[str, int], source: str, target: str) -> None:
    """On a rank: load `source`, then write `target` from all ranks."""
    from megatron_r1.weights.exporter import save

    with loaded_model(hf, layout, source) as chunks:
        save(chunks, hf, folder=target, source_folder=TINY)


def test_saved_model_loads_in_transformers_with_nothing_missing(tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "source").mkdir()
    save_file(expected := checkpoint(tiny()), tmp_path / "source/model.safetensors")
    run_ranks(2, save_from_ranks, tiny(), {"expert_model_parallel_size": 2}, str(tmp_path / "source"), str(tmp_path / "out"))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(name.startswith("model.layers.4.") for name in report["unexpected_keys"])  # the MTP layer, which it does not know
    model.save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again/model.safetensors"), {n: t for n, t in expected.items() if not n.startswith("model.layers.4.")})


def load_error(hf: dict[str, Any], folder: str) -> str:
    """On a rank: the ValueError of a load under TP2."""
    with pytest.raises(ValueError) as error, loaded_model(hf, {"tensor_model_parallel_size": 2}, folder):
        pass
    return str(error.value)


FAMILY = "megatron_r1/models/deepseek_v3.py"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({O_PROJ: None}, f"tensor {O_PROJ} of shape (128, 128), which {FAMILY} asks for, is missing; download or convert"),
        ({"model.layers.4.eh_proj.weight": None}, "is missing; set num_nextn_predict_layers = 0 in config.json"),
        ({O_PROJ: torch.ones(128, 64)}, f"model.safetensors: {O_PROJ} has shape (128, 64), by config.json (128, 128)"),
        ({"model.layers.9.new.weight": torch.ones(3)}, f"no place for tensor model.layers.9.new.weight of shape (3,) in {FAMILY}"),
        ({f"{O_PROJ}_scale_inv": torch.ones(1, 1)}, f"of shape (1, 1) in {FAMILY}; convert FP8 weights to bf16 first"),
    ],
)
def test_checkpoint_of_another_model_is_refused_in_one_line(changes, message, tmp_path):
    tensors = checkpoint(tiny()) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    for error in run_ranks(2, load_error, tiny(), str(tmp_path)):
        assert message in error
        assert "\n" not in error


def test_mtp_layer_of_a_checkpoint_is_left_out_of_a_model_without_one(tmp_path):
    hf = tiny(num_nextn_predict_layers=0)
    save_file(checkpoint(tiny()), tmp_path / "model.safetensors")
    run_ranks(2, loaded_without_result, hf, {"tensor_model_parallel_size": 2}, str(tmp_path))


def loaded_without_result(hf: dict[str, Any], layout: dict[str, int], folder: str) -> None:
    """On a rank: a load that must not raise."""
    with loaded_model(hf, layout, folder):
        pass
