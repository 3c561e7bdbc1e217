"""`convert compare --logits`: transformers on one folder and Megatron on the other answer a text alike, or the exit code says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import config, write_model
from safetensors.torch import load_file, save_file

from megatron_r1.weights import conversion, plans

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny_v3"  # for its tokenizer


def compare(a: Path, b: Path) -> tuple[int, str]:
    argv = [sys.executable, "-m", "megatron_r1", "convert", "compare", str(a), str(b), "--logits", "What is 17 plus 25?"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return done.returncode, (done.stdout or done.stderr).splitlines()[-1]


def write(folder: Path, family: str = "qwen3_moe") -> Path:
    shutil.copytree(TINY, folder)
    write_model(config(family, vocab_size=json.loads((TINY / "config.json").read_text())["vocab_size"]), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("logits") / "model")


def test_a_converted_checkpoint_loaded_by_megatron_answers_like_the_original(model, tmp_path):
    conversion.run(plans.hf_to_megatron(model), tmp_path / "megatron", workers=2, resume=False, overwrite=False)
    code, line = compare(model, tmp_path / "megatron")
    assert code == 0, line
    assert "the likeliest token is the same at" in line


def test_other_weights_end_with_code_1(model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors["lm_head.weight"][5] += 0.001
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    code, line = compare(model, tmp_path / "other")
    assert code == 1, line


def test_another_model_ends_with_code_2_and_one_line(model, tmp_path):
    conversion.run(plans.hf_to_megatron(model), tmp_path / "megatron", workers=2, resume=False, overwrite=False)
    code, line = compare(write(tmp_path / "llama", "llama"), tmp_path / "megatron")
    assert code == 2, line
    assert "another model than config.json describes" in line
