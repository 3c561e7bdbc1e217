"""Stage 2's problems: general prompts only from their step on, a fixed share of each batch, the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_r1 import config
from megatron_r1.data import Dataset
from megatron_r1.mixture import Mixture, load_general
from megatron_r1.problem import Problem


def problems(source: str, count: int, *, first: int = 0) -> list[Problem]:
    return [Problem(first + i, f"{source} {i}", "", source) for i in range(count)]


def mixture(*, general_count: int = 3, from_step: int = 32) -> Mixture:
    reasoning, general = problems("math", 20), problems("helpful", 6, first=20)
    return Mixture(Dataset(reasoning, seed=1), Dataset(general, seed=1), general_count=general_count, from_step=from_step)


def test_general_prompts_come_from_their_step_on_and_in_their_share():
    mixed = mixture()
    batches = [mixed.take(8, step=step) for step in (0, 16, 32, 48)]
    assert [[p.source for p in batch].count("helpful") for batch in batches] == [0, 0, 3, 3]
    assert all(len({p.id for p in batch}) == 8 for batch in batches)
    assert {p.id for batch in batches for p in batch if p.source == "helpful"} == set(range(20, 26)), "none of them twice in an epoch"


def test_before_that_the_reasoning_problems_are_those_of_a_run_without_general_ones():
    alone = Mixture(Dataset(problems("math", 20), seed=1))
    mixed = mixture()
    assert [mixed.take(8, step=step) for step in (0, 16)] == [alone.take(8, step=step) for step in (0, 16)]


def test_all_of_a_batch_may_be_general():
    assert {p.source for p in mixture(general_count=6, from_step=0).take(6, step=0)} == {"helpful"}


def test_a_resumed_mixture_goes_on_with_the_same_batches():
    whole, first, second = mixture(), mixture(), mixture()
    expected = [whole.take(8, step=step) for step in range(0, 128, 16)]
    got = [first.take(8, step=step) for step in range(0, 64, 16)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.take(8, step=step) for step in range(64, 128, 16)]
    assert got == expected


def test_a_checkpoint_without_general_prompts_can_go_on_with_them_and_not_the_other_way_round():
    alone = Mixture(Dataset(problems("math", 20), seed=1))
    alone.take(8, step=0)
    mixed = mixture()
    mixed.load_state_dict(alone.state_dict())
    assert mixed.take(8, step=16) == alone.take(8, step=16)
    with pytest.raises(ValueError, match=r"set general\.jsonl"):
        alone.load_state_dict(mixed.state_dict())


@pytest.mark.parametrize("count", [0, 7])
def test_a_share_that_cannot_be_had_is_an_error_at_once(count: int):
    with pytest.raises(ValueError, match=rf"general\.share: makes {count} general prompts a batch of 6"):
        mixture(general_count=count)


def test_general_prompts_carry_their_source_and_numbers_of_their_own(tmp_path: Path):
    file = tmp_path / "g.jsonl"
    file.write_text('{"prompt": "hello?", "source": "helpful"}\n\n{"prompt": "a bomb?", "source": "safety"}\n')
    assert load_general(str(file), first_id=7) == [Problem(7, "hello?", "", "helpful"), Problem(8, "a bomb?", "", "safety")]
    file.write_text('{"prompt": "hello?"}\n')
    with pytest.raises(ValueError, match=r"g\.jsonl:1: 'source' is None"):
        load_general(str(file), first_id=0)


def stage_2_batches(folder: str) -> list[list[tuple[int, str]]]:
    from megatron_r1.stages import common

    tree = {"model": {"path": "m"}, "data": {"jsonl": f"{folder}/p.jsonl", "held_out": 2}, "steps": 32, "reference_refresh_steps": 0}
    general = {"jsonl": f"{folder}/g.jsonl", "from_step": 16, "share": 0.5}
    mixed, _ = common.load_problems(config.parse("grpo", {**tree, "batch": {"problems": 4}, "general": general}))
    return [[(problem.id, problem.source) for problem in mixed.take(4, step=step)] for step in (0, 16)]


def test_a_grpo_run_takes_its_general_share_from_the_config(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{i}", "answer": "{i}"}}\n' for i in range(12)))
    (tmp_path / "g.jsonl").write_text('{"prompt": "hello?", "source": "helpful"}\n{"prompt": "a bomb?", "source": "safety"}\n')
    before, after = run_ranks(1, stage_2_batches, str(tmp_path))[0]
    assert all(number < 12 for number, _ in before)
    assert sorted(after)[-2:] == [(12, "helpful"), (13, "safety")]
    assert all(number < 12 for number, _ in sorted(after)[:2])


def test_general_prompts_begin_with_the_first_rollout_of_the_last_400_steps():
    mixed = mixture(from_step=1300)
    assert {p.source for p in mixed.take(8, step=1296)} == {"math"}
    assert {p.source for p in mixed.take(8, step=1312)} == {"math", "helpful"}
