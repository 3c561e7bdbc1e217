"""The whole pipeline on real servers and ranks, shorter than `make r1-tiny`: killed in the middle, it goes on to its end and its page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import families
import pytest
from killed_pipeline import kill
from processes import running

from megatron_r1 import report
from megatron_r1.stages.pipeline import GRAPH

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600.0

SHORT = """
[model]
dtype = "float32"
[optimizer]
lr_warmup_steps = 0
[parallel]
world_size = 1
expert_model_parallel_size = 1
[data]
held_out = 8
[rollout]
servers = 1
kv_cache_mib = 64
max_num_seqs = 32
[sampling]
max_tokens = 16
[evaluation]
problems = 0
"""
OF_STAGE = {
    "grpo": """
steps = 4
reference_refresh_steps = 2
[batch]
problems = 4
completions = 4
minibatches = 2
chunk_tokens = 512
[checkpoint]
every = 2
""",
    "sft": "steps = 2\nbatch_size = 4\nchunk_tokens = 512\n",
    "reject": "samples = 4\n[required]\naccuracy = 0.0\n[filters]\nneeds_reasoning = false\nmin_language_share = 0.0\n",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's config, with a random base model and problems that it will hardly solve."""
    folder = tmp_path_factory.mktemp("pipeline")
    base = folder / "base"
    shutil.copytree(ROOT / "configs/models/tiny_v3", base)
    families.write_model(json.loads((base / "config.json").read_text()), base)
    (folder / "problems.jsonl").write_text("".join(f'{{"prompt": "{i} + {i}", "answer": "{2 * i}"}}\n' for i in range(72)))
    talks = [[{"role": "user", "content": f"{i} + 1"}, {"role": "assistant", "content": f"<think></think>{i + 1}"}] for i in range(16)]
    (folder / "cold.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    given = tomllib.loads((ROOT / "configs/tiny/pipeline.toml").read_text())
    commands = {stage.name: stage.command for stage in GRAPH}
    files = {}
    for name, config in given["stages"].items():
        (folder / "short.toml").write_text(SHORT)
        (folder / f"of_{commands[name]}.toml").write_text(OF_STAGE[commands[name]])
        files[name] = folder / f"{name}.toml"
        files[name].write_text(f'base = ["{ROOT / config}", "short.toml", "of_{commands[name]}.toml"]\n')
    paths = {"dir": folder / "r1", "base_model": base, "student": "configs/models/tiny_qwen2"}
    paths |= {"problems": folder / "problems.jsonl", "cold_start": folder / "cold.jsonl"}
    lines = [f'{name} = "{path}"' for name, path in paths.items()] + ["[stages]"] + [f'{name} = "{file}"' for name, file in files.items()]
    (folder / "pipeline.toml").write_text("\n".join(lines))
    return folder / "pipeline.toml"


def test_a_pipeline_killed_in_the_middle_goes_on_to_its_end_and_its_page(settings):
    root = settings.parent / "r1"
    command = [sys.executable, "-m", "megatron_r1", "pipeline", str(settings)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit = time.monotonic() + LIMIT
    while not (root / "r1_rl_stage1/checkpoints/latest").exists():
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < limit, "no checkpoint of the first RL stage"
        time.sleep(0.1)
    kill(first)
    assert not running(str(settings.parent)), "nothing outlives the run"
    second = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False)
    assert second.returncode == 0, second.stdout
    assert "--- r1_zero: done" in second.stdout
    assert "resumed at step 2" in second.stdout
    assert all((root / stage.name / "done").exists() for stage in GRAPH)
    html = report.write([root]).read_text()
    assert all(stage.name in html for stage in GRAPH)
