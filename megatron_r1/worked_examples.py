"""Worked examples of addition for the cold start: column by column with the carry, in R1's reasoning format.

    25 + 47  ->  <think>5+7=12 2+4+1=7</think><answer>72</answer>

Each column is its two digits, the carry if there is one, and their sum; a step needs two digits of the prompt and one of the
step before, so a small model can learn it, and a slip anywhere makes the answer wrong.

A share of the examples may hold a slip: one column's sum is off by one, and what follows is consistent with it. A policy that
imitates them can add and often does not, as a base model that was trained on everything; RL then has something to select.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from itertools import zip_longest

from megatron_r1.problem import Conversation, Problem

SUM = re.compile(r"\s*(\d+)\s*\+\s*(\d+)\s*")


def conversations(problems: Iterable[Problem], *, slips: float = 0.0, seed: int = 0) -> list[Conversation]:
    """Each problem with its worked solution, a share `slips` of them with a slip. Raises ValueError for what is not "25 + 47"."""
    rng = random.Random(f"slips {seed}")
    made = []
    for problem in problems:
        slip = rng.randrange(2), rng.choice((-1, 1))
        answer = solution(problem.prompt, slip=slip if rng.random() < slips else None)
        made.append(Conversation(({"role": "user", "content": problem.prompt}, {"role": "assistant", "content": answer})))
    return made


def solution(prompt: str, *, slip: tuple[int, int] | None = None) -> str:
    """The worked solution of "25 + 47"; `slip` = (column, what its sum is off by), of a column there may not be."""
    match = SUM.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt {prompt!r}: worked examples are for sums of two numbers like '25 + 47'; use a file of conversations")
    first, second = match.groups()
    columns, carry = [], 0
    digits = ""
    for column, (a, b) in enumerate(zip_longest(reversed(first), reversed(second), fillvalue="0")):
        total = int(a) + int(b) + carry
        if slip is not None and column == slip[0]:
            total = max(0, total + slip[1])
        columns.append(f"{a}+{b}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
        digits = f"{total % 10}{digits}"
    return f"<think>{' '.join(columns)}</think><answer>{int(f'{carry}{digits}')}</answer>"
