"""What of the GPU check needs no GPU: its count of operations, its table, its JSON, and how it ends where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mcore_runs import model

from benchmarks.gpu_check import flops, models
from benchmarks.gpu_check.report import Row, as_json, collect, emit, table

ROOT = Path(__file__).resolve().parents[1]
V3 = json.loads((ROOT / "configs/models/deepseek_v3/config.json").read_text())
SMALL = {
    "hidden_size": 10,
    "num_attention_heads": 2,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "intermediate_size": 7,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "vocab_size": 20,
}


def test_operations_of_a_small_model_are_those_counted_by_hand():
    # q: 10x6 + 6x(2x5); kv: 10x(5+2) + 5x2x(3+4); out: 2x4x10
    mla = 60 + 60 + 70 + 70 + 80
    dense = 2 * (mla + 3 * 10 * 7)
    moe = 2 * (mla + 10 * 4 + (2 + 1) * 3 * 10 * 8)
    assert flops.layer(SMALL, dense=True) == dense == 1100
    assert flops.layer(SMALL, dense=False) == moe == 2200
    pairs = 1 + (1 + 2 + 3)  # sequences of 1 and 3 tokens
    assert flops.attention(SMALL, [1, 3]) == 2 * pairs * 2 * (5 + 4) == 252
    forward = 4 * (dense + 2 * moe + 2 * 10 * 20) + 3 * 252
    assert flops.forward(SMALL, [1, 3]) == forward == 24356
    assert flops.training(SMALL, [1, 3]) == 3 * forward
    full_rank = flops.layer(SMALL | {"q_lora_rank": None}, dense=True)
    assert full_rank == dense + 2 * (10 * 10 - 60 - 60)


def test_v3_computes_two_operations_for_each_of_its_37_billion_active_parameters():
    embedding, vectors = V3["vocab_size"] * V3["hidden_size"], 61 * (2 * 7168 + 1536 + 512) + 7168
    assert flops.forward(V3, [1]) / 2 == pytest.approx(37.55e9 - embedding - vectors, rel=2e-3)


def test_the_stacks_keep_v3s_layer_shapes_and_are_models_that_are_built():
    from megatron_r1.models import family

    for hf in (models.stack(), models.comparison()):
        family(hf).check(hf)
        for name in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "v_head_dim"):
            assert hf[name] == V3[name]
    family(models.served()).check(models.served())


ROWS = [
    Row("speed", "MFU of BF16", 0.5, target=0.45),
    Row("speed", "over the bare loop", 1.05, "x", target=1.03, at_most=True),
    Row("rollout", "sync", None, note="vLLM is not installed"),
    Row("layers", "nothing", float("nan"), target=1.0, at_most=True),
]


def test_the_table_says_what_was_met_missed_and_skipped(capsys):
    text = table(ROWS, {"device": "H100", "torch": "2.11"})
    assert text.splitlines()[0] == "device H100, torch 2.11"
    assert "| speed: MFU of BF16 | 0.5 | >= 0.45 | ok |" in text
    assert "| speed: over the bare loop | 1.05 x | <= 1.03 | MISSED |" in text
    assert "| rollout: sync | - |  | skipped; vLLM is not installed |" in text
    assert "| layers: nothing | nan | <= 1 | MISSED |" in text
    for row in ROWS[:3]:
        emit(row)
    print("some other line")
    assert collect(capsys.readouterr().out) == ROWS[:3]
    assert [row["verdict"] for row in as_json(ROWS, {})["rows"]] == ["ok", "MISSED", "skipped", "MISSED"]


def test_without_a_gpu_it_ends_with_one_line_and_code_2(tmp_path):
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, ROOT / "tools/gpu_check.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.strip().splitlines() == ["error: make gpu-check: needs an NVIDIA GPU that torch sees, and there is none here"]
    assert not list(tmp_path.iterdir())


def section(name: str) -> list[Row]:
    """On a rank: a section of the check on a small model, with what stands for Transformer Engine."""
    import contextlib
    import io

    from benchmarks.gpu_check import training
    from megatron_r1.mcore import distributed
    from megatron_r1.parallel import Parallel

    models.comparison = lambda: model(num_nextn_predict_layers=0)
    training.STEPS, training.TAIL, training.TOKENS = 6, 2, 256
    training.LENGTHS = (40, 17, 5, 66)
    output = io.StringIO()
    distributed.init(Parallel(), seed=1)
    with contextlib.redirect_stdout(output):
        getattr(training, name)()
    distributed.shutdown()
    return collect(output.getvalue())


def test_the_comparisons_of_layers_find_no_difference_where_there_is_none(on_engine):
    rows = {row.name: row for row in on_engine(1, section, "layers")[0]}
    assert len(rows) == 5
    assert all(row.verdict == "ok" for row in rows.values()), rows
    assert rows["tensors that loading and exporting changed"].value == 0


def test_the_loss_curves_start_from_the_same_weights_and_learn(on_engine):
    bf16, low, difference = on_engine(1, section, "curve")[0]
    assert bf16.note == low.note, "the stand-in computes FP8 in bf16: the first loss is the same"
    assert difference.value < 2e-3
    assert bf16.value < float(bf16.note.split()[1].rstrip(",")), "it falls"


def parameters_before_each() -> list[int]:
    """On a rank: how many there are as each policy of the loss curves and of the timing is built."""
    import gc
    from unittest import mock

    import torch

    from benchmarks.gpu_check import training
    from megatron_r1.mcore import distributed
    from megatron_r1.parallel import Parallel

    found, build = [], training.policy_of

    def counted(*args, **options):
        found.append(sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects()))
        return build(*args, **options)

    def once(*calls):
        return [float(call() is not None) + 1.0 for call in calls]

    small = {"comparison": lambda: model(num_nextn_predict_layers=0), "stack": lambda: model(num_nextn_predict_layers=0)}
    sizes = {"STEPS": 2, "TAIL": 1, "TOKENS": 64, "TIMED": (40, 17)}
    gpu = {"reset_peak_memory_stats": lambda: None, "get_device_name": lambda: "", "max_memory_allocated": lambda: 0}
    distributed.init(Parallel(), seed=1)
    with (
        mock.patch.multiple(models, **small),
        mock.patch.multiple(training, policy_of=counted, milliseconds=once, **sizes),
        mock.patch.multiple(torch.cuda, **gpu),
    ):
        training.curve()
        for _ in range(2):
            training.timed("", 1.0, target=None, steps=True)
    distributed.shutdown()
    return found


def test_each_policy_has_the_gpu_to_itself(on_engine):
    assert on_engine(1, parameters_before_each)[0] == [0, 0, 0, 0]


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_rollouts_config_is_one_that_the_program_reads(quantization, tmp_path):
    from benchmarks.gpu_check import rollout
    from megatron_r1 import checks
    from megatron_r1.config import load

    folder = rollout.model_folder(tmp_path / "model")
    (tmp_path / "grpo.toml").write_text(rollout.GRPO.format(model=folder, kernels='transformer_impl = "local"', quantization=quantization))
    config = load("grpo", tmp_path / "grpo.toml")
    assert (config.rollout.quantization, config.kernels.transformer_impl) == (quantization, "local")
    checks.check_layout(config, checks.check_model(config))
    checks.check_batch(config)


def test_the_bytes_of_a_sync_are_those_of_its_tensors():
    from benchmarks.gpu_check.rollout import bytes_sent

    hf = models.served()
    expert = 3 * hf["hidden_size"] * hf["moe_intermediate_size"]
    experts = 5 * (hf["n_routed_experts"] + hf["n_shared_experts"]) * expert
    bf16, low = bytes_sent("none"), bytes_sent("fp8")
    assert 2 * experts < bf16 < 2.5 * experts, "experts are the most of it"
    assert low == pytest.approx(bf16 / 2, rel=0.01), "all but embedding, head, norms and router is halved"
