"""The whole loop, as a user starts it: `python -m megatron_r1 grpo`, real trainer ranks, a real vLLM server."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Command

from megatron_r1.processes import free_port
from megatron_r1.rollout.server_process import ServerProcess, server_command

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny_v3"
LIMIT = 240.0

Losses = tuple[float, float, float]

CONFIG = """
steps = 6
reference_refresh_steps = 4
[run]
dir = "{folder}/{name}"
[model]
path = "{model}"
init = "random"
[optimizer]
lr = 1e-3
[data]
reasoning_gym = "chain_sum"
size = 64
held_out = 8
[batch]
problems = 4
completions = 4
minibatches = 2
chunk_tokens = 512
[rollout]
urls = ["{url}"]
max_prompt_tokens = 96
[sampling]
max_tokens = 24
temperature = 0.9
[evaluation]
problems = 8
samples = 3
[checkpoint]
every = 2
keep = 5
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    argv, env = server_command(
        str(TINY), port=port, dtype="float32", max_model_len=128, max_num_seqs=64, kv_cache_bytes=64 << 20, weight_transfer="gloo"
    )
    process = ServerProcess(argv, env, port=port, log_file=folder / "server.log")
    process.start()
    process.wait_ready(LIMIT)
    yield process
    process.stop()


class Loop:
    """Runs of one config in one folder."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def start(self, name: str, *overrides: str) -> Command:
        file = self.folder / f"{name}.toml"
        file.write_text(CONFIG.format(folder=self.folder, name=name, url=self.url, model=TINY))
        return Command("grpo", file, *overrides)

    def run(self, name: str, *overrides: str) -> tuple[int, str]:
        return self.start(name, *overrides).wait(LIMIT)

    def wait(self, process: Command, condition: Callable[[], Any]) -> None:
        """Until it comes true, while the run goes on."""
        limit = time.monotonic() + LIMIT
        while not condition():
            assert process.poll() is None, process.output
            assert time.monotonic() < limit
            time.sleep(0.1)

    def records(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def losses(self, name: str) -> dict[int, Losses]:
        """Of each optimizer step: the loss, the gradient norm, and the KL to the reference."""
        keys = ("policy/loss", "policy/grad_norm", "policy/kl")
        return {r["step"]: tuple(r[key] for key in keys) for r in self.records(name) if keys[0] in r}


@pytest.fixture(scope="module")
def loop(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop(tmp_path_factory.mktemp("loop"), server.url)


@pytest.fixture(scope="module")
def unbroken(loop: Loop) -> dict[int, Losses]:
    """The losses of a run that nothing disturbed."""
    code, out = loop.run("unbroken")
    assert code == 0, out
    return loop.losses("unbroken")


def test_a_run_trains_evaluates_saves_and_exports(loop, unbroken):
    assert sorted(unbroken) == [1, 2, 3, 4, 5, 6]
    run = loop.folder / "unbroken"
    last = loop.records("unbroken")[-1]
    for name in ("reward/accuracy", "reward/format", "rollout/length_p95", "policy/kl", "policy/ratio_max_negative", "eval/pass@1"):
        assert name in last, name
    assert last["cost/gpu_hours"] > 0.0
    assert (last["eval/problems"], last["eval/samples"]) == (8.0, 24.0)
    assert "eval/cons@3" in last
    samples = [json.loads(line) for line in (run / "eval/step_000006.jsonl").read_text().splitlines()]
    assert len({(row["problem"], row["sample"]) for row in samples}) == len(samples) == 24
    assert sum(row["correct"] for row in samples) / 24 == pytest.approx(last["eval/pass@1"])
    assert {"grpo.toml", "metrics.jsonl", "tensorboard", "logs", "checkpoints", "hf"} <= {p.name for p in run.iterdir()}
    samples = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {2, 4, 6}
    assert len(samples) == 12, "four a rollout"
    assert {p.name for p in TINY.iterdir()} <= {p.name for p in (run / "hf").iterdir()}


def test_sampler_and_trainer_agree_on_the_log_probs_of_every_token(loop, unbroken):
    gaps = [r["sync/logprob_gap_max"] for r in loop.records("unbroken") if "sync/logprob_gap_max" in r]
    assert gaps
    assert max(gaps) <= 1e-4


def test_every_sync_is_checked_by_the_canary(loop, unbroken):
    gaps = [r["sync/canary_gap"] for r in loop.records("unbroken") if "sync/canary_gap" in r]
    assert len(gaps) == 3
    assert max(gaps) <= 1e-4
    assert max(gaps) > 0.0, "a gap of exactly 0 at every sync means that nothing was compared"


def test_no_verifier_failed(loop, unbroken):
    assert sum(r.get("reward/verifier_failures", 0.0) for r in loop.records("unbroken")) == 0.0


def test_the_kl_is_a_sawtooth_that_falls_to_zero_at_each_new_reference(loop, unbroken):
    kl = {step: kl for step, (_, _, kl) in unbroken.items()}
    new = [step for step in kl if kl[step] == pytest.approx(0.0, abs=1e-6)]
    assert new == [1, 5], "reference_refresh_steps = 4: step 5 is the first whose reference is the policy again"
    assert all(kl[step] > 1e-5 for step in (2, 3, 4, 6))


def test_a_run_that_ended_within_a_rollout_and_is_given_more_steps_still_gets_its_references(loop):
    short = ("evaluation.problems=0", "checkpoint.export=false")
    for steps in (3, 7):
        code, output = loop.run("extended", f"steps={steps}", *short)
        assert code == 0, output
    kl = {step: kl for step, (_, _, kl) in loop.losses("extended").items()}
    assert kl[4] > 0.0, "within the first 4 steps, and not on the first rollout"
    assert kl[6] == pytest.approx(0.0, abs=1e-6), "the rollout of steps 4 and 5 passed the refresh at step 4"


def test_a_run_that_is_killed_goes_on_bitwise_equal_its_kl_included(loop, unbroken):
    process = loop.start("killed")
    loop.wait(process, (loop.folder / "killed/checkpoints/latest").exists)
    for rank in psutil.Process(process.pid).children():
        rank.kill()
    code, out = process.wait(LIMIT)
    assert code == 1, out
    code, out = loop.run("killed")
    assert code == 0, out
    assert "resumed at step" in out, out
    assert loop.losses("killed") == unbroken


def test_sigusr1_saves_ends_with_code_0_and_the_run_goes_on(loop, unbroken):
    process = loop.start("signalled")
    loop.wait(process, lambda: loop.losses("signalled"))
    process.send_signal(signal.SIGUSR1)
    code, out = process.wait(LIMIT)
    assert code == 0, out
    assert "ended on request" in out, out
    code, out = loop.run("signalled")
    assert code == 0, out
    assert loop.losses("signalled") == unbroken


def test_at_other_layouts_a_run_has_the_same_losses(loop, unbroken):
    """PP2 x EP2, where each of the four ranks sends weights of its own, then CP2 x EP2."""
    experts = "parallel.expert_model_parallel_size=2"
    stages = ("parallel.world_size=4", "parallel.pipeline_model_parallel_size=2", "rollout.weight_senders=experts")
    code, out = loop.run("moved", experts, *stages, "steps=2")
    assert code == 0, out
    code, out = loop.run("moved", experts, "parallel.world_size=2", "parallel.context_parallel_size=2")
    assert code == 0, out
    found = loop.losses("moved")
    assert sorted(found) == sorted(unbroken)
    for step, expected in unbroken.items():
        assert found[step] == pytest.approx(expected, rel=1e-3, abs=1e-5), f"{step=}"


def test_dapo_with_extra_rollouts_and_a_corrected_sampler_goes_on_with_the_same_losses(loop):
    dapo = ("algorithm.name=dapo", "algorithm.options.correction=tis", "algorithm.options.kl_coefficient=0.1")
    batch = ("batch.dynamic_sampling=2", "batch.overlong_tokens=8")
    code, out = loop.run("dapo", *dapo, *batch)
    assert code == 0, out
    for steps in ("steps=2", "steps=6"):
        code, out = loop.run("dapo_resumed", *dapo, *batch, steps)
        assert code == 0, out
    assert "resumed at step 2" in out, out
    resumed, whole = loop.losses("dapo_resumed"), loop.losses("dapo")
    assert sorted(resumed) == sorted(whole)
    for step, expected in whole.items():  # not to the bit: the sampler's log-probs, in the loss here, round as its batches fall
        assert resumed[step] == pytest.approx(expected, rel=1e-5, abs=1e-6), f"{step=}"
    rollouts = [r for r in loop.records("dapo") if "rollout/dropped" in r]
    assert len(rollouts) == 3
    assert max(r["rollout/dropped"] for r in rollouts) > 0
    assert all(r["policy/correction_weight"] == pytest.approx(1.0, abs=1e-4) for r in rollouts), "the engines agree"
    assert all(-1.0 <= r["reward/overlong"] <= 0.0 for r in rollouts)


def test_a_server_without_the_right_answers_stops_the_run(loop):
    code, out = loop.run("canary", "rollout.canary_tolerance=1e-12")
    assert code == 2, out
    assert "canary_tolerance" in out.splitlines()[-1]


def test_a_dead_address_is_one_clear_line(loop):
    code, out = loop.run("dead", f'rollout.urls=["http://127.0.0.1:{free_port()}"]', "rollout.start_timeout_seconds=2.0")
    assert code == 2, out
    assert "http://127.0.0.1:" in out.splitlines()[-1]


def test_two_runs_cannot_write_to_one_folder(loop):
    first = loop.start("twice", "steps=600")
    loop.wait(first, lambda: loop.records("twice"))
    code, out = loop.run("twice")
    first.send_signal(signal.SIGKILL)
    first.wait(LIMIT)
    assert code == 2, out
    assert "run.dir" in out.splitlines()[-1]


def test_a_checkpoint_of_another_model_is_refused(loop, unbroken, tmp_path):
    shutil.copytree(loop.folder / "unbroken/checkpoints", loop.folder / "other/checkpoints")
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}))
    code, out = loop.run("other", f"model.path={model}")
    assert code == 2, out
    assert "checkpoint" in out.splitlines()[-1]
