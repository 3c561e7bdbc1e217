"""The collective view of the servers: who talks, what is sent again after a loss, and that seeds know nothing of layouts.

A fake engine plays the servers here; tests/test_rollout.py and tests/test_loop.py use real ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks

from megatron_r1.rollout.engine import Completion, EngineError, EngineLost, Request, SamplingParams


class FakeEngine:
    """Answers with the request's seed as its only token; loses its servers in the calls numbered in `lose`.

    Of the updates it loses the first `updates_to_lose`, half way.
    """

    def __init__(self, lose: Sequence[int], *, updates_to_lose: int = 0) -> None:
        self.lose, self.updates_to_lose, self.calls, self.updates, self.asked = lose, updates_to_lose, 0, [], []

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, stop: Callable[[], bool]
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.calls += 1
        self.asked.append([request.key for request in requests])
        done = requests[:1] if self.calls in self.lose else requests
        for request in reversed(done):
            yield request.key, [Completion([request.seed % 997 + i], [-1.0], "stop", 3) for i in range(sampling.n)]
        if self.calls in self.lose:
            raise EngineLost("gone", missing=[request.key for request in requests[1:]])

    def update_weights(self, weights: Iterable[Any], version: int, *, division: None) -> None:
        self.updates.append(version)
        if len(self.updates) <= self.updates_to_lose:
            next(iter(weights))
            raise EngineLost("gone in the middle")
        assert list(weights) == ["w", "x"]

    def canary(self, token_ids: Sequence[int], logprobs: Sequence[float], *, tolerance: float) -> float:
        assert len(logprobs) == len(token_ids) - 1
        return 0.5


class FakeWeights:
    """As the policy's, each iteration of them begins anew and every rank takes part in making each."""

    division = None

    def __iter__(self) -> Iterator[str]:
        from megatron_r1.mcore import distributed

        for name in ("w", "x"):
            made = distributed.gather_from_leaders([name])
            assert made == [name] * len(made), "the ranks are at the same weight"
            yield name


class FakePolicy:
    version, count_multiple = 3, 1

    def hf_weights(self, scope: str) -> FakeWeights:
        return FakeWeights()

    def attach_logprobs(self, microbatches: list[Any], which: str, *, temperature: float) -> None:
        for m in microbatches:
            m.old_logprobs_T = m.loss_mask_T * -1.0


def rollout_of(rank_that_loses: int, lose: Sequence[int], tensor: int, updates_to_lose: int = 0, context: int = 1) -> dict[str, Any]:
    """On each rank: six problems over the data-parallel ranks, two completions each."""
    from megatron_r1.mcore import distributed
    from megatron_r1.packing import TokenSequence, pack
    from megatron_r1.parallel import Parallel
    from megatron_r1.rollout.fleet import Fleet
    from megatron_r1.types import Problem

    distributed.init(Parallel(tensor_model_parallel_size=tensor, context_parallel_size=context), seed=1)
    try:
        loses = distributed.rank() == rank_that_loses
        engine = FakeEngine(lose if loses else (), updates_to_lose=updates_to_lose if loses else 0)
        [canary] = pack([TokenSequence(ids=[5, 6, 7], learned=[1, 1, 1])], [[0]])
        fleet = Fleet(engine, FakePolicy(), canary=canary, tolerance=1.0, seed=1)
        problems = [(Problem(i, str(i), ""), [i, i]) for i in range(6)][distributed.dp_rank() :: distributed.dp_size()]
        seen: list[int] = []
        sampling = SamplingParams(max_tokens=4, n=2)
        samples = fleet.generate(problems, sampling, on_sample=lambda s: seen.append(s.problem.id))
        asked, updates = list(engine.asked), list(engine.updates)
        again = distributed.gather_from_leaders(fleet.generate(problems, sampling, turn=1))
        everyone = distributed.gather_from_leaders(samples)
        return {
            "tokens": {(s.problem.id, s.group_index): s.completion_ids for s in everyone},
            "again": {(s.problem.id, s.group_index): s.completion_ids for s in again},
            "own order": [(s.problem.id, s.group_index) for s in samples],
            "seen": seen,
            "updates": updates,
            "asked": asked,
        }
    finally:
        distributed.shutdown()


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2), (2, 2)])
def test_every_rank_has_every_sample_and_only_leaders_sample(tensor, context):
    first, *others = run_ranks(tensor * context, rollout_of, 0, (), tensor, 0, context)
    assert len(first["tokens"]) == 12
    assert first["own order"] == sorted(first["own order"]), "the prompts' order, whatever order they finish in"
    for other in others:
        assert other["tokens"] == first["tokens"]
        assert other["own order"] == other["asked"] == []


def slow_rollout(collective_seconds: float, rollout_seconds: float) -> int:
    """Two ranks of which one waits for its servers; samples on this one."""
    from torch.distributed import distributed_c10d

    from megatron_r1.mcore import distributed
    from megatron_r1.packing import TokenSequence, pack
    from megatron_r1.parallel import Parallel
    from megatron_r1.rollout.fleet import Fleet
    from megatron_r1.types import Problem

    distributed.init(Parallel(), seed=1)
    try:
        [canary] = pack([TokenSequence(ids=[5, 6, 7], learned=[1, 1, 1])], [[0]])
        fleet = Fleet(FakeEngine(()), FakePolicy(), canary=canary, tolerance=1.0, seed=1)
        fleet.sync()
        distributed_c10d._set_pg_timeout(timedelta(seconds=collective_seconds))
        seconds = rollout_seconds * distributed.rank()
        return len(fleet.generate([(Problem(0, "0", ""), [0])], SamplingParams(max_tokens=4), on_sample=lambda s: time.sleep(seconds)))
    finally:
        distributed.shutdown()


def test_a_rollout_may_take_longer_than_a_collective():
    assert run_ranks(2, slow_rollout, 3.0, 6.0) == [1, 1]


def rollout_that_ends_early(how: str) -> tuple[list[str], str]:
    """What the scorer was asked when the servers are lost for good, or a stop is noted while completions wait for their verdicts."""
    from megatron_r1.mcore import distributed
    from megatron_r1.metrics import Stopwatch
    from megatron_r1.parallel import Parallel
    from megatron_r1.stages import common
    from megatron_r1.types import Problem

    def generate(prompts: Any, sampling: Any, *, on_sample: Callable, turn: int, stop: Callable) -> list[Any]:
        sample = SimpleNamespace(completion_ids=[3], problem=prompts[0][0], group_index=0)
        on_sample(sample)
        if how == "lost":
            raise EngineError("gone")
        return [sample]

    distributed.init(Parallel(), seed=1)
    asked: list[str] = []
    does = {name: (lambda *_, name=name: asked.append(name)) for name in ("submit", "collect", "close")}
    chat = SimpleNamespace(prompt_ids=lambda problem: [1], completion=lambda ids: "")
    parts = SimpleNamespace(chat=chat, scorer=SimpleNamespace(**does), fleet=SimpleNamespace(generate=generate))
    try:
        sampling, stop = SamplingParams(max_tokens=4), lambda: how == "stop"
        samples = common.roll_out(parts, [Problem(0, "0", "")], sampling, watch=Stopwatch(), stop=stop)
        return asked, f"{len(samples)} samples"
    except EngineError as error:
        return asked, str(error)
    finally:
        distributed.shutdown()


@pytest.mark.parametrize(
    ("how", "asked", "outcome"),
    [
        ("lost", ["submit", "close"], "gone"),
        ("stop", ["submit"], "1 samples"),
        ("whole", ["submit", "collect"], "1 samples"),
    ],
)
def test_nobody_waits_for_verdicts_that_come_to_nothing(how, asked, outcome):
    assert run_ranks(1, rollout_that_ends_early, how) == [(asked, outcome)]


def test_samples_do_not_depend_on_the_layout():
    [alone] = run_ranks(1, rollout_of, 0, (), 1)
    spread, _ = run_ranks(2, rollout_of, 0, (), 1)
    assert spread["tokens"] == alone["tokens"]


def test_the_same_prompts_are_sampled_otherwise_in_another_turn_with_the_same_weights():
    [alone] = run_ranks(1, rollout_of, 0, (), 1)
    spread, _ = run_ranks(2, rollout_of, 0, (), 1)
    assert alone["again"].keys() == alone["tokens"].keys()
    assert not [key for key, tokens in alone["again"].items() if tokens == alone["tokens"][key]]
    assert spread["again"] == alone["again"]


def test_a_lost_server_gets_the_weights_again_and_only_the_lost_requests():
    first, second = run_ranks(2, rollout_of, 1, (1,), 1)
    assert first["updates"] == [3, 3]
    assert second["asked"] == [[0, 1, 2], [1, 2]]
    assert first["asked"] == [[0, 1, 2]], "a rank that lost nothing samples nothing twice"
    assert len(first["tokens"]) == 12
    assert sorted(second["seen"]) == sorted([1, 1, 3, 3, 5, 5]), "each sample is verified once"


def test_a_server_that_dies_while_it_is_sent_weights_costs_one_more_update():
    first, second = run_ranks(2, rollout_of, 0, (), 1, 1)
    assert first["updates"] == second["updates"] == [3, 3], "every rank goes through the weights twice"
    assert len(first["tokens"]) == 12


def lose_for_ever() -> str:
    with pytest.raises(EngineError) as error:
        rollout_of(0, range(100), 1)
    return str(error.value)


def test_servers_that_are_lost_again_and_again_end_the_run_with_one_line():
    [message] = run_ranks(1, lose_for_ever)
    assert "servers were lost" in message
    assert "logs" in message
