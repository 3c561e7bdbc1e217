"""A run that was saved and loaded goes on as if it had not been: to the bit in its own layout, within rounding in others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcore_runs import Run, model
from ranks import run_ranks

from megatron_r1.parallel import Parallel

LAYOUTS = {
    "one rank": (1, Parallel()),
    "DP2": (2, Parallel()),
    "PP2": (2, Parallel(pipeline_model_parallel_size=2)),
    "TP2 x EP2": (2, Parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
    "CP2": (2, Parallel(context_parallel_size=2)),
}
Steps = dict[str, Any]


def draws() -> list[float]:
    """A number from each random generator."""
    import random

    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.random(), float(np.random.rand()), torch.rand(1).item(), tracked]


def unbroken(parallel: Parallel, folder: str, hf: dict[str, Any] | None = None, **training: Any) -> Steps:
    """Four steps, saved after the second, with the reference of step 1."""
    from megatron_r1.mcore import checkpoint

    with Run(parallel, hf=hf, **training) as run:
        run.policy.refresh_reference()
        run.grpo_step(0)
        run.policy.refresh_reference()
        run.grpo_step(1)
        draws()
        checkpoint.save(run.policy, folder, step=2, extra={"cursor": {"epoch": 1, "order": [3, 1, 2]}}, keep=2)
        random = draws()
        return {"metrics": [run.grpo_step(2), run.grpo_step(3)], "weights": run.weights(), "random": random}


def resumed(parallel: Parallel, folder: str, hf: dict[str, Any] | None = None, **training: Any) -> Steps:
    from megatron_r1.mcore import checkpoint

    with Run(parallel, hf=hf, **training) as run:
        extra = checkpoint.load(run.policy, checkpoint.latest(folder))
        assert extra == {"cursor": {"epoch": 1, "order": [3, 1, 2]}}
        assert (run.policy.step, run.policy.version, run.policy.reference_step) == (2, 2, 1)
        random = draws()
        return {"metrics": [run.grpo_step(2), run.grpo_step(3)], "weights": run.weights(), "random": random}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[str, Steps]]:
    """Each layout's folder and what its run did after the save."""
    made: dict[str, tuple[str, Steps]] = {}

    def get(name: str) -> tuple[str, Steps]:
        if name not in made:
            folder = str(tmp_path_factory.mktemp("run") / "checkpoints")
            ranks, parallel = LAYOUTS[name]
            made[name] = folder, run_ranks(ranks, unbroken, parallel, folder)[0]
        return made[name]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_its_own_layout_a_resumed_run_is_the_unbroken_one_to_the_bit(name: str, runs: Any):
    folder, expected = runs(name)
    ranks, parallel = LAYOUTS[name]
    got = run_ranks(ranks, resumed, parallel, folder)[0]
    assert got["metrics"] == expected["metrics"]
    assert got["random"] == expected["random"]
    assert all(np.array_equal(got["weights"][key], value) for key, value in expected["weights"].items())


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("one rank", "TP2 x EP2"), ("one rank", "PP2"), ("PP2", "DP2"), ("TP2 x EP2", "one rank"), ("DP2", "TP2 x EP2"), ("CP2", "PP2")],
)
def test_in_another_layout_it_is_within_rounding(saved: str, loaded: str, runs: Any):
    folder, expected = runs(saved)
    ranks, parallel = LAYOUTS[loaded]
    got = run_ranks(ranks, resumed, parallel, folder)[0]
    for mine, theirs in zip(got["metrics"], expected["metrics"], strict=True):
        for key in ("policy/loss", "policy/kl", "policy/grad_norm", "policy/lr"):
            assert mine[key] == pytest.approx(theirs[key], rel=5e-6, abs=1e-6), key
    for key, value in expected["weights"].items():
        np.testing.assert_allclose(got["weights"][key], value, rtol=0, atol=1e-5, err_msg=key)


def test_padding_between_gradient_buckets_shifts_nothing(tmp_path: Path):
    """Five experts make the first stage's weights before its embedding no multiple of what buckets are padded to."""
    ranks, parallel = LAYOUTS["PP2"]
    arguments = parallel, str(tmp_path), model(n_routed_experts=5, n_group=1)
    expected = run_ranks(ranks, unbroken, *arguments)[0]
    assert run_ranks(ranks, resumed, *arguments)[0]["metrics"] == expected["metrics"]


def with_bfloat16_moments(what: Any, parallel: Parallel, folder: str) -> Steps:
    """On a rank: `unbroken` or `resumed`, with the optimizer that Megatron takes from Transformer Engine."""
    from megatron_r1.mcore import cpu

    with cpu.without("optimizer"):
        return what(parallel, folder, dtype="bfloat16", moments_dtype="bfloat16")


@pytest.mark.parametrize("name", ["one rank", "DP2"])
def test_a_run_with_bfloat16_moments_is_resumed_to_the_bit(name: str, on_engine: Any, tmp_path: Path):
    ranks, parallel = LAYOUTS[name]
    expected = on_engine(ranks, with_bfloat16_moments, unbroken, parallel, str(tmp_path))[0]
    got = on_engine(ranks, with_bfloat16_moments, resumed, parallel, str(tmp_path))[0]
    assert got["metrics"] == expected["metrics"]
    assert all(np.array_equal(got["weights"][key], value) for key, value in expected["weights"].items())


def test_other_settings_take_effect_on_resume(runs: Any):
    folder, _ = runs("one rank")
    assert run_ranks(1, resumed_with, folder, {"lr": 1e-3, "weight_decay": 0.0})[0] == (1e-3, 0.0)


def resumed_with(folder: str, training: dict[str, float]) -> tuple[float, float]:
    from megatron_r1.mcore import checkpoint

    with Run(Parallel(), **training) as run:
        checkpoint.load(run.policy, checkpoint.latest(folder))
        group = next(group for group in run.policy.optimizer.param_groups if group["wd_mult"])
        return run.sft_step(0)["policy/lr"], group["weight_decay"]


def bookkeeping(folder: str) -> tuple[list[str], list[Any]]:
    """Saves before the first step and after later ones, keeping two; what is there and what `latest` says on the way."""
    from megatron_r1.mcore import checkpoint

    with Run(Parallel()) as run:
        said = [checkpoint.latest(folder), checkpoint.latest_step(folder)]
        for step in (0, 3, 12, 12):
            (Path(folder) / ".writing-00000005").mkdir(parents=True, exist_ok=True)  # an earlier process died here
            checkpoint.save(run.policy, folder, step=step, extra={}, keep=2)
            said.append(checkpoint.latest_step(folder))
        checkpoint.load(run.policy, checkpoint.latest(folder))
        return sorted(path.name for path in Path(folder).iterdir()), said


def test_latest_names_the_newest_and_older_ones_go(tmp_path: Path):
    names, said = run_ranks(1, bookkeeping, str(tmp_path / "checkpoints"))[0]
    assert names == ["latest", "step-00000003", "step-00000012"]
    assert said == [None, None, 0, 3, 12, 12]


def error_of_loading(folder: str, changes: dict[str, Any], training: dict[str, Any]) -> str:
    from megatron_r1.mcore import checkpoint

    with Run(Parallel(), hf=model(**changes), **training) as run:
        try:
            checkpoint.load(run.policy, checkpoint.latest(folder))
        except ValueError as error:
            return str(error)
    return "no error"


def damage(folder: Path, kind: str) -> None:
    path = folder / (folder / "latest").read_text()
    if kind == "gone":
        shutil.rmtree(path)
    elif kind == "garbled":
        (path / "policy.json").write_text("{")
    elif kind == "fields":
        about = json.loads((path / "policy.json").read_text())
        (path / "policy.json").write_text(json.dumps(about | {"hf": about["hf"] | {"torch_dtype": "bfloat16"}}))
    elif kind == "moments":
        about = json.loads((path / "policy.json").read_text())
        (path / "policy.json").write_text(json.dumps(about | {"moments_dtype": "bfloat16"}))
    else:
        (path / kind).unlink()


@pytest.mark.parametrize(
    ("kind", "changes", "training", "message"),
    [
        ("metadata.json", {}, {}, "not a complete checkpoint, metadata.json is missing"),
        ("policy.json", {}, {}, "not a complete checkpoint, policy.json is missing"),
        ("garbled", {}, {}, "damaged"),
        ("gone", {}, {}, "which is not there"),
        ("fields", {"n_routed_experts": 4}, {}, "holds a model with n_routed_experts = 8, config.json has 4"),
        ("fields", {}, {"train_mtp": True}, "of another stage"),
        ("moments", {}, {}, 'set it to "bfloat16"'),
        ("fields", {}, {}, "no error"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(kind: str, changes: dict, training: dict, message: str, runs: Any, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs("one rank")[0], folder)
    damage(folder, kind)
    error = run_ranks(1, error_of_loading, str(folder), changes, training)[0]
    assert message in error
    assert "\n" not in error
