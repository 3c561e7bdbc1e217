"""`python -m megatron_r1 eval` as a user starts it: a model folder, or the address of a plain `vllm serve`; no trainer either way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run
from safetensors.torch import save_file
from test_servers import Stub

from megatron_r1 import config
from megatron_r1.__main__ import main
from megatron_r1.chat import Chat
from megatron_r1.config_stages import EvalConfig
from megatron_r1.launch import Servers
from megatron_r1.processes import free_port
from megatron_r1.rollout.server_process import ServerProcess, server_command
from megatron_r1.stages import evaluate
from megatron_r1.weights.random import RandomWeights

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny_v3"
LIMIT = 300.0
CONFIG = """
[run]
dir = "{folder}/run"
[model]
path = "{folder}/model"
[data]
jsonl = "{folder}/problems.jsonl"
[rollout]
max_prompt_tokens = 96
max_num_seqs = 16
kv_cache_mib = 48
[sampling]
max_tokens = 12
[evaluation]
samples = 4
pass_at = [2]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V3, three problems and a config. Its weights are so large that what is sampled depends on them, not on the seed alone."""
    root = tmp_path_factory.mktemp("eval")
    shutil.copytree(TINY, root / "model")
    random = RandomWeights(json.loads((TINY / "config.json").read_text()), seed=5)
    weights = {name: random.read(name, ()).contiguous() for name in random.shapes}
    large = {name: value if value.ndim == 1 else 5 * value for name, value in weights.items()}
    save_file(large, root / "model/model.safetensors", {"format": "pt"})
    (root / "problems.jsonl").write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": i + 1}) + "\n" for i in range(3)))
    (root / "eval.toml").write_text(CONFIG.format(folder=root))
    return root


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[ServerProcess]:
    """The folder behind `vllm serve` with OpenAI's API and vLLM's own way to load it."""
    port = free_port()
    argv, env = server_command(
        str(folder / "model"),
        port=port,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        kv_cache_bytes=48 << 20,
        extra=["--load-format", "auto"],
    )
    argv.remove("--tokens-only")
    process = ServerProcess(argv, env, port=port, log_file=folder / "plain.log")
    process.start()
    process.wait_ready(LIMIT)
    yield process
    process.stop()


def evaluated(folder: Path, *overrides: str) -> str:
    """The console's text of one `eval` run."""
    code, output = run("eval", folder / "eval.toml", *overrides, timeout=LIMIT)
    assert code == 0, output
    return output


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "eval/samples.jsonl").read_text().splitlines()]
    return sorted(found, key=lambda row: (row["problem"], row["sample"]))


@pytest.mark.slow
def test_a_folder_and_a_plain_server_of_it_give_the_same_samples_and_figures(folder: Path, plain: ServerProcess):
    """vLLM itself loads the folder for the plain server, so equal samples show that the launched one has its weights too."""
    out = evaluated(folder)
    evaluated(folder, f'rollout.urls=["{plain.url}"]', f"run.dir={folder}/url")
    ours, theirs = rows(folder / "run"), rows(folder / "url")
    assert [(row["problem"], row["sample"]) for row in ours] == [(p, s) for p in range(3) for s in range(4)]
    assert ours == theirs
    assert len({row["completion"] for row in ours}) > 6, "samples differ"
    assert all(0 < row["length"] <= 12 and row["correct"] is False and not row["failures"] for row in ours)
    [record] = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    names = ("eval/problems", "eval/samples", "eval/pass@1", "eval/cons@4", "eval/pass@2", "eval/verifier_failures", "eval/unjudged")
    assert [record[name] for name in names] == [3.0, 12.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert record["eval/truncated"] == sum(row["finish_reason"] == "length" for row in ours) / 12
    assert record["eval/length_mean"] == pytest.approx(sum(row["length"] for row in ours) / 12)
    assert "3 x 4" in out
    assert "cons@4" in out
    assert "samples.jsonl" in out


def test_figures_and_files_of_answers_that_are_known(folder: Path, capsys: pytest.CaptureFixture[str]):
    """A plain server that gives, to each of three questions whose answer is 2: 2.0, a half, one half, and nothing in time."""
    chat = Chat(folder / "model")
    texts = ["<answer>2.0</answer>", "<answer>\\frac{1}{2}</answer>", "<answer>0.5</answer>", "<think>well"]
    ids = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def completions(body: dict) -> tuple[int, object]:
        ends = ["stop"] * 3 + ["length"]
        return 200, {"choices": [{"index": i, "token_ids": ids[i], "finish_reason": ends[i]} for i in range(body["n"])]}

    known = Stub(
        **{
            "openapi.json": lambda _: (200, {"paths": {}}),
            "v1/models": lambda _: (200, {"data": [{"id": "m"}]}),
            "v1/completions": completions,
        }
    )
    (folder / "twos.jsonl").write_text("".join(json.dumps({"prompt": f"{i} + {2 - i}", "answer": "2"}) + "\n" for i in range(3)))
    changes = [f'rollout.urls=["{known.url}"]', f"run.dir={folder}/known", f"data.jsonl={folder}/twos.jsonl"]
    evaluate.main(config.load("eval", folder / "eval.toml", changes))
    known.close()
    found = rows(folder / "known")
    assert [row["completion"] for row in found] == texts * 3
    assert [row["answer"] for row in found] == ["2.0", "\\frac{1}{2}", "0.5", None] * 3
    assert [row["correct"] for row in found] == [True, False, False, False] * 3
    [record] = [json.loads(line) for line in (folder / "known/metrics.jsonl").read_text().splitlines()]
    expected = {"problems": 3, "samples": 12, "pass@1": 1 / 4, "pass@2": 1 / 2, "truncated": 1 / 4, "verifier_failures": 0, "unjudged": 0}
    assert {name: record[f"eval/{name}"] for name in expected} == expected
    assert record["eval/cons@4"] == 0.0, "the two halves outvote the 2"
    assert record["eval/length_mean"] == pytest.approx(sum(map(len, ids)) / 4)
    assert "0.250 [0.250, 0.250]" in capsys.readouterr().out


def test_evaluation_is_the_papers_unless_said_otherwise(tmp_path: Path):
    (tmp_path / "e.toml").write_text('[model]\npath = "m"\n[evaluation]\nsamples = 16\n')
    c = config.load("eval", tmp_path / "e.toml")
    assert isinstance(c, EvalConfig)
    assert (c.evaluation.temperature, c.evaluation.top_p, c.sampling.max_tokens) == (0.6, 0.95, 32_768)
    assert (c.evaluation.samples, EvalConfig.model_fields["evaluation"].default.samples) == (16, 64)
    assert config.load("eval", tmp_path / "e.toml") == config.parse("eval", config.read_toml(tmp_path / "e.toml"))


@pytest.mark.parametrize(("name", "samples", "layout"), [("aime", 64, "aime"), ("math500", 16, "math500"), ("gpqa", 64, "gpqa")])
def test_the_presets_sample_as_often_as_the_paper_does(name: str, samples: int, layout: str):
    """arXiv 2501.12948v2, D.1: AIME and GPQA 64, MATH 16."""
    c = config.load("eval", ROOT / f"configs/eval_{name}.toml")
    assert (c.evaluation.samples, c.evaluation.temperature, c.evaluation.top_p, c.sampling.max_tokens) == (samples, 0.6, 0.95, 32_768)
    assert (c.data.layout, c.data.held_out, c.evaluation.problems) == (layout, 0, 0)


def test_servers_load_the_folder_s_weights_for_evaluation_and_none_for_training(folder: Path, tmp_path: Path):
    (tmp_path / "grpo.toml").write_text(f'[model]\npath = "{folder}/model"\n')
    servers = Servers(config.load("eval", folder / "eval.toml"), tmp_path), Servers(config.load("grpo", tmp_path / "grpo.toml"), tmp_path)
    argv = [one.processes[0].argv for one in servers]
    assert [a[len(a) - a[::-1].index("--load-format")] for a in argv] == ["auto", "dummy"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.world_size=2", ("parallel.world_size = 2", "rollout.servers")),
        ("model.init=random", ("model.init", "nothing to evaluate")),
        ("model.path=configs/models/tiny_v3", ("no *.safetensors",)),
        ("evaluation.pass_at=[8]", ("evaluation.pass_at has 8", "evaluation.samples = 4")),
        ('evaluation.judges=["code"]', ("evaluation.judges = ['code']", "rewards.weights")),
        ("data.layout=gqpa", ("data.layout = 'gqpa'", "gpqa")),
        ("evaluation.problms=3", ("did you mean 'problems'",)),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], override: str, words: tuple[str, ...]):
    assert main(["eval", str(folder / "eval.toml"), override]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line


def test_evaluation_needs_no_megatron(folder: Path):
    code = "import sys; import megatron_r1.stages.evaluate; print([m for m in sys.modules if m.partition('.')[0] in ('megatron', 'vllm')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
