"""Worked examples of addition for the cold start: column by column with the carry, in R1's reasoning format.

    25 + 47  ->  <think>5+7=12 2+4+1=7</think><answer>72</answer>

Each column is its two digits, the carry if there is one, and their sum; a step needs two digits of the prompt and one of the
step before, so a small model can learn it, and a slip anywhere makes the answer wrong, which is what RL then mends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import zip_longest

from megatron_r1.problem import Conversation, Problem

SUM = re.compile(r"\s*(\d+)\s*\+\s*(\d+)\s*")


def conversations(problems: Iterable[Problem]) -> list[Conversation]:
    """Each problem with its worked solution. Raises ValueError for a prompt that is not the sum of two numbers."""
    return [
        Conversation(({"role": "user", "content": problem.prompt}, {"role": "assistant", "content": solution(problem.prompt)}))
        for problem in problems
    ]


def solution(prompt: str) -> str:
    """The worked solution of "25 + 47"."""
    match = SUM.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt {prompt!r}: worked examples are for sums of two numbers like '25 + 47'; use a file of conversations")
    first, second = match.groups()
    columns, carry = [], 0
    for a, b in zip_longest(reversed(first), reversed(second), fillvalue="0"):
        total = int(a) + int(b) + carry
        columns.append(f"{a}+{b}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return f"<think>{' '.join(columns)}</think><answer>{int(first) + int(second)}</answer>"
