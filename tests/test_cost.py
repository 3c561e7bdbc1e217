"""The cost ledger against a count by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import config, cost, runs
from megatron_r1.metrics import Metrics
from megatron_r1.status import status

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny_grpo.toml"
ROLLOUT = {"tensor_parallel_size": 1, "vllm_args": [], "servers": 2, "urls": [], "weight_transfer": "gloo"}
CONFIG = {"run": {"gpu_hour_price": 2.0}, "parallel": {"world_size": 2}, "rollout": ROLLOUT}
STEP = {"step": 1, "policy/loss": 0.1, "time/rollout": 60.0, "time/train": 30.0, "time/step": 100.0}


def with_rollout(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, "rollout": {**ROLLOUT, **changes}}


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, 2 + 2),
        ({"urls": ["http://a", "http://b", "http://c"]}, 2 + 3),
        ({"tensor_parallel_size": 8, "vllm_args": ["--pipeline-parallel-size", "2", "--enable-expert-parallel"]}, 2 + 2 * 16),
        ({"vllm_args": ["--data-parallel-size=4"]}, 2 + 2 * 4),
        ({"vllm_args": ["-dp", "4", "--data-parallel-size-local", "2"]}, 2 + 2 * 4),
        ({"weight_transfer": "ipc", "tensor_parallel_size": 2}, 2),
    ],
)
def test_a_run_holds_the_trainers_devices_and_those_of_servers_that_are_elsewhere(changes, held):
    assert cost.devices(with_rollout(**changes), trainer=True, rollouts=True) == held


def test_a_stage_holds_only_what_takes_part():
    assert cost.devices(CONFIG, trainer=True, rollouts=False) == 2
    assert cost.devices(CONFIG, trainer=False, rollouts=True) == 2
    assert cost.devices(with_rollout(weight_transfer="ipc"), trainer=False, rollouts=True) == 2, "nobody to share GPUs with"
    assert cost.devices({}, trainer=True, rollouts=True) == 0


def test_what_no_phase_of_a_step_covers_is_other_and_what_is_beside_it_is_added():
    record = {**STEP, "time/evaluation": 20.0, "time/between_steps": 5.0}
    assert cost.phases(record) == {"rollout": 60.0, "train": 30.0, "evaluation": 20.0, "between_steps": 5.0, "other": 10.0}
    assert cost.seconds(record) == 125.0
    assert cost.seconds({"policy/loss": 0.1}) == 0.0, "an optimizer step within a rollout"
    assert cost.seconds({"time/rollout": 3.0}) == 3.0, "a stage that measures no step"


def test_a_row_is_seconds_times_devices_times_the_price():
    row = cost.of_run("r1", CONFIG, [STEP, {**STEP, "step": 2}])
    assert row.gpu_hours == pytest.approx(2 * 100 * 4 / 3600)
    assert row.usd == pytest.approx(2 * 100 * 4 / 3600 * 2.0)
    assert row.phases == {"rollout": 480.0, "train": 240.0, "other": 80.0}


def test_a_step_that_was_done_again_is_paid_twice():
    once, twice = (cost.of_run("r1", CONFIG, [STEP] * n) for n in (1, 2))
    assert twice.usd == pytest.approx(2 * once.usd)


def test_records_know_their_devices_when_a_run_went_on_with_others():
    row = cost.of_run("r1", CONFIG, [{**STEP, "cost/devices": 8.0}, {**STEP, "step": 2}])
    assert row.gpu_hours == pytest.approx((100 * 8 + 100 * 4) / 3600)
    assert row.devices == 8


def test_a_stage_without_a_trainer_pays_its_servers_alone():
    row = cost.of_run("eval", CONFIG, [{"step": 0, "eval/pass@1": 0.5, "time/evaluation": 3600.0}])
    assert row.gpu_hours == pytest.approx(2.0)


def test_the_papers_table_comes_out_of_its_own_hours():
    """arXiv 2501.12948v2, table 7: 198 h and 80 h of 512 H800, and 5K GPU hours of data, at US$ 2."""
    cluster = {**CONFIG, "parallel": {"world_size": 512}}
    hours = {"R1-Zero": 198.0, "SFT data": 5000 / 512, "R1": 80.0}
    rows = [
        cost.of_run(n, cluster, [{"step": 1, "policy/loss": 0.0, "time/train": h * 3600, "time/step": h * 3600}]) for n, h in hours.items()
    ]
    assert [cost.number(row.gpu_hours) for row in rows] == ["101,376", "5,000", "40,960"]
    total_hours, usd = cost.total(rows)
    assert round(total_hours, -3) == 147_000
    assert abs(usd - 294_000) < 1000


def test_numbers_say_no_more_digits_than_they_have():
    assert [cost.number(v) for v in (101_376.4, 640.43, 12.345, 0.5, 0.00412, 0.0)] == ["101,376", "640", "12.35", "0.50", "0.0041", "0.00"]


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder: Path, *steps: int) -> list[dict[str, float]]:
    metrics = Metrics(folder, steps=9, tensorboard=False, meter=cost.Meter(4, 2.0), started=time.perf_counter() - 1000.0)
    for step in steps:
        metrics.log(step, {"policy/loss": 0.1}, console=False)
        metrics.log(step, {"time/train": 30.0, "time/step": 100.0}, console=False)
    metrics.close()
    return records(folder)


def test_metrics_carry_the_total_so_far_and_the_time_no_phase_has(tmp_path):
    untimed, first = logged(tmp_path, 1)
    assert "cost/usd" not in untimed
    assert first["time/between_steps"] == pytest.approx(900.0, abs=5.0), "1000 s since the start, 100 of them in the step"
    assert first["cost/gpu_hours"] == pytest.approx(4 * (100.0 + first["time/between_steps"]) / 3600)
    assert first["cost/usd"] == pytest.approx(2.0 * first["cost/gpu_hours"])


def test_the_total_goes_on_after_a_restart_and_equals_the_ledgers(tmp_path):
    logged(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "policy/lo')  # killed while it wrote
    metrics = Metrics(tmp_path, steps=9, tensorboard=False, meter=cost.Meter(4, 2.0))
    metrics.log(2, {"policy/loss": 0.1, "time/train": 30.0, "time/step": 100.0}, console=False)
    metrics.close()
    found = runs.read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in found if "cost/usd" in r] == [1, 2, 2]
    assert found[-1]["cost/gpu_hours"] == pytest.approx(cost.of_run("r1", CONFIG, found).gpu_hours)
    assert found[-1]["cost/gpu_hours"] > 3 * 4 * 100 / 3600


def test_status_shows_the_table_of_a_run_and_of_a_pipeline(tmp_path, capsys):
    for name, seconds in (("zero", 3600.0), ("r1", 1800.0)):
        folder = tmp_path / name
        folder.mkdir()
        settings = config.load("grpo", TINY, [f"run.dir={folder}"])
        (folder / "grpo.toml").write_text(config.dump(settings))
        timed = {**STEP, "unix_time": 1e9 - seconds, "time/rollout": 0.0, "time/train": seconds, "time/step": seconds}
        (folder / "metrics.jsonl").write_text(json.dumps(timed) + "\n")
    assert status([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[-4:-1] for line in out.splitlines() if "total" in line] == [["6.00", "\u2502", "12.00"]]
    assert out.index("zero") < out.index("r1"), "in the order they began"
    assert status([str(tmp_path / "r1")]) == 0
    assert "2.00" in capsys.readouterr().out
