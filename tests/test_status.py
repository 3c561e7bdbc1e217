"""What a run's folder says of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_r1 import runs, status


def job(run: Path, name: str, *, nodes: int, gpus: int, minutes: float) -> None:
    """The logs of a Slurm job that ran for `minutes`."""
    folder = run / "logs" / name
    folder.mkdir(parents=True)
    (folder / "env.txt").write_text(f"JobId={name} JobName=r1\nSLURM_GPUS_ON_NODE={gpus}\nSLURM_JOB_NUM_NODES={nodes}\n")
    (folder / "grpo-0000.log").write_text("error: model.path: gone\n")
    now = time.time()
    os.utime(folder / "env.txt", (now - 60 * minutes, now - 60 * minutes))
    os.utime(folder / "grpo-0000.log", (now, now))


def test_a_run_of_two_jobs_has_their_gpu_hours_its_step_its_pace_and_its_last_error(tmp_path):
    (tmp_path / "grpo.toml").write_text("steps = 8\n[parallel]\nworld_size = 4\n")
    records = [{"step": s, "reward/mean": 0.1 * s, "time/step": 900.0, "unix_time": time.time() - 3600} for s in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 6, "half')
    job(tmp_path, "11", nodes=4, gpus=8, minutes=30)
    job(tmp_path, "12", nodes=4, gpus=8, minutes=15)
    (tmp_path / "logs" / "latest").symlink_to("12")
    found = dict(status.rows(runs.read(tmp_path)))
    assert found["stage"] == "grpo, 4 trainer ranks"
    assert found["jobs so far"] == "2, 24.00 GPU-hours"
    assert found["step"] == "4 of 8, 60.0 min ago"
    assert found["reward"] == "0.4 at step 4"
    assert found["time left"] == "30.0 min"
    assert found["checkpoint"] == "none yet"
    assert found["last error"].startswith("model.path: gone (")


def test_a_stage_that_does_not_say_how_many_steps_it_takes_has_the_step_alone(tmp_path):
    (tmp_path / "reward-model.toml").write_text("epochs = 1\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 30, "unix_time": time.time()}) + "\n")
    run = runs.read(tmp_path)
    assert dict(status.rows(run))["step"] == "30, 0 s ago"
    assert status.where(run) == "reward-model, not done, step 30"


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it is not the folder of a run"):
        status.status([str(tmp_path)])
