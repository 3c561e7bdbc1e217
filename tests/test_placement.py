"""Servers on the trainer's GPUs: each side makes room for the other, in this order, and the policy comes back to the bit."""

from __future__ import annotations

import os
import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcore_runs import Run
from ranks import run_ranks
from test_fleet import FakeEngine, FakePolicy

from megatron_r1.parallel import Parallel
from megatron_r1.rollout import server_process
from megatron_r1.rollout.engine import SamplingParams

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAINED = {"train_mtp": False, "dtype": "bfloat16"}


def steps(parallel: Parallel, moves: bool, training: dict[str, Any]) -> Any:
    """Two steps, between them a stay on the host; how many bytes were left on the device meanwhile, and of how many."""
    from megatron_r1.mcore.offload import Offload

    with Run(parallel, **training) as run:
        run.policy.refresh_reference()
        offload = Offload(run.policy.chunks, run.policy.optimizer)
        found, left = [run.grpo_step(0)], []
        for number in (1, 2) if moves else ():
            tensors = [t for chunk in run.policy.chunks for t in (*chunk.module.parameters(), *chunk.module.buffers())]
            buffers = [b for chunk in run.policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
            states = [v for part in run.policy.optimizer.chained_optimizers for s in part.optimizer.state.values() for v in s.values()]
            moved = [*tensors, *(b.param_data for b in buffers), *(b.grad_data for b in buffers), *states]
            whole = sum(t.untyped_storage().nbytes() for t in moved)
            offload.move_out()
            left.append((sum(t.untyped_storage().nbytes() for t in moved), whole, len(states)))
            offload.move_in()
            assert sum(t.untyped_storage().nbytes() for t in moved) == whole, number
        found.append(run.grpo_step(1))
        return found, run.weights(), left


@pytest.mark.parametrize(("ranks", "parallel"), [(1, Parallel()), (2, Parallel(expert_model_parallel_size=2))], ids=["one rank", "EP2"])
@pytest.mark.parametrize("training", [TRAINED, {}], ids=["bf16", "float32"])
def test_a_policy_that_was_on_the_host_trains_on_to_the_bit(ranks, parallel, training):
    stayed, moved = run_ranks(ranks, steps, parallel, False, training)[0], run_ranks(ranks, steps, parallel, True, training)[0]
    assert moved[0] == stayed[0]
    assert all(np.array_equal(moved[1][name], weight) for name, weight in stayed[1].items())
    assert len(moved[2]) == 2
    for left, whole, states in moved[2]:
        assert left == 0
        assert whole > 1 << 20
        assert states > 20


class Recorder(FakeEngine):
    def __init__(self, lose: tuple[int, ...] = ()) -> None:
        super().__init__(lose)
        self.said: list[str] = []

    def sleep(self) -> None:
        self.said.append("sleep")

    def wake(self, tag: str) -> None:
        self.said.append(f"wake {tag}")

    def update_weights(self, weights: Any, version: int, *, division: Any) -> None:
        super().update_weights(weights, version, division=division)
        self.said.append(f"weights {version}")

    def canary(self, *args: Any, **kwargs: Any) -> float:
        self.said.append("canary")
        return super().canary(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.said.append("generate")
        return super().generate(*args, **kwargs)


class Policy(FakePolicy):
    """Says when it moves, and that nobody asks anything of it while it is out."""

    is_out = False

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def trim(self) -> None:
        self.said.append("trim")

    def move_out(self) -> None:
        self.said.append("policy out")
        self.is_out = True

    def move_in(self) -> None:
        self.said.append("policy in")
        self.is_out = False

    def hf_weights(self, scope: str) -> Any:
        assert not self.is_out
        return super().hf_weights(scope)

    def attach_logprobs(self, *args: Any, **kwargs: Any) -> None:
        assert not self.is_out
        super().attach_logprobs(*args, **kwargs)


def conversation(placed: str, lose: tuple[int, ...], rollouts: int) -> list[str]:
    """On a rank: what servers and policy are told in these rollouts, between which nothing is learned."""
    from megatron_r1.mcore import distributed
    from megatron_r1.packing import TokenSequence, pack
    from megatron_r1.rollout.fleet import Fleet
    from megatron_r1.rollout.placement import Colocated, Dedicated
    from megatron_r1.types import Problem

    distributed.init(Parallel(), seed=1)
    try:
        engine = Recorder(lose)
        policy = Policy(engine.said)
        placement = Colocated(engine, policy) if placed == "colocated" else Dedicated()
        [canary] = pack([TokenSequence(ids=[5, 6, 7], learned=[1, 1, 1])], [[0]])
        fleet = Fleet(engine, policy, canary=canary, tolerance=1.0, seed=1, placement=placement)
        for _ in range(rollouts):
            fleet.sync()
            fleet.generate([(Problem(i, "", ""), [i]) for i in range(2)], SamplingParams(max_tokens=1))
        assert not policy.is_out
        assert fleet.version == 3
        return engine.said
    finally:
        distributed.shutdown()


SEND = ["trim", "wake weights", "weights 3"]
SAMPLE = ["policy out", "wake kv_cache", "canary", "generate"]
TRAIN = ["sleep", "policy in"]


def test_colocated_servers_and_policy_take_turns():
    assert run_ranks(1, conversation, "colocated", (), 2)[0] == [*SEND, *SAMPLE, *TRAIN] * 2


class Late:
    """What rank 1 has of a policy: it moves when the others have long done so."""

    def __init__(self) -> None:
        self.done: list[tuple[float, str]] = []

    def note(self, what: str) -> None:
        self.done.append((time.monotonic(), what))

    def make_room(self, what: str) -> None:
        time.sleep(0.5 * int(os.environ["RANK"]))
        self.note(what)

    def trim(self) -> None:
        self.make_room("trim")

    def move_out(self) -> None:
        self.make_room("policy out")

    def sleep(self) -> None: ...

    def wake(self, tag: str) -> None:
        self.note(f"wake {tag}")


def order_of_ranks() -> list[tuple[float, str]]:
    from megatron_r1.mcore import distributed
    from megatron_r1.rollout.placement import Colocated

    distributed.init(Parallel(), seed=1)
    try:
        both = Late()
        placement = Colocated(both, both)
        placement.sending()
        placement.sampling()
        return both.done
    finally:
        distributed.shutdown()


def test_servers_wake_when_the_last_rank_has_made_room():
    said = [what for _, what in sorted(chain(*run_ranks(2, order_of_ranks)))]
    assert said == ["trim", "trim", "wake weights", "policy out", "policy out", "wake kv_cache"]


def caches_emptied() -> list[bool]:
    """On a rank, for this imports Megatron: whether there was CUDA when torch's cache was emptied."""
    from unittest.mock import patch

    import torch

    from megatron_r1.mcore import offload

    emptied: list[bool] = []
    for has_cuda in (False, True):
        note = partial(emptied.append, has_cuda)
        with patch.object(torch.cuda, "empty_cache", note), patch.object(offload.cpu, "has_cuda", lambda found=has_cuda: found):
            offload.Offload([], None).trim()
    return emptied


def test_trimming_gives_back_what_torch_keeps_of_a_gpu():
    assert run_ranks(1, caches_emptied) == [[True]]


def test_servers_of_their_own_keep_their_weights_and_nobody_moves():
    assert run_ranks(1, conversation, "dedicated", (), 2)[0] == ["weights 3", "canary", "generate", "generate"]


def test_a_server_that_was_lost_while_the_policy_is_out_gets_weights_again():
    lost = run_ranks(1, conversation, "colocated", (1,), 1)[0]
    assert lost == [*SEND, *SAMPLE, *TRAIN] * 2


class Built(Exception):
    """Ends a stage's start where its policy would be built."""


def start(placed: str, folder: str) -> list[str]:
    """On a rank: what servers are told before there is a policy."""
    from unittest import mock

    from megatron_r1 import config
    from megatron_r1.mcore import distributed
    from megatron_r1.stages import common

    engine = Recorder()
    engine.buckets = mock.Mock()
    own = [f"run.dir={folder}", f"model.path={CONFIGS}/models/tiny_v3", "model.init=random", 'rollout.urls=["http://here:1"]']
    layout = ["parallel.world_size=1", "parallel.expert_model_parallel_size=1", f"rollout.placement={placed}"]
    settings = config.load("grpo", CONFIGS / "tiny_grpo.toml", [*own, *layout])
    fakes = {"VLLMServers": lambda *args, **options: engine, "Policy": mock.Mock(side_effect=Built), "Watchdog": mock.Mock()}
    try:
        with mock.patch.multiple(common, StopRequest=mock.Mock(), hold=mock.Mock(), **fakes), pytest.raises(Built):
            common.make(settings, steps=settings.steps)
    finally:
        distributed.shutdown()
    return engine.said


@pytest.mark.parametrize(("placed", "said"), [("colocated", ["sleep"]), ("dedicated", [])])
def test_servers_that_share_a_gpu_sleep_before_there_is_a_policy(placed, said, tmp_path):
    assert run_ranks(1, start, placed, str(tmp_path))[0] == said


def test_only_servers_that_share_a_gpu_are_started_with_sleep_mode(monkeypatch):
    monkeypatch.setattr(server_process, "is_cpu_build", lambda: False)
    assert server_process.placement_flags("colocated") == ["--enable-sleep-mode", "--gpu-memory-utilization", "0.01"]
    assert server_process.placement_flags("dedicated") == []
    monkeypatch.setattr(server_process, "is_cpu_build", lambda: True)
    assert server_process.placement_flags("colocated") == []
