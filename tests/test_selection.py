"""Dynamic sampling: which groups are trained on, and how the stage samples until there are enough."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from ranks import run_ranks

from megatron_r1 import selection
from megatron_r1.config_stages import GRPOConfig
from megatron_r1.data import Dataset
from megatron_r1.mixture import Mixture
from megatron_r1.types import Problem, Sample


def group(problem: int, *rewards: float, tokens: int = 2) -> list[Sample]:
    return [
        Sample(
            problem=Problem(id=problem, prompt="", answer=""),
            group_index=i,
            prompt_ids=[1],
            completion_ids=[2] * tokens,
            sampler_logprobs=[-1.0] * tokens,
            finish_reason="stop",
            weight_version=0,
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((1.0, 0.0), True),
        ((1.0, 1.0), False),
        ((0.0, 0.0, 0.0), False),
        ((1.5, 1.0, 1.5), True),
        ((math.nan, 1.0, 1.0), False),
        ((math.nan, 1.0, 0.0), True),
        ((math.nan, math.nan), False),
    ],
)
def test_a_group_has_a_signal_where_its_verified_rewards_differ(rewards, expected):
    assert selection.has_signal(group(0, *rewards)) is expected


def test_groups_with_a_signal_come_first_in_the_choice_and_all_stay_in_their_order():
    groups = [group(0, 1, 1), group(1, 1, 0), group(2, 0, 0), group(3, 0, 1), group(4, 1, 0)]
    ids = {count: [s.problem.id for s in selection.choose(groups, count)[::2]] for count in (2, 3, 4, 5)}
    assert ids == {2: [1, 3], 3: [1, 3, 4], 4: [0, 1, 3, 4], 5: [0, 1, 2, 3, 4]}
    assert selection.missing(groups, 4) == 1
    assert selection.choose([groups[2]], 1) == groups[2]


@dataclass
class Rollouts:
    """What a stage asked for whose rollouts give each problem, by its id, the rewards that a script says."""

    trained: list[int]  # problems, by group
    sampled: list[int]
    asked: list[list[int]]
    position: int  # of the data's cursor
    rewards: list[float]  # of the samples that are trained on
    overlong: set[float]


def on_a_rank(solved: set[int], stop_after: int, batch: dict[str, int]) -> Rollouts:
    from unittest.mock import patch

    from megatron_r1.metrics import Stopwatch
    from megatron_r1.stages import common, grpo

    batch = {"problems": 4, "completions": 2, "minibatches": 1, **batch}
    config = GRPOConfig(
        model={"path": "model"}, batch=batch, sampling={"max_tokens": 8}, steps=1, reference_refresh_steps=0, run={"seed": 3}
    )
    asked: list[list[int]] = []
    parts = SimpleNamespace(
        problems=Mixture(Dataset([Problem(id=i, prompt="", answer="") for i in range(40)], seed=3)),
        policy=SimpleNamespace(step=0),
        chat=SimpleNamespace(eos_id=0),
        stop=SimpleNamespace(is_noted=lambda: False, agreed=lambda: len(asked) >= stop_after),
        watchdog=SimpleNamespace(feed=lambda: None),
    )

    def roll_out(parts, problems, sampling, *, watch, turn, stop) -> list[Sample]:
        assert turn == len(asked), f"{turn=}"
        asked.append([p.id for p in problems])
        return [s for p in problems for s in group(p.id, 1.0, 0.0 if p.id in solved else 1.0, tokens=6)]

    with patch.object(common, "roll_out", roll_out):
        samples, sampled = grpo.roll_out(config, parts, watch=Stopwatch())
    ids = [[s.problem.id for s in some[::2]] for some in (samples, sampled)]
    overlong = {s.rewards["overlong"] for s in samples if "overlong" in s.rewards}
    return Rollouts(*ids, asked, parts.problems.reasoning.position, [s.reward for s in samples], overlong)


def rollouts(*, solved: set[int], stop_after: int = 99, **batch: int) -> Rollouts:
    """On a rank, for the stage imports Megatron."""
    return run_ranks(1, on_a_rank, solved, stop_after, batch)[0]


def order() -> Iterator[int]:
    return iter(p.id for p in Dataset([Problem(id=i, prompt="", answer="") for i in range(40)], seed=3).take(40))


def test_without_dynamic_sampling_one_rollout_is_trained_on_as_it_comes():
    ids = list(order())
    stage = rollouts(solved=set())
    assert (stage.trained, stage.sampled) == (ids[:4], ids[:4])
    assert stage.asked == [ids[:4]]
    assert stage.rewards == [1.0] * 8
    assert stage.position == 4


def test_groups_without_a_signal_are_replaced_until_the_batch_is_full():
    ids = list(order())
    stage = rollouts(solved={ids[0], ids[2], ids[5], ids[6]}, dynamic_sampling=9)
    assert (stage.trained, stage.sampled) == ([ids[0], ids[2], ids[5], ids[6]], ids[:7])
    assert stage.asked == [ids[:4], ids[4:6], ids[6:7]]
    assert stage.position == 7


def test_a_full_batch_asks_for_nothing_more():
    ids = list(order())
    stage = rollouts(solved=set(ids), dynamic_sampling=9)
    assert (stage.trained, stage.sampled) == (ids[:4], ids[:4])
    assert len(stage.asked) == 1


def test_at_the_limit_groups_without_a_signal_fill_the_batch():
    ids = list(order())
    stage = rollouts(solved={ids[7]}, dynamic_sampling=2)
    assert (stage.trained, stage.sampled) == ([*ids[:3], ids[7]], ids[:11])
    assert len(stage.asked) == 3


def test_a_stop_in_an_extra_rollout_leaves_nothing_to_train_on():
    stage = rollouts(solved=set(), stop_after=2, dynamic_sampling=9)
    assert (stage.trained, stage.sampled) == ([], [])
    assert len(stage.asked) == 2


def test_groups_are_chosen_by_their_rewards_before_the_length_penalty():
    ids = list(order())
    stage = rollouts(solved={ids[0], ids[5]}, dynamic_sampling=1, overlong_tokens=4)
    assert stage.overlong == {-0.5}, "6 of 8 tokens, the last 4 of which are penalised"
    assert sorted(set(stage.rewards)) == [-0.5, 0.5]
