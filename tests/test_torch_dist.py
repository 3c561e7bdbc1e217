"""Checkpoints that are converted without the model are what Megatron's own loader expects, in every layout, and the other way round."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import config, convert, write
from ranks import run_ranks
from safetensors.torch import load_file

from megatron_r1.parallel import Parallel
from megatron_r1.weights import plans, torch_dist, torch_dist_reader

SIX = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "PP2 x VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP2 x PP2 x EP2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
}


def loaded_by_megatron(hf: dict[str, Any], layout: dict[str, int], megatron: str, source: str) -> list[str]:
    """On each rank: a model of the layout that dist_checkpointing.load filled; the tensors that are not the source's."""
    from megatron.core import dist_checkpointing

    from megatron_r1.mcore import distributed
    from megatron_r1.models.build import build
    from megatron_r1.weights.exporter import Exporter

    parallel = Parallel(**layout)
    distributed.init(parallel, seed=1)
    try:
        chunks = build(hf, parallel, dtype=torch.bfloat16)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        state = {f"model{i}": chunk.sharded_state_dict(metadata={}) for i, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(state, f"{megatron}/release")
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        expected = load_file(f"{source}/model.safetensors")
        found = dict(Exporter(chunks, hf))
        return [name for name in {*found, *expected} if name not in found or not torch.equal(found[name], expected[name])]
    finally:
        distributed.shutdown()


@pytest.mark.parametrize(
    ("family", "layout"), [*(("deepseek_v3", name) for name in SIX), ("llama", "PP2"), ("llama", "TP2"), ("llama", "PP2 x VPP2")]
)
def test_megatrons_own_loader_reads_what_was_converted(family, layout, tmp_path):
    hf, (ranks, sizes) = config(family), SIX[layout]
    write(tmp_path / "hf", hf)
    convert(plans.hf_to_megatron(tmp_path / "hf"), tmp_path / "megatron")
    for wrong in run_ranks(ranks, loaded_by_megatron, hf, sizes, str(tmp_path / "megatron"), str(tmp_path / "hf")):
        assert not wrong


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_megatrons_own_loader_reads_every_family(family, tmp_path):
    hf = config(family)
    write(tmp_path / "hf", hf)
    convert(plans.hf_to_megatron(tmp_path / "hf"), tmp_path / "megatron")
    layout = {"tensor_model_parallel_size": 2}
    for wrong in run_ranks(2, loaded_by_megatron, hf, layout, str(tmp_path / "megatron"), str(tmp_path / "hf")):
        assert not wrong


def saved_by_megatron(hf: dict[str, Any], layout: dict[str, int], source: str, target: str) -> None:
    """On each rank: a checkpoint by dist_checkpointing.save, of a model with the folder's weights."""
    from megatron.core import dist_checkpointing

    import megatron_r1.mcore.checkpoint  # noqa: F401  Megatron's writer without its processes
    from megatron_r1.mcore import distributed
    from megatron_r1.models.build import build
    from megatron_r1.weights import shard
    from megatron_r1.weights.hf import SafetensorsReader

    parallel = Parallel(**layout)
    distributed.init(parallel, seed=1)
    try:
        chunks = build(hf, parallel, dtype=torch.bfloat16)
        shard.load(chunks, SafetensorsReader(source), hf)
        state = {f"model{i}": chunk.sharded_state_dict(metadata={}) for i, chunk in enumerate(chunks)}
        dist_checkpointing.save(state, target)
    finally:
        distributed.shutdown()


@pytest.mark.parametrize(
    ("family", "layout"), [("deepseek_v3", "TP2 x PP2 x EP2"), ("deepseek_v3", "one rank"), ("qwen3", "PP2"), ("llama", "TP2")]
)
def test_what_megatron_saved_from_any_layout_becomes_the_hugging_face_folder(family, layout, tmp_path):
    hf, (ranks, sizes) = config(family), SIX[layout]
    expected = write(tmp_path / "hf", hf)
    (tmp_path / "megatron").mkdir()
    run_ranks(ranks, saved_by_megatron, hf, sizes, str(tmp_path / "hf"), str(tmp_path / "megatron"))
    convert(plans.megatron_to_hf(tmp_path / "megatron", side=tmp_path / "hf"), tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_keys_and_shapes_are_those_that_megatron_saves(tmp_path):
    """Also the extra states, which Megatron's loader misses when they are not there."""
    hf = config("deepseek_v3")
    write(tmp_path / "hf", hf)
    (tmp_path / "megatron").mkdir()
    run_ranks(1, saved_by_megatron, hf, {}, str(tmp_path / "hf"), str(tmp_path / "megatron"))
    convert(plans.hf_to_megatron(tmp_path / "hf"), tmp_path / "ours")
    theirs = pickle.loads((tmp_path / "megatron" / ".metadata").read_bytes()).state_dict_metadata
    ours = pickle.loads((tmp_path / "ours" / "release" / ".metadata").read_bytes()).state_dict_metadata
    assert not theirs.keys() - ours.keys() - {"common_state/shard_0_1"}, "newer cores keep there what is in common.pt"
    for key, entry in theirs.items():
        if hasattr(entry, "size"):
            assert (entry.size, entry.properties.dtype) == (ours[key].size, ours[key].properties.dtype), key
    te = {"decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"}
    assert te <= ours.keys(), "the names of Transformer Engine's layers"


def test_what_is_no_tensor_is_in_a_file_of_its_own_or_in_an_object(tmp_path: Path):
    for name in (".metadata", "metadata.json"):
        assert torch_dist.missing_file(tmp_path) == name
        (tmp_path / name).write_bytes(b"")
    assert torch_dist.missing_file(tmp_path) == "common.pt"
    (tmp_path / ".metadata").write_bytes(b"common_state/shard_0_1")
    assert torch_dist.missing_file(tmp_path) is None


def test_looking_for_the_values_of_a_tensor_keeps_nothing(tmp_path: Path):
    """torch kept a storage of each, and its place in the heap: the memory of a conversion grew with the number of tensors."""

    def storages() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.UntypedStorage) for thing in gc.get_objects())

    files = [tmp_path / f"{i}.distcp" for i in range(8)]
    for file in files:
        torch.save(torch.ones(2, 3), file)
    before = storages()
    found = {torch_dist_reader._values_offset(file, 0, file.stat().st_size) for file in files}
    assert storages() == before
    [offset] = found
    assert files[0].read_bytes()[offset:][:24] == torch.ones(6).numpy().tobytes()
