"""`sbatch slurm/grpo.sh` on a real Slurm with virtual nodes, the real trainer and real vLLM servers: 2 nodes train, 1 serves, 1 spare.

Whatever happens on the way, the run's losses are those of the run that nothing disturbed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, losses, open_folder, output, require_slurm

pytestmark = pytest.mark.slow

CONFIG = """
steps = 6
reference_refresh_steps = 4
[model]
path = "{model}"
init = "random"
[parallel]
expert_model_parallel_size = 2
timeout_minutes = 2
[optimizer]
lr = 1e-3
[data]
reasoning_gym = "chain_sum"
size = 64
[batch]
problems = 4
completions = 4
minibatches = 2
chunk_tokens = 512
[rollout]
max_prompt_tokens = 96
kv_cache_mib = 64
max_num_seqs = 16
start_timeout_seconds = 120.0
[sampling]
max_tokens = 24
[checkpoint]
every = 2
"""
STEPS = [1, 2, 3, 4, 5, 6]
SIZES = {"TRAIN_NODES": "2", "ROLLOUT_NODES": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    require_slurm()
    folder = open_folder()
    (folder / "grpo.toml").write_text(CONFIG.format(model=ROOT / "configs/models/tiny_v3"))
    with Cluster(folder, nodes=4, gpus=1) as cluster:
        yield cluster


def submit(cluster: Cluster, name: str, *overrides: str, **env: str) -> tuple[Path, str]:
    """Start a run; its folder and its first job."""
    run = cluster.folder / name
    return run, cluster.submit(run, "slurm/grpo.sh", f"{cluster.folder}/grpo.toml", *overrides, nodes=4, **SIZES, **env)


def wait_for_step(cluster: Cluster, run: Path, step: int) -> None:
    cluster.wait(lambda: max(losses(run), default=0) >= step, f"step {step} of {run.name}")


def wait_for_checkpoint(cluster: Cluster, run: Path) -> None:
    cluster.wait((run / "checkpoints/latest").exists, f"a checkpoint of {run.name}")


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster) -> Path:
    """A run that nothing disturbed."""
    run, _ = submit(cluster, "unbroken")
    cluster.wait_end("unbroken")
    assert sorted(losses(run)) == STEPS, output(run)
    return run


def test_a_job_trains_saves_exports_and_cancels_its_successor(cluster, unbroken):
    assert (unbroken / "done").exists()
    assert (unbroken / "hf/model.safetensors").exists()
    assert "train n1 n2 | rollout n3 | spare n4" in output(unbroken)
    assert len(list(unbroken.glob("*.out"))) == 1, "the successor never started"
    assert {"grpo.toml", "metrics.jsonl", "tensorboard", "checkpoints", "logs"} <= {p.name for p in unbroken.iterdir()}
    assert {"env.txt", "grpo-0000.log", "grpo-0001.log", "rollout-0000.log"} <= {p.name for p in (unbroken / "logs/latest").iterdir()}


def test_secrets_stay_out_of_the_recorded_environment(cluster, unbroken):
    recorded = (unbroken / "logs/latest/env.txt").read_text()
    assert "SLURM_JOB_ID=" in recorded
    assert "PRIVATE_API_KEY" not in recorded


def test_usr1_saves_and_the_successor_goes_on(cluster, unbroken):
    run, job = submit(cluster, "signalled")
    wait_for_step(cluster, run, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_end("signalled")
    assert "USR1: save and end" in output(run)
    assert "resumed at step" in "".join(f.read_text() for f in run.glob("logs/*/grpo-0000.log"))
    assert (run / "done").exists()
    assert losses(run) == losses(unbroken)


def test_a_trainer_rank_that_is_killed_costs_a_job_and_no_step(cluster, unbroken):
    run, _ = submit(cluster, "killed")
    wait_for_checkpoint(cluster, run)
    cluster.run("pkill", "-9", "-f", f"megatron_r1 grpo .*run.dir={run} ", check=False)
    cluster.wait_end("killed")
    assert (run / "done").exists(), output(run)
    assert losses(run) == losses(unbroken)


def test_a_trainer_node_that_goes_down_is_replaced(cluster, unbroken):
    run, _ = submit(cluster, "node-lost")
    wait_for_checkpoint(cluster, run)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=ci")
    try:
        cluster.wait(lambda: "rollout" in output(run).split("successor")[-1], "the successor's start")
    finally:
        cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    cluster.wait_end("node-lost")
    assert (run / "done").exists(), output(run)
    assert losses(run) == losses(unbroken)


def test_a_dead_server_is_restarted_on_its_node_and_the_trainer_goes_on(cluster, unbroken):
    run, _ = submit(cluster, "server-lost")
    wait_for_step(cluster, run, 2)
    cluster.run("pkill", "-9", "-f", "megatron_r1.rollout.vllm_serve .*--host n3 ")
    cluster.wait_end("server-lost")
    assert len(list(run.glob("*.out"))) == 1, "one job did it all"
    assert (run / "done").exists(), output(run)
    assert losses(run) == losses(unbroken)


def test_a_stop_file_ends_the_chain_after_a_save(cluster):
    run, _ = submit(cluster, "stopped", "steps=600")
    wait_for_step(cluster, run, 2)
    (run / "stop").touch()
    cluster.wait_end("stopped")
    assert not (run / "done").exists()
    assert int((run / "checkpoints/latest").read_text().strip().removeprefix("step-")) == max(losses(run))


def test_a_config_that_does_not_fit_the_job_ends_before_anything_starts(cluster):
    run, _ = submit(cluster, "misfit", "parallel.expert_model_parallel_size=3")
    cluster.wait_end("misfit")
    assert "error: parallel.expert_model_parallel_size = 3" in output(run)
    assert "the config does not fit this job" in output(run)
    assert not list(run.glob("logs/*/preflight*"))
    shutil.rmtree(run)


def test_status_says_where_a_run_stands(cluster, unbroken):
    said = cluster.run(str(ROOT / ".venv/bin/python"), "-m", "megatron_r1", "status", str(unbroken))
    assert "6 of 6" in said
    assert "done" in said
