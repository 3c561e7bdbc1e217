"""Whatever happens to a job, it ends as docs/slurm.md says, and the run's losses are those of a run that nothing happened to."""

from __future__ import annotations

import re
import subprocess
from itertools import chain

import faults
import pytest
from cluster import ROOT, Cluster

pytestmark = pytest.mark.slow

ROW = re.compile(r"^\| ([^|]+?) +\| ([A-Z_]+) (\d+)(?: or (\d+))? +\| ([^|]+?) +\|", re.MULTILINE)
TABLE = {
    fault: ({f"{state} {code}" for code in codes if code}, then)
    for fault, state, *codes, then in ROW.findall((ROOT / "docs/slurm.md").read_text())
}


@pytest.fixture(scope="module")
def story(cluster: Cluster) -> faults.Story:
    return faults.tell(cluster)


@pytest.fixture(scope="module")
def losses(story: faults.Story) -> dict[int, tuple[float, float]]:
    """Of each step of the run that nothing disturbed: loss and gradient norm."""
    updates = story.unbroken.updates()
    assert [u.step for u in updates] == list(range(1, faults.STEPS + 1)), story.unbroken.output()
    assert len({u.loss for u in updates}) > faults.STEPS // 2, "there is something to compare"
    return {u.step: (u.loss, u.grad_norm) for u in updates}


@pytest.mark.parametrize("fault", TABLE)
def test_a_job_ends_as_the_table_says_and_what_comes_then_has_the_losses_of_the_unbroken_run(fault, story, losses):
    end = story.ends[fault]
    states, then = TABLE[fault]
    assert end.job in states and end.then == then, f"{end}: {story.outputs[fault]}"
    later = [e.first for e in story.ends.values() if e.first > end.first]
    after = story.run.updates()[end.first : min(later, default=None)]
    assert after or fault == "nothing", "the run went on"
    assert all((u.loss, u.grad_norm) == losses[u.step] for u in after)


def test_the_table_has_every_fault(story):
    assert set(story.ends) == set(TABLE)


def test_a_run_that_everything_happened_to_is_done_with_the_losses_of_the_unbroken_run(story, losses):
    assert (story.run.folder / "done").read_text() == f"{faults.STEPS}\n"
    assert {u.step: (u.loss, u.grad_norm) for u in story.run.updates()} == losses


def test_a_job_that_nothing_happens_to_trains_saves_exports_and_cancels_its_successor(story):
    run = story.run
    assert (run.folder / "hf/model.safetensors").exists()
    assert {"done", "grpo.toml", "metrics.jsonl", "tensorboard", "checkpoints", "logs"} <= {p.name for p in run.folder.iterdir()}
    logs = {p.name for p in (run.folder / "logs/latest").iterdir()}
    assert {"env.txt", "grpo.toml", "grpo-0000.log", "grpo-0001.log", "rollout-0000.log", "preflight-0003.log"} <= logs
    assert list(map(len, run.nodes((run.folder / "logs/latest").readlink().name).values())) == [2, 1, 1]


def test_the_unbroken_run_is_a_colocated_one_on_one_node(story):
    run = story.unbroken
    assert re.search(r"train (n\d+) \| rollout \1 \| spare ?$", run.output(), re.MULTILINE)
    [job] = [f.stem for f in run.folder.glob("*.out")]
    assert run.end_of(job) == "COMPLETED 0"


def test_secrets_stay_out_of_the_recorded_environment(story):
    recorded = (story.unbroken.folder / "logs/latest/env.txt").read_text()
    assert "SLURM_JOB_ID=" in recorded
    if subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, check=False).returncode == 0:
        assert re.search(r"^[0-9a-f]{40}$", recorded, re.MULTILINE), "the commit"
    assert "PRIVATE_API_KEY" in story.cluster.env and "PRIVATE_API_KEY" not in recorded


def test_a_bad_node_is_replaced_by_the_spare_and_named_and_kept_out_of_the_next_job(story):
    with_spare, without = story.nodes
    assert list(map(len, with_spare.values())) == [2, 1, 0]
    assert story.bad[0] not in chain.from_iterable(with_spare.values())
    assert f"bad {story.bad[0]}: nvidia-smi: Unable to determine the device handle" in story.outputs["bad node, a spare"]
    assert "only 2 of the 3 nodes that are needed are healthy" in story.outputs["bad node, no spare"]
    assert list(map(len, without.values())) == [2, 1, 0]
    assert story.bad[1] not in chain.from_iterable(without.values())


def test_a_crash_loop_says_that_it_gives_up(story):
    assert "the last 2 jobs saved nothing new" in story.outputs["crash loop"]


def test_a_job_without_a_server_left_says_so(story):
    assert "no rollout server is left" in story.outputs["rollout node down"]


def test_a_run_that_hangs_leaves_the_stacks_of_all_ranks(story):
    assert story.stacks.count("Timeout (0:00:30)!") == 2
    assert story.stacks.count(" in main\n") >= 2, story.stacks


def test_status_says_where_a_run_stands(story):
    said = story.cluster.run(str(ROOT / ".venv/bin/python"), "-m", "megatron_r1", "status", str(story.run.folder))
    assert f"{faults.STEPS} of {faults.STEPS}" in said
    assert "done" in said
    jobs = len([file for file in story.run.folder.glob("logs/*/env.txt") if not file.parent.is_symlink()])  # as `latest` is
    assert re.search(rf"{jobs}, [0-9.]+ GPU-hours", said), said
