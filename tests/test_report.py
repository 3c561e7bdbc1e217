"""The report page: whole, alone, and true to the records."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import config, report
from megatron_r1.__main__ import main
from megatron_r1.metrics import Metrics
from megatron_r1.runs import append_bounded, read_records

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "circle"}
EVERYTHING = [
    "Held-out accuracy",
    "Response length",
    "Reward by part",
    "Solved, and groups without a gradient",
    "Entropy",
    "KL to the reference",
    "Reflective words",
    "Language consistency",
    "Cut at the length limit",
    "Length of right and wrong answers",
    "Sampler against trainer",
    "Clipped tokens",
    "Gradient norm",
    "Expert load",
    "Throughput",
    "Time of a step",
]
METRICS = [
    "reward/mean",
    "reward/accuracy",
    "reward/format",
    "reward/language",
    "reward/solved",
    "reward/all_0_groups",
    "reward/all_1_groups",
    "rollout/length_mean",
    "rollout/length_p95",
    "rollout/length_max",
    "rollout/length_correct",
    "rollout/length_wrong",
    "rollout/truncated",
    "rollout/reflective_words",
    "rollout/reflective_wait",
    "policy/entropy",
    "policy/kl",
    "policy/grad_norm",
    "policy/clip_share",
    "policy/loss",
    "moe/load_max_over_mean/1",
    "moe/load_max_over_mean/2",
    "sync/logprob_gap",
    "sync/logprob_gap_max",
    "sync/canary_gap",
    "perf/tokens_per_second",
    "eval/pass@1",
    "eval/pass@1_stderr",
    "eval/cons@16",
    "eval/problems",
]
SAMPLE = {"step": 1, "prompt": "1 + 1", "answer": "2", "completion": "2", "tokens": 3, "rewards": {"accuracy": 1.0}, "failures": {}}
ATTACK = '<script>alert(1)</script><img src="http://a/b.png">'


class Page(HTMLParser):
    """Checks that tags close in order; collects addresses, figure titles and the text of each table's rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.titles.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def step(number: int, **changes: float) -> dict[str, float]:
    timed = {"time/rollout": 60.0, "time/train": 30.0, "time/step": 100.0}
    return {"step": number, "unix_time": 1e9 + 100 * number, **dict.fromkeys(METRICS, 0.1 + 0.01 * number), **timed, **changes}


def run(folder: Path, records: list[dict[str, Any]], *overrides: str, stage: str = "grpo") -> Path:
    folder.mkdir(parents=True)
    settings = config.load(stage, CONFIGS / f"tiny_{stage}.toml", [f"run.dir={folder}", *overrides])
    (folder / f"{stage}.toml").write_text(config.dump(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def written(*folders: Path) -> tuple[Page, str]:
    text = report.write(list(folders)).read_text()
    return Page(text), text


def test_a_run_has_every_figure_with_its_axes_named(tmp_path):
    page, text = written(run(tmp_path / "zero", [step(n) for n in range(1, 9)]))
    assert [t for t in page.titles if t in EVERYTHING] == EVERYTHING
    charts = re.findall(r'<svg viewBox="0 0 380.*?</svg>', text)
    assert len(charts) == len(EVERYTHING)
    for chart in charts:
        titles = re.findall(r'class="axis-title"[^>]*>([^<]+)<', chart)
        assert len(titles) == 2, chart[:200]
        assert "optimizer steps" in titles


def test_the_page_needs_nothing_but_itself(tmp_path):
    folder = run(tmp_path / "zero", [step(n) for n in range(1, 9)])
    (folder / "completions.jsonl").write_text(json.dumps({**SAMPLE, "finish_reason": "stop", "completion": ATTACK}) + "\n")
    page, text = written(folder)
    assert [p.name for p in folder.iterdir() if p.name.startswith("report")] == ["report.html"]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed"), tag
        assert not {"src", "srcset", "onload", "onclick"} & attributes.keys(), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize("field", ["prompt", "completion", "answer"])
def test_what_a_model_writes_is_text(tmp_path, field):
    folder = run(tmp_path / "zero", [step(n) for n in range(1, 3)])
    (folder / "completions.jsonl").write_text(json.dumps({**SAMPLE, "finish_reason": "length", field: ATTACK}) + "\n")
    _, text = written(folder)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_half_a_character_does_not_stop_the_page(tmp_path):
    folder = run(tmp_path / "zero", [step(1)])
    (folder / "completions.jsonl").write_text(json.dumps({**SAMPLE, "finish_reason": "length", "completion": "an \ud83d"}) + "\n")
    _, text = written(folder)
    assert "<pre>an ?</pre>" in text


def test_so_are_names_of_rewards_failures_and_folders(tmp_path):
    records = [{**step(n), f"reward/{ATTACK}": 0.5} for n in range(1, 3)]
    folder = run(tmp_path / "<b>run", records)
    sample = {**SAMPLE, "finish_reason": "stop", "rewards": {ATTACK: 1.0}, "failures": {"math": ATTACK}}
    (folder / "completions.jsonl").write_text(json.dumps(sample) + "\n")
    _, text = written(folder)
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>run" not in text


@pytest.mark.parametrize(
    ("missing", "title"),
    [
        ("policy/kl", "KL to the reference"),
        ("rollout/length", "Response length"),
        ("time/", "Time of a step"),
        ("eval/", "Held-out accuracy"),
    ],
)
def test_a_run_without_some_metrics_leaves_their_figure_out(tmp_path, missing, title):
    records = [{k: v for k, v in step(n).items() if not k.startswith(missing)} for n in range(1, 5)]
    page, _ = written(run(tmp_path / "zero", records))
    assert title not in page.titles
    assert "Entropy" in page.titles


def test_a_run_of_one_step_has_tables_and_no_curves(tmp_path):
    page, text = written(run(tmp_path / "zero", [step(1)]))
    assert "Cost by stage" in page.titles
    assert "Held-out accuracy by checkpoint" in page.titles
    assert "<figure" not in text


def test_the_cost_table_equals_a_count_by_hand(tmp_path):
    """2 ranks and 2 servers for 3 steps of 360 s, one of them done twice, at US$ 3: 1.6 hours, 4.80."""
    records = [step(n, **{"time/rollout": 180.0, "time/train": 90.0, "time/step": 360.0}) for n in (1, 2, 2, 3)]
    page, _ = written(run(tmp_path / "zero", records, "run.gpu_hour_price=3.0"))
    assert ["zero", "4", "0.40", "1.60", "4.80"] in page.rows
    assert [" rollout", "0.80", "2.40", "50.0%"] in page.rows
    assert [" train", "0.40", "1.20", "25.0%"] in page.rows
    assert [" other", "0.40", "1.20", "25.0%"] in page.rows


def test_a_pipeline_has_a_part_for_each_run_and_tables_of_all(tmp_path):
    sft = [{"step": n, "unix_time": 1e8 + n, "policy/loss": 1.0, "time/step": 900.0, "time/train": 900.0} for n in (1, 2)]
    sft[1] |= {"eval/pass@1": 0.4, "eval/pass@1_stderr": 0.1, "eval/problems": 64.0}
    run(tmp_path / "pipe/b_cold_start", sft, "evaluation.problems=0", stage="sft")
    run(tmp_path / "pipe/a_rl", [step(n, **{"eval/pass@1": n / 10, "eval/problems": 64.0}) for n in range(5)])
    page, text = written(tmp_path / "pipe")
    tested = [[row[0], row[1]] for row in page.rows if "step" in row[0]]
    assert tested == [
        ["b_cold_startsft, step 2, 64 problems", "0.400\u00b1 0.196"],
        ["a_rlgrpo, step 4, 64 problems", f"0.400\u00b1 {1.96 * 0.14:.3f}"],
    ]
    assert next(row for row in page.rows if row[0] == "total")[-1] == f"{2 * (1800 * 2 + 500 * 4) / 3600:.2f}", "no servers in SFT"
    assert page.titles.count("Loss") == 1, "the cold start's"
    assert text.index('id="run-b-cold-start"') < text.index('id="run-a-rl"'), "in the order they began"


def test_several_runs_share_their_figures_and_say_in_what_they_differ(tmp_path):
    on = run(tmp_path / "on/grpo", [step(n) for n in range(1, 5)], "rewards.weights.language=1.0")
    off = run(tmp_path / "off/grpo", [step(n) for n in range(1, 5)], "run.seed=7")
    page, text = written(on, off)
    assert page.titles.count("Language consistency") == 1
    assert ["run.seed", "1", "7"] in page.rows
    assert ["rewards.weights.language", "1.0", "-"] in page.rows
    assert "seed 7" in text
    chart = re.search(r"Language consistency.*?</figure>", text).group()
    assert {"on", "off"} == set(re.findall(r"<span>([^<]+)</span>", chart))


def test_the_step_where_the_reference_was_replaced_is_marked(tmp_path):
    text = report.write([run(tmp_path / "zero", [step(n) for n in range(1, 51)])]).read_text()
    assert re.findall(r"reference replaced at step (\d+)", text) == ["16", "32", "48"]


def test_of_a_step_that_was_done_again_the_last_counts(tmp_path):
    records = [step(1), step(2, **{"policy/entropy": 9.0}), step(2, **{"policy/entropy": 0.5})]
    text = report.write([run(tmp_path / "zero", records)]).read_text()
    assert "0.11 \u2192 0.5</b>" in text


def test_a_value_that_is_no_number_leaves_a_gap(tmp_path):
    records = [step(n, **{"policy/entropy": float("nan") if n == 2 else 0.5}) for n in range(1, 5)]
    page, text = written(run(tmp_path / "zero", records))
    assert "Entropy" in page.titles
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", text)).lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "give a run's folder"), (["nowhere"], "no such folder"), (["."], "no effective config"), (["empty"], "no metrics yet")],
)
def test_a_wrong_folder_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    run(tmp_path / "empty", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_same_run_given_twice_is_refused(tmp_path):
    folder = run(tmp_path / "zero", [step(1)])
    with pytest.raises(ValueError, match="given twice"):
        report.write([folder, folder])


def test_metrics_write_the_completions_that_the_page_shows(tmp_path):
    metrics = Metrics(tmp_path, steps=2, tensorboard=False)
    metrics.text(2, "completions", "a page", rows=[{**SAMPLE, "finish_reason": "stop"}])
    metrics.close()
    assert read_records(tmp_path / "completions.jsonl") == [{**SAMPLE, "step": 1, "finish_reason": "stop"}]


def test_completions_stay_below_their_limit_and_keep_the_first_and_the_last_step(tmp_path):
    file = tmp_path / "completions.jsonl"
    for number in range(1, 201):
        append_bounded(file, [{"step": number, "completion": "x" * 500}] * 2, limit_bytes=40_000)
        assert file.stat().st_size <= 40_000
    steps = [row["step"] for row in read_records(file)]
    assert (steps[0], steps[-1]) == (1, 200)
    assert steps == sorted(steps)
    assert len(steps) >= 20
    assert all(steps.count(s) == 2 for s in steps), "a step stays whole"
