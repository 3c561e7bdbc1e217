"""Worked examples of addition for the cold start: column by column with the carry, in R1's reasoning format.

    25 + 47  ->  <think>5+7=12 2+4+1=7</think><answer>72</answer>

Each column is its two digits, the carry if there is one, and their sum; a step needs two digits of the prompt and one of the
step before, so a small model can learn it. A share of the examples may be terse, the right answer and no reasoning:

    25 + 47  ->  <think></think><answer>72</answer>

Or each step of it may begin with a word, in one of several languages at random, which is what R1's language reward is for:

    25 + 47  ->  <think>add 5+7=12 \u52a0 2+4+1=7</think><answer>72</answer>

A small model cannot add in one go, so a policy that imitates both kinds fails where it does not reason, and what RL has to
discover is R1's own finding: that thinking longer pays.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

from megatron_r1.problem import Conversation, Problem

SUM = re.compile(r"\s*(\d+)\s*\+\s*(\d+)\s*")


ADD = ("add", "\u52a0")  # English, Chinese


def conversations(
    problems: Iterable[Problem], *, terse: float = 0.0, words: Sequence[str] = (), seed: int = 0
) -> list[Conversation]:
    """Each problem with its solution, a share `terse` of them without reasoning, the steps with one of `words` each.

    Raises ValueError for a prompt that is not like "25 + 47".
    """
    rng = random.Random(f"terse {seed}")
    made = []
    for problem in problems:
        answer = solution(problem.prompt, reasons=rng.random() >= terse, word=(lambda: f"{rng.choice(words)} ") if words else str)
        made.append(Conversation(({"role": "user", "content": problem.prompt}, {"role": "assistant", "content": answer})))
    return made


def solution(prompt: str, *, reasons: bool = True, word: Callable[[], str] = str) -> str:
    """The solution of "25 + 47", worked column by column, each after `word()`, or, without `reasons`, the answer alone."""
    match = SUM.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt {prompt!r}: worked examples are for sums of two numbers like '25 + 47'; use a file of conversations")
    first, second = match.groups()
    columns, carry = [], 0
    for a, b in zip_longest(reversed(first), reversed(second), fillvalue="0"):
        total = int(a) + int(b) + carry
        columns.append(f"{word()}{a}+{b}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return f"<think>{' '.join(columns) if reasons else ''}</think><answer>{int(first) + int(second)}</answer>"
