"""The jobs themselves on a real Slurm, with a stub for the program: sizes, containers, chains, bad nodes, lost nodes."""

from __future__ import annotations

import re
import time
from itertools import permutations

import pytest
from cluster import ROOT, STUB, Run

SCRIPTS = ("grpo", "sft", "convert")


@pytest.fixture
def run(cluster, request) -> Run:
    """A run of the test's name."""
    return Run(cluster, request.node.name.removeprefix("test_")[:40].strip("_"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_accepts_a_script_and_its_options(cluster, script):
    assert "to start at" in cluster.run("sbatch", "--test-only", f"slurm/{script}.sh", "a.toml")


def test_256_ranks_and_31_servers_of_a_job_of_512_gpus_start_within_30_seconds_and_a_lost_server_node_stops_nobody(cluster, run):
    (run.folder / "hold").touch()
    cluster.wait_idle()
    started = time.monotonic()
    job = run.submit("slurm/grpo.sh", "a.toml", nodes=64, gpus=8, PYTHON=STUB, TRAIN_NODES="32", ROLLOUT_NODES="31")
    cluster.wait(lambda: len(list(run.folder.glob("ranks/*"))) == 256, "256 ranks")
    cluster.wait(lambda: len(list(run.folder.glob("logs/latest/rollout-*.log"))) == 31, "31 servers")
    assert time.monotonic() - started < 30.0
    assert run.nodes(job)["spare"] == ["n64"]
    assert "error" not in run.output()
    cluster.lose_node("n40")
    run.wait_text("Node failure on n40")
    (run.folder / "hold").unlink()
    run.wait_end()
    assert run.end_of(job) == "COMPLETED 0", run.output()
    assert (run.folder / "done").read_text() == "256 ranks\n"
    urls = (run.folder / "grpo.arguments").read_text().split("rollout.urls=")[1].split(",")
    port = cluster.env["PORT"]
    assert (len(urls), urls[0], urls[-1].strip()) == (31, f'["http://n33:{port}"', f'"http://n63:{port}"]')


def test_a_stop_file_ends_the_chain_and_keeps_the_next_job_from_starting(cluster, run):
    (run.folder / "hold").touch()
    job = run.submit("slurm/sft.sh", "a.toml", nodes=2, PYTHON=STUB)
    cluster.wait(lambda: len(list(run.folder.glob("ranks/*"))) == 2, "2 ranks")
    (run.folder / "stop").touch()
    run.wait_end()
    assert run.end_of(job) == "COMPLETED 0"
    assert not (run.folder / "done").exists()
    job = run.submit("slurm/sft.sh", "a.toml", nodes=2, PYTHON=STUB)
    run.wait_end()
    assert f"{run.folder}/stop is there: delete it to go on" in run.output(job)


def test_every_command_of_a_job_runs_in_its_container(cluster, run):
    (run.folder / "bin").mkdir()
    (run.folder / "bin/python").symlink_to(STUB)
    image = {"IMAGE": "/images/r1.sqsh", "MOUNTS": "/shared:/shared", "PATH": f"{run.folder}/bin:{cluster.env['PATH']}"}
    run.submit("slurm/grpo.sh", "a.toml", nodes=2, TRAIN_NODES="1", ROLLOUT_NODES="1", **image)
    run.wait_end()
    assert (run.folder / "done").exists(), run.output()
    for command in ("plan", "doctor", "serve", "grpo"):
        given = (run.folder / f"{command}.container").read_text()
        assert "PYXIS_STUB_CONTAINER_IMAGE=/images/r1.sqsh\nPYXIS_STUB_CONTAINER_MOUNTS=/shared:/shared\n" in given, command
        assert f"PYXIS_STUB_CONTAINER_WORKDIR={ROOT}\n" in given, command


def test_a_pipeline_submits_each_stage_when_the_one_before_is_done_and_passes_over_it_the_next_time(cluster, run):
    stages = run.folder / "stages.txt"
    names = ["pipe_convert", "pipe_sft", "pipe_rl"]
    stages.write_text(
        "pipe_convert convert NODES=1 hf-to-megatron in out\n"
        "pipe_sft     sft     NODES=2 TRAIN_NODES=2 a.toml\n"
        "pipe_rl      grpo    NODES=3 TRAIN_NODES=1 ROLLOUT_NODES=2 b.toml\n"
    )
    folders = {name: ROOT / "runs" / name for name in names}
    submit = {"PYTHON": STUB, "SBATCH_OUTPUT": f"{run.folder}/%x-%j.out", "SBATCH_GPUS_PER_NODE": "1"}
    try:
        for times in (1, 2):
            cluster.run("bash", "slurm/pipeline.sh", str(stages), **submit)
            cluster.wait(lambda: not cluster.run("squeue", "-h"), "the end of the pipeline")
            last = max(run.folder.glob("pipe_rl-*.out"), key=lambda f: f.stat().st_mtime).read_text()
            assert "all 3 stages" in last and str(stages) in last
            assert len(list(run.folder.glob("pipe_rl-*.out"))) == times
        assert (folders["pipe_sft"] / "done").read_text() == "2 ranks\n"
        assert (folders["pipe_rl"] / "done").read_text() == "1 ranks\n"
        assert "is done" in last
    finally:
        for folder in folders.values():
            cluster.run("rm", "-rf", str(folder))


def test_nodes_whose_links_are_slow_are_bad(cluster, run):
    python = str(ROOT / ".venv/bin/python")
    job = run.submit("tests/slurm/links.sh", nodes=2, PYTHON=python, NODE_GBPS="0.001", PAIR_GBPS="1000000")
    run.wait_end()
    assert run.end_of(job) == "FAILED 1"
    pairs = re.findall(r"bad (n\d+): all-reduce between nodes: [0-9.e-]+ GB/s with (n\d+), 1e\+06 are needed", run.output())
    assert sorted(pairs) == sorted(permutations(run.hosts(job)))
    assert "only 0 of the 2 nodes that are needed are healthy" in run.output()


def test_a_config_that_does_not_fit_the_job_ends_before_anything_starts(cluster, run):
    config = ["configs/tiny_grpo.toml", "model.path=configs/models/tiny_v3", "model.init=random"]
    job = run.submit("slurm/grpo.sh", *config, "parallel.expert_model_parallel_size=3", nodes=4)
    run.wait_end()
    assert run.end_of(job) == "FAILED 2"
    assert "error: parallel.expert_model_parallel_size = 3" in run.output()
    assert "error: the config does not fit this job" in run.output()
    assert not list(run.folder.glob("logs/*/preflight*"))
