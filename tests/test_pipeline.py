"""R1's stages as a graph: each begins from what the paper says it begins from, what is done stays done, what is half done goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import config
from megatron_r1.__main__ import main
from megatron_r1.config_stages import PipelineConfig
from megatron_r1.stages import pipeline
from megatron_r1.stages.pipeline import NAMES, Job

ROOT = Path(__file__).resolve().parents[1]


def settings(folder: Path, **changes: Any) -> PipelineConfig:
    models = {"base_model": "V3", "student": "Qwen", "cold_start": "cold.jsonl"}
    tree = {"dir": str(folder), **models, "stages": {name: f"{name}.toml" for name in NAMES}}
    return config.parse("pipeline", tree | changes)


def edges(jobs: list[Job]) -> dict[str, dict[str, str]]:
    return {job.name: dict(o.split("=", 1) for o in job.overrides) for job in jobs}


def finished(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "done").touch()


def test_each_stage_begins_from_what_the_paper_says(tmp_path: Path):
    found = edges(pipeline.jobs(settings(tmp_path)))
    assert {name: o["model.path"] for name, o in found.items()} == {
        "r1_zero": "V3",
        "r1_cold_start_sft": "V3",
        "r1_rl_stage1": f"{tmp_path}/r1_cold_start_sft/hf",
        "r1_rejection": f"{tmp_path}/r1_rl_stage1/hf",
        "r1_sft": "V3",
        "r1_rl_stage2": f"{tmp_path}/r1_sft/hf",
        "r1_distill": "Qwen",
    }
    assert {name: o["data.conversations"] for name, o in found.items() if "data.conversations" in o} == {
        "r1_cold_start_sft": "cold.jsonl",
        "r1_sft": f"{tmp_path}/r1_rejection/conversations.jsonl",
        "r1_distill": f"{tmp_path}/r1_rejection/conversations.jsonl",
    }


def test_problems_are_those_of_every_stage_and_evaluation(tmp_path: Path):
    jobs = pipeline.jobs(settings(tmp_path, problems="p.jsonl", evaluation="e.toml"))
    assert all("data.jsonl=p.jsonl" in job.overrides for job in jobs)


def test_every_model_is_evaluated_once_it_is_there(tmp_path: Path):
    names = [job.name for job in pipeline.jobs(settings(tmp_path, evaluation="e.toml"))]
    made = ["Base", "R1-Zero", "Dev1", "Dev2", "Dev3", "R1", "student"]
    assert [name for name in names if name.startswith("evaluation")] == [f"evaluation of {model}" for model in made]
    assert names.index("evaluation of Dev2") == names.index("r1_rl_stage1") + 1


def test_what_is_done_is_passed_over_and_what_fails_ends_the_pipeline(tmp_path: Path):
    finished(tmp_path, "r1_zero")
    ran = []

    def run(job: Job) -> int:
        ran.append(job.name)
        if job.name == "r1_rl_stage1":
            return 7
        finished(tmp_path, job.name)
        return 0

    assert pipeline.main(settings(tmp_path), run) == 7
    assert ran == ["r1_cold_start_sft", "r1_rl_stage1"]
    ran.clear()
    assert pipeline.main(settings(tmp_path, last="r1_cold_start_sft"), run) == 0
    assert ran == []


def test_what_another_seed_has_done_is_not_taken_for_this_ones(tmp_path: Path):
    finished(tmp_path, "r1_zero")
    (tmp_path / "r1_zero/grpo.toml").write_text("[run]\nseed = 1\n")
    assert pipeline.jobs(settings(tmp_path))
    with pytest.raises(ValueError, match=f"seed = 2: {tmp_path}/r1_zero is a run of seed 1; set that, or another dir"):
        pipeline.jobs(settings(tmp_path, seed=2))


def test_r1_tiny_refuses_a_folder_of_another_seed_and_leaves_it_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/sft.toml").write_text("[run]\nseed = 1\n")
    assert main(["r1-tiny", f"dir={tmp_path}", "seed=2"]) == 2
    assert f"seed = 2: {tmp_path}/base is a run of seed 1" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(("seed", "overrides"), [("", ""), ("1", ""), ("2", "seed=2 dir=runs/r1-tiny-2")])
def test_make_gives_each_seed_of_r1_tiny_a_folder_of_its_own(seed: str, overrides: str):
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # these tests run under make themselves
    make = ["make", "-n", "r1-tiny", f"SEED={seed}", "ARGS="]
    said = subprocess.run(make, cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1].split("r1-tiny", 1)[1].strip() == overrides


def test_a_stage_that_saved_on_request_ends_the_pipeline_without_an_error(tmp_path: Path):
    ran = []
    assert pipeline.main(settings(tmp_path), lambda job: ran.append(job.name) or 0) == 0
    assert ran == ["r1_zero"], "it left no `done`: nothing may begin from it"


def test_the_table_has_every_checkpoint_in_the_papers_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(job: Job) -> int:
        finished(tmp_path, str(job.folder.relative_to(tmp_path)))
        if job.measures:
            record = {"step": 0, "unix_time": 1.0, "eval/problems": 8.0, "eval/pass@1": len(job.measures) / 10, "eval/length_mean": 20.0}
            (job.folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
            (job.folder / "eval.toml").write_text("[run]\ngpu_hour_price = 2.0\n")
        return 0

    assert pipeline.main(settings(tmp_path, evaluation="e.toml"), run) == 0
    shown = capsys.readouterr().out.partition("held-out problems")[2].partition("cost")[0]
    places = [shown.index(f" {name} ") for name in ("Base", "R1-Zero", "Dev1", "Dev2", "Dev3", "R1", "student")]
    assert places == sorted(places)
    assert "0.700" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"r1_zzero": "z.toml"}}, "'r1_zzero' is no stage of R1; use one of r1_zero"),
        ({"first": "sft"}, "first: 'sft' is no stage"),
        ({"stages": {"r1_rl_stage2": "r.toml"}}, "begins from r1_sft, which is not among"),
        ({"student": ""}, "student: required by stages.r1_distill"),
    ],
)
def test_a_pipeline_that_cannot_work_says_so_before_anything_runs(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        pipeline.main(settings(tmp_path, **changes), lambda job: pytest.fail(f"{job.name} ran"))


def test_a_stage_may_begin_from_one_that_an_earlier_pipeline_finished(tmp_path: Path):
    finished(tmp_path, "r1_sft")
    [job] = pipeline.jobs(settings(tmp_path, stages={"r1_rl_stage2": "r.toml"}))
    assert f"model.path={tmp_path}/r1_sft/hf" in job.overrides


def test_the_listing_has_a_line_a_job_with_its_settings_for_slurm(tmp_path: Path):
    first, *_ = pipeline.listing(settings(tmp_path, job={"grpo": "NODES=64", "r1_distill": "NODES=2"})).splitlines()
    assert first == f"r1_zero grpo RUN={tmp_path}/r1_zero NODES=64 r1_zero.toml run.seed=1 model.path=V3"
