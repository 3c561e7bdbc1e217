"""What can be said of slurm/*.sh without a Slurm: their syntax, and what DRY_RUN=1 shows that they would start."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cluster import HERE, ROOT, require

from megatron_r1 import checks, cluster, config
from megatron_r1.models import kernels

SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *HERE.glob("*.sh"), HERE / "nvidia-smi"])
JOBS = {"grpo": "configs/tiny_grpo.toml", "sft": "configs/tiny_sft.toml", "convert": "hf-to-megatron in out"}
PARTS = ("rank.sh", "server.sh", "site.example.sh", "preflight.sh", "down.sh", "nvidia-smi")  # one command, or none that must not fail
COMMANDS = ("configs/v3_671b_grpo.toml", "configs/v3_671b_sft.toml", "slurm/grpo.sh", "slurm/sft.sh", "README.md")


def dry_run(script: str, *arguments: str, code: int = 0, **env: str) -> str:
    """What a script would do, on a machine without a Slurm; `env` are the job's settings."""
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1"} | env
    found = subprocess.run(["bash", script, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout


def step(shown: str, name: str) -> list[str]:
    """The words of the srun line of one step."""
    [line] = [line for line in shown.splitlines() if f"--job-name={name} " in line]
    return shlex.split(line)


def test_shellcheck_finds_nothing():
    require("shellcheck", root=False)
    found = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_stops_at_errors_and_is_short(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    is_part = script.name in (
        "rank.sh",
        "server.sh",
        "site.example.sh",
        "preflight.sh",
        "down.sh",
        "nvidia-smi",
    )  # no step of them may fail
    assert is_part or "set -euo pipefail" in text or '. "${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh"' in text
    assert len(text.splitlines()) <= 170


def test_a_dry_run_of_grpo_shows_every_step_with_all_its_sizes():
    shown = dry_run("slurm/grpo.sh", "a.toml", "optimizer.lr=1e-5", NODES="7", TRAIN_NODES="4", ROLLOUT_NODES="2", GPUS="8")
    sizes = {"preflight": (7, 7, 1), "allreduce": (7, 56, 8), "grpo": (4, 32, 8), "rollout": (2, 2, 1)}
    for name, (nodes, tasks, per_node) in sizes.items():
        assert {f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={per_node}", "--overlap"} <= set(step(shown, name)), name
    trainer, rollout = step(shown, "grpo"), step(shown, "rollout")
    assert {"--nodelist=node001,node002,node003,node004", "--kill-on-bad-exit=1"} <= set(trainer)
    assert {"--nodelist=node005,node006", "--kill-on-bad-exit=0", "--no-kill"} <= set(rollout)
    assert {"a.toml", "optimizer.lr=1e-5", "parallel.world_size=32"} <= set(trainer) & set(rollout)
    assert 'rollout.urls=["http://node005:8000","http://node006:8000"]' in trainer
    assert "spare node007" in shown


def test_a_dry_run_names_every_server_of_a_node_and_one_of_a_group_of_nodes():
    many = step(dry_run("slurm/grpo.sh", "a.toml", NODES="3", TRAIN_NODES="1", SERVERS="2"), "grpo")
    assert many[-1] == 'rollout.urls=["http://node002:8000","http://node002:8001","http://node003:8000","http://node003:8001"]'
    wide = step(dry_run("slurm/grpo.sh", "a.toml", NODES="5", TRAIN_NODES="1", ROLLOUT_NODES="4", SERVER_NODES="2"), "grpo")
    assert wide[-1] == 'rollout.urls=["http://node002:8000","http://node004:8000"]'


def test_a_dry_run_of_a_colocated_job_serves_where_it_trains():
    shown = dry_run("slurm/grpo.sh", "a.toml", NODES="3", TRAIN_NODES="2", PLACEMENT="colocated")
    assert "train node001 node002 | rollout node001 node002 | spare node003" in shown
    assert "rollout.placement=colocated" in step(shown, "grpo")


@pytest.mark.parametrize("stage", ["eval", "reject"])
def test_a_dry_run_of_a_stage_without_a_trainer_is_one_process_beside_the_servers(stage):
    shown = dry_run("slurm/grpo.sh", "a.toml", STAGE=stage, NODES="3", ROLLOUT_NODES="3", GPUS="8")
    assert {"--nodelist=node001", "--ntasks=1", stage, "parallel.world_size=1"} <= set(step(shown, stage))
    assert {"--ntasks=3", "serve", stage} <= set(step(shown, "rollout"))


def test_a_dry_run_of_a_reward_model_trains_it_as_sft_does():
    shown = dry_run("slurm/sft.sh", "a.toml", STAGE="reward-model", NODES="3", TRAIN_NODES="2", GPUS="8")
    assert {"--nodelist=node001,node002", "--ntasks=16", "a.toml", "parallel.world_size=16"} <= set(step(shown, "reward-model"))


def test_a_stage_that_samples_is_not_trained_without_servers():
    assert "STAGE = grpo: no stage that only trains; use slurm/grpo.sh" in dry_run("slurm/sft.sh", "a.toml", code=2, STAGE="grpo")


def test_a_dry_run_of_a_conversion_goes_on_with_what_is_there_unless_it_is_to_be_overwritten():
    def arguments(*given: str) -> list[str]:
        words = step(dry_run("slurm/convert.sh", *given), "convert")
        return words[words.index("convert") + 1 :]

    assert arguments("hf-to-megatron", "in", "out") == ["hf-to-megatron", "in", "out", "--resume"]
    assert arguments("fp8-cast", "in", "out", "--overwrite") == ["fp8-cast", "in", "out", "--overwrite"]
    assert arguments("verify", "out") == ["verify", "out"]


def test_a_dry_run_puts_every_step_into_the_container():
    shown = dry_run("slurm/grpo.sh", "a.toml", IMAGE="/images/r1.sqsh", MOUNTS="/shared:/shared")
    for name in ("preflight", "allreduce", "grpo", "rollout"):
        assert {"--container-image=/images/r1.sqsh", "--container-mounts=/shared:/shared"} <= set(step(shown, name))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"NODES": "3"}, "TRAIN_NODES, ROLLOUT_NODES = 2, 2: more than the job's 3 nodes; raise --nodes to 4"),
        ({"SERVER_NODES": "3"}, "TRAIN_NODES, ROLLOUT_NODES = 2, 2: not in groups of SERVER_NODES = 3"),
        ({"SERVERS": "2", "SERVER_NODES": "2"}, "SERVERS, SERVER_NODES = 2, 2: set one to 1"),
        ({"PLACEMENT": "near"}, "PLACEMENT = near: no such placement; use dedicated or colocated"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_with_what_to_change(settings, line):
    assert f"error: {line}" in dry_run("slurm/grpo.sh", "a.toml", code=2, **settings)


def test_a_dry_run_of_a_pipeline_shows_each_stage_with_its_own_settings(tmp_path):
    (tmp_path / "stages.txt").write_text(
        "# name, stage, the job, the config\n"
        "cold sft NODES=9 TRAIN_NODES=8 a.toml optimizer.lr=1e-5\n\n"
        "rl grpo NODES=7 ROLLOUT_NODES=4 SERVER_NODES=2 b.toml model.path=runs/cold/hf   # on what the first made\n"
        "pick reject ROLLOUT_NODES=4 c.toml\n"
        "helpful reward-model NODES=2 d.toml\n"
    )
    shown = dry_run("slurm/pipeline.sh", f"{tmp_path}/stages.txt").splitlines()
    assert shown == [
        "NODES=9 TRAIN_NODES=8 sbatch -J cold --nodes=9 slurm/sft.sh a.toml optimizer.lr=1e-5",
        "NODES=7 ROLLOUT_NODES=4 SERVER_NODES=2 sbatch -J rl --nodes=7 slurm/grpo.sh b.toml model.path=runs/cold/hf",
        "ROLLOUT_NODES=4 sbatch -J pick slurm/grpo.sh c.toml",
        "NODES=2 sbatch -J helpful --nodes=2 slurm/sft.sh d.toml",
        f"all 4 stages of {tmp_path}/stages.txt are done",
    ]
    assert dry_run("slurm/pipeline.sh", f"{tmp_path}/stages.txt", "3").startswith("ROLLOUT_NODES=4 sbatch -J pick")


@pytest.mark.parametrize("file", COMMANDS)
def test_a_preset_fits_the_job_that_a_file_says_to_submit(file, tmp_path, monkeypatch, capsys):
    """The command is run dry on nodes of 8 GPUs, and `plan` is given what the job would give it."""
    command = re.search(
        r"^(?:#   )?((?:[A-Z_]+=\d+ )+)sbatch -J \w+ --nodes=(\d+) (slurm/\w+\.sh) (configs/\S+)", (ROOT / file).read_text(), re.M
    )
    settings = dict(pair.split("=") for pair in command[1].split())
    shown = dry_run(command[3], command[4], NODES=command[2], GPUS="8", **settings)
    stage = Path(command[3]).stem
    trainer = step(shown, stage)
    overrides = trainer[trainer.index(command[4]) + 1 :]
    assert f"parallel.world_size={8 * int(settings['TRAIN_NODES'])}" in overrides
    assert config.load(stage, ROOT / command[4]).parallel.world_size == 8 * int(settings["TRAIN_NODES"]), "the file says it too"

    model = tmp_path / "model"  # its shapes are real, its weights are far away
    model.mkdir()
    (model / "config.json").write_text((ROOT / "configs/models/deepseek_v3/config.json").read_text())
    for name in ("tokenizer_config.json", "model.safetensors", "data.jsonl"):
        (model / name).touch()
    data = "conversations" if stage == "sft" else "jsonl"
    monkeypatch.setattr(checks, "has_gpu", lambda: True)
    monkeypatch.setattr(kernels, "is_installed", lambda name: True)
    local = [f"run.dir={tmp_path}/run", f"model.path={model}", f"data.{data}={model}/data.jsonl"]
    assert cluster.plan(["--gpus", "8", stage, str(ROOT / command[4]), *overrides, *local]) == 0
    assert f"{8 * int(settings['TRAIN_NODES'])} trainer ranks" in capsys.readouterr().out
