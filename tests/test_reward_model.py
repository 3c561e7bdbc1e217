"""Reward models: their losses by hand, the same optimizer step in every layout, and heads that learn on real data."""

from __future__ import annotations

import json
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from mcore_runs import Run, model, sequences
from ranks import run_ranks

from megatron_r1 import checks, config, models
from megatron_r1.algorithms import reward_model
from megatron_r1.chat import Chat
from megatron_r1.packing import TokenSequence, pack, plan
from megatron_r1.parallel import Parallel
from megatron_r1.problem import Conversation
from megatron_r1.types import Microbatch
from megatron_r1.weights.rules import rules

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny_v3"
ONE = Parallel()
LAYOUTS = {  # ranks, sizes, packed tokens of a microbatch
    "DP2": (2, Parallel(), 256),
    "TP2": (2, Parallel(tensor_model_parallel_size=2), 256),
    "PP2": (2, Parallel(pipeline_model_parallel_size=2), 128),
    "VPP2": (2, Parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 128),
    "EP2": (2, Parallel(expert_model_parallel_size=2), 256),
    "TP2 x EP2, ETP1": (2, Parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1), 256),
    "CP2": (2, Parallel(context_parallel_size=2), 256),
}
Result = tuple[list[dict[str, float]], dict[str, Any]]


def packed(run: Run, made: list[TokenSequence], *, answers: int, chunk_tokens: int) -> list[Microbatch]:
    """This rank's microbatches, as the stage packs them: `answers` neighbours stay together."""
    from megatron_r1.mcore import distributed

    lengths = [sum(len(s.ids) for s in made[i : i + answers]) for i in range(0, len(made), answers)]
    chunks = plan(lengths, chunk_tokens=chunk_tokens, num_groups=distributed.dp_size(), count_multiple=run.policy.count_multiple)
    members = [[answers * i + k for i in chunk for k in range(answers)] for chunk in chunks[distributed.dp_rank()]]
    return run.policy.pack(made, members)


def three_steps(parallel: Parallel, kind: str, chunk_tokens: int = 256) -> Result:
    with Run(parallel, hf=models.reward_model(model())) as run:
        labels = [float(i % 3 == 0) for i in range(24)]
        loss = reward_model.pairwise if kind == "pairwise" else partial(reward_model.pointwise, labels=labels)
        answers = 2 if kind == "pairwise" else 1
        batches = [packed(run, sequences(24, seed=number), answers=answers, chunk_tokens=chunk_tokens) for number in range(3)]
        metrics = [run.policy.train_scores(batch, loss) for batch in batches]
        return [*metrics, run.policy.scores(batches[0], loss)], run.weights()


def assert_same(got: Result, expected: Result) -> None:
    for mine, theirs in zip(got[0], expected[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name in (name for name in mine if "moe/load" not in name):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    assert got[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        np.testing.assert_allclose(got[1][name], weight, rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    return {kind: run_ranks(1, three_steps, ONE, kind)[0] for kind in ("pairwise", "pointwise")}


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps_are_those_of_one_rank(name: str, kind: str, alone: dict[str, Result]):
    ranks, parallel, chunk_tokens = LAYOUTS[name]
    results = run_ranks(ranks, three_steps, parallel, kind, chunk_tokens)
    assert all(metrics == results[0][0] for metrics, _ in results), "every rank reports the same"
    assert_same(results[0], alone[kind])


@pytest.mark.parametrize("chunk_tokens", [72, 1024])
def test_packing_changes_nothing(chunk_tokens: int, alone: dict[str, Result]):
    assert_same(run_ranks(1, three_steps, ONE, "pairwise", chunk_tokens)[0], alone["pairwise"])


def test_training_moves_the_head_and_the_decoder(alone: dict[str, Result]):
    metrics, weights = alone["pairwise"]
    assert weights["score.weight"].shape == (1, 64)
    assert "lm_head.weight" not in weights
    assert metrics[0]["policy/loss"] > metrics[3]["policy/loss"], "the first batch is fitted better after three steps"
    assert all(figures["policy/grad_norm"] > 0 for figures in metrics[:3])


def batch_of(count: int) -> Microbatch:
    made = [TokenSequence(ids=[1, 2], learned=[0, 0]) for _ in range(count)]
    return pack(made, [list(reversed(range(count)))])[0]


def test_the_pairwise_loss_and_its_gradient_are_those_of_a_float64_reference():
    scores = np.random.default_rng(0).normal(0.0, 3.0, 12)
    tensor_N = torch.tensor(scores, dtype=torch.float32, requires_grad=True)
    output = reward_model.pairwise(tensor_N, batch_of(12))
    output.loss_sum.backward()
    margin = scores[0::2] - scores[1::2]
    assert output.count == 6
    assert output.loss_sum.item() == pytest.approx(np.log1p(np.exp(-margin)).sum(), rel=1e-6)
    expected = np.stack([-1 / (1 + np.exp(margin)), 1 / (1 + np.exp(margin))], axis=1).ravel()
    np.testing.assert_allclose(tensor_N.grad.numpy(), expected, rtol=0, atol=1e-6)
    assert output.sums["policy/accuracy"] == ((margin > 0).sum(), 6)
    assert output.sums["policy/margin"] == (pytest.approx(margin.sum(), rel=1e-6), 6)
    assert output.sums["policy/score"] == (pytest.approx(scores.sum(), rel=1e-6), 12)


def test_the_pointwise_loss_and_its_gradient_are_those_of_a_float64_reference():
    scores = np.random.default_rng(1).normal(0.0, 3.0, 7)
    labels = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    tensor_N = torch.tensor(scores, dtype=torch.float32, requires_grad=True)
    output = reward_model.pointwise(tensor_N, batch_of(7), labels=labels.tolist())
    output.loss_sum.backward()
    chance, mine = 1 / (1 + np.exp(-scores)), labels[::-1]  # the batch holds the last sequence first
    assert output.count == 7
    assert output.loss_sum.item() == pytest.approx(-(mine * np.log(chance) + (1 - mine) * np.log(1 - chance)).sum(), rel=1e-6)
    np.testing.assert_allclose(tensor_N.grad.numpy(), chance - mine, rtol=0, atol=1e-6)
    assert output.sums["policy/accuracy"] == (((scores > 0) == (mine > 0)).sum(), 7)


def test_scores_far_apart_have_a_finite_loss():
    output = reward_model.pairwise(torch.tensor([-1e4, 1e4]), batch_of(2))
    assert output.loss_sum.item() == pytest.approx(2e4)


def test_a_reward_model_is_its_decoder_with_one_label():
    hf = model(eos_token_id=1, pad_token_id=1)
    scorer = models.reward_model(hf)
    assert scorer["architectures"] == ["DeepseekV3ForSequenceClassification"]
    assert models.is_reward_model(scorer)
    assert not models.is_reward_model(hf)
    assert models.reward_model(scorer) == scorer
    assert scorer["pad_token_id"] is None, "or transformers would pass over the end token"
    assert models.reward_model(model(pad_token_id=2))["pad_token_id"] == 2
    names = {source.name for entry in rules(scorer) for source in entry.hf}
    policy = {source.name for entry in rules(hf) for source in entry.hf if not source.name.startswith("model.layers.4.")}  # without MTP
    assert names == policy - {"lm_head.weight"} | {"score.weight"}
    with pytest.raises(ValueError, match="3 labels"):
        models.reward_model({"architectures": ["LlamaForSequenceClassification"], "num_labels": 3})


def test_defaults_are_the_papers():
    c = config.parse("reward-model", {"kind": "pairwise", "preferences": "p", "model": {"path": "m"}, "optimizer": {"weight_decay": 0.0}})
    assert (c.batch_size, c.optimizer.lr, c.optimizer.lr_decay_style, c.epochs, c.max_length) == (256, 6e-6, "constant", 1, 8192)
    assert not c.needs_rollouts
    assert config.load("reward-model", ROOT / "configs" / "tiny_reward_model.toml").kind == "pairwise"


def chosen_ids(settings: dict[str, Any]) -> list[int]:
    """On a rank, for the stage imports Megatron: the first chosen answer as the stage tokenizes it."""
    from megatron_r1.stages import reward_model as stage

    [[example], _, _] = stage.load(config.parse("reward-model", settings))
    return example.ids[0]


def test_answers_are_tokenized_by_the_template_that_goes_with_the_model(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "1+1", "chosen": "2", "rejected": "3"}))
    template = str(ROOT / "configs" / "templates" / "r1.jinja")
    settings = {"kind": "pairwise", "preferences": str(tmp_path / "p.jsonl"), "model": {"path": str(TINY)}, "batch_size": 1}
    [ids] = run_ranks(1, chosen_ids, settings | {"chat_template": template})
    chat = Chat(TINY, chat_template=template)
    conversation = Conversation(({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}))
    assert ids == chat.scored_ids(conversation) != Chat(TINY).scored_ids(conversation)


def test_a_reward_model_is_no_policy(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(models.reward_model(model())))
    with pytest.raises(ValueError, match="a reward model, which writes no text"):
        checks.check_model(config.parse("eval", {"model": {"path": str(tmp_path)}}))


# The stage on data that are easily told apart: the better summary has the larger digit, whatever the reasoning before it says;
# a response is safe if the digit of its reasoning is large.

STAGE = """
kind = "{kind}"
preferences = "{folder}/preferences.jsonl"
epochs = {epochs}
batch_size = 16
max_length = 96
chunk_tokens = 512
[run]
dir = "{folder}/run"
[model]
path = "{model}"
init = "random"
[optimizer]
lr = 1e-3
lr_warmup_steps = 4
[data]
held_out = 32
[evaluation]
at_start = true
[checkpoint]
every = 2
[logging]
console_every = 1
tensorboard = false
"""


def write_preferences(file: Path, kind: str, *, count: int = 224) -> None:
    rng = random.Random(0)
    with file.open("w") as lines:
        for _ in range(count):
            prompt, thought = f"number {rng.randint(10, 99)}?", rng.randint(0, 9)
            if kind == "pairwise":
                low, high = sorted(rng.sample(range(10), 2))
                row = {"prompt": prompt, **{n: f"<think>{thought}</think>so {d}" for n, d in (("chosen", high), ("rejected", low))}}
            else:
                messages = [{"role": "user", "content": prompt}]
                label = "safe" if thought >= 5 else "unsafe"
                row = {"messages": messages, "response": f"<think>{str(thought) * 4}</think>ok", "label": label}
            lines.write(json.dumps(row) + "\n")


def start(folder: Path, kind: str, *, epochs: int, model_folder: Path = TINY, overrides: tuple[str, ...] = ()) -> Command:
    folder.mkdir(exist_ok=True)
    write_preferences(folder / "preferences.jsonl", kind)
    (folder / "stage.toml").write_text(STAGE.format(kind=kind, epochs=epochs, folder=folder, model=model_folder))
    return Command("reward-model", folder / "stage.toml", *overrides)


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def figures(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith(("time/", "perf/", "cost/", "unix"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_a_head_learns_to_tell_answers_apart_that_it_has_not_seen(kind: str, tmp_path: Path):
    code, output = start(tmp_path, kind, epochs=3).wait(400)
    assert code == 0, output
    first, *_, last = records(tmp_path)
    assert first["eval/accuracy"] < 0.8
    assert last["eval/accuracy"] >= 0.9, output
    assert last["eval/loss"] < 0.4 < first["eval/loss"]
    assert last["step"] == 36
    exported = json.loads((tmp_path / "run/hf/config.json").read_text())
    assert exported == models.reward_model(json.loads((TINY / "config.json").read_text()))


@pytest.mark.slow
def test_a_run_asked_to_stop_goes_on_to_the_same_figures(tmp_path: Path):
    code, output = start(tmp_path / "whole", "pairwise", epochs=1).wait(400)
    assert code == 0, output
    stopped = start(tmp_path / "stopped", "pairwise", epochs=1)
    limit = time.monotonic() + 200
    while len(records(tmp_path / "stopped")) < 4 and time.monotonic() < limit:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGUSR1)
    code, output = stopped.wait(200)
    assert code == 0, output
    assert "ended on request" in output
    code, output = start(tmp_path / "stopped", "pairwise", epochs=1).wait(400)
    assert code == 0, output
    assert "resumed at step" in output
    assert [figures(r) for r in records(tmp_path / "stopped")] == [figures(r) for r in records(tmp_path / "whole")]
    assert (tmp_path / "stopped/run/hf/model.safetensors").read_bytes() == (tmp_path / "whole/run/hf/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("chat_template=false",), "chat_template = false"),
        (("chunk_tokens=100",), "chunk_tokens = 100: an example has up to 192 tokens"),
        (("evaluation.problems=4",), "set data.held_out"),
        (("preferences=nowhere.jsonl",), "preferences = 'nowhere.jsonl': no such file"),
        (("max_length=17",), "224 are too long and 32 held out, which leaves too few to train on"),
    ],
)
def test_a_mistake_is_one_line(overrides: tuple[str, ...], words: str, tmp_path: Path):
    code, output = start(tmp_path, "pairwise", epochs=1, overrides=overrides).wait(100)
    assert code == 2, output
    assert words in output.splitlines()[-1], output
