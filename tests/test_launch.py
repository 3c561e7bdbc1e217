"""How the launcher starts ranks (forked on a CPU, spawned where there is a GPU), ends them, and says which failed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from commands import Command, run

from megatron_r1 import config, launch

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120.0
CONFIG = """
steps = 2
batch_size = 4
chunk_tokens = 256
[run]
dir = "{folder}/run"
[model]
path = "{model}"
init = "random"
[parallel]
world_size = 2
expert_model_parallel_size = 2
[optimizer]
lr = 1e-3
[data]
conversations = "{folder}/conversations.jsonl"
[checkpoint]
export = false
"""


def site(folder: Path) -> Path:
    """The config file of a short SFT run on two ranks."""
    folder.mkdir()
    turns = [[{"role": "user", "content": f"{i} + 1"}, {"role": "assistant", "content": str(i + 1)}] for i in range(16)]
    (folder / "conversations.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    (folder / "sft.toml").write_text(CONFIG.format(folder=folder, model=ROOT / "configs/models/tiny_v3"))
    return folder / "sft.toml"


def losses(config: Path) -> list[Any]:
    lines = (config.parent / "run/metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["policy/loss"], record["policy/grad_norm"]) for record in map(json.loads, lines)]


@pytest.mark.slow
def test_spawned_ranks_train_as_forked_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forked, spawned = site(tmp_path / "forked"), site(tmp_path / "spawned")
    code, output = run("sft", forked, timeout=LIMIT)
    assert code == 0, output
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    ranks = launch.Ranks("sft", spawned, overrides=[], world_size=2, logs=tmp_path)
    for process in ranks.processes:
        process.join(LIMIT)
    assert ranks.poll() == [0, 0], ranks.failure(ranks.poll())
    assert losses(spawned) == losses(forked)
    assert len(losses(forked)) == 2


def test_the_rank_that_failed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    ranks = launch.Ranks("sft", site(tmp_path / "few"), overrides=[], world_size=1, logs=tmp_path)
    ranks.processes[0].join(LIMIT)
    assert ranks.poll() == [2]
    assert "parallel.world_size = 2: 1 ranks were started" in ranks.failure(ranks.poll())


@pytest.mark.parametrize(
    ("seen", "after", "words"),
    [
        ([None, 1], [-9, 1], "whole log: {1}"),
        ([None, 1], [1, 1], "whole log: {1}"),
        ([1, None], [1, 2], "error: it was this one"),
    ],
)
def test_a_rank_that_another_took_along_is_not_blamed(seen: list, after: list, words: str, tmp_path: Path):
    """Unless it says in one line what the user must mend, which may take longer than to notice its end."""
    ranks = object.__new__(launch.Ranks)
    ranks.logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for log in ranks.logs:
        log.write_text("Traceback\n" + "error: it was this one\n" * (2 in after))
    ranks.processes = [SimpleNamespace(exitcode=code) for code in after]
    assert words.format(*ranks.logs) in ranks.failure(seen)


ALL = [f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})" for i in range(8)]
TWO_OF_TWO = ["rollout.servers=2", "rollout.tensor_parallel_size=2"]


def gpus_of_servers(monkeypatch: pytest.MonkeyPatch, folder: Path, named: str | None, overrides: list[str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each server that `launch` starts beside four ranks, where nvidia-smi lists eight GPUs."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in ALL))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(launch, "has_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    own = [f"model.path={ROOT}/configs/models/tiny_v3", f"run.dir={folder}/run", "parallel.world_size=4", "rollout.weight_transfer=nccl"]
    settings = config.load("grpo", ROOT / "configs/tiny_grpo.toml", [*own, *overrides])
    monkeypatch.setattr(launch.Servers, "__enter__", lambda servers: servers)
    monkeypatch.setattr(launch.Servers, "__exit__", lambda *exc: None)
    monkeypatch.setattr(launch, "run_ranks", lambda stage, config, servers: [p.env["CUDA_VISIBLE_DEVICES"] for p in servers.processes])
    return launch.launch("grpo", settings)


@pytest.mark.parametrize(
    ("named", "overrides", "gpus"),
    [
        (None, TWO_OF_TWO, ["4,5", "6,7"]),
        (None, ["rollout.servers=2", 'rollout.vllm_args=["--data-parallel-size", "2"]'], ["4,5", "6,7"]),
        ("9,8,7,6,5,4", ["rollout.servers=2"], ["5", "4"]),
        (None, [*TWO_OF_TWO, "rollout.weight_transfer=ipc"], ["0,1,2,3", "4,5,6,7"]),
        ("0,1,2,3", [*TWO_OF_TWO, "rollout.weight_transfer=ipc", "rollout.placement=colocated"], ["0,1", "2,3"]),
    ],
    ids=["counted", "data parallel", "named", "shared", "colocated"],
)
def test_servers_get_the_gpus_after_the_ranks_unless_they_share_them(named, overrides, gpus, monkeypatch, tmp_path):
    assert gpus_of_servers(monkeypatch, tmp_path, named, overrides) == gpus


def test_too_few_gpus_for_ranks_and_servers_is_one_line(monkeypatch, tmp_path):
    message = r"^rollout\.servers = 3: of 2 GPUs each, beside 4 trainer ranks, they need 10 GPUs, and there are 8; lower these, or set "
    with pytest.raises(ValueError, match=message):
        gpus_of_servers(monkeypatch, tmp_path, None, [*TWO_OF_TWO, "rollout.servers=3"])


@pytest.mark.slow
def test_ctrl_c_reaches_all_processes_of_a_terminal_and_means_save_and_end(tmp_path: Path):
    config = site(tmp_path / "run")
    command = Command("sft", config, "steps=100000", "checkpoint.every=0")
    limit = time.monotonic() + LIMIT
    while not (config.parent / "run/metrics.jsonl").exists():
        assert command.poll() is None, command.output
        assert time.monotonic() < limit
        time.sleep(0.1)
    for process in [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]:
        process.send_signal(signal.SIGINT)
    code, output = command.wait(LIMIT)
    assert code == 0, output
    assert "ended on request" in output
    assert (config.parent / "run/checkpoints/latest").exists()
