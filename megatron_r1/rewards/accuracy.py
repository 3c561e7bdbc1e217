"""1.0 if the final answer is the reference answer, judged by math-verify (R1's accuracy reward, Nature 645 equation 4).

The final answer is the last `\\boxed{}` of the last `<answer>` after the reasoning, that `<answer>` itself if it has no box, or
the last box where there are no answer tags.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache

import math_verify

from megatron_r1.problem import Problem

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")

# It warns that it runs without a time limit: the verifier pool has one, and it works off the main thread.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def reward(completion: str, problem: Problem) -> float:
    """1.0 or 0.0. Raises ValueError for a reference answer math-verify cannot judge."""
    found = final_answer(completion)
    return float(found is not None and is_equal(found, problem.answer))


def final_answer(completion: str) -> str | None:
    """The answer a completion ends with; None if it has none or is still inside its reasoning."""
    _, closed, conclusion = completion.rpartition("</think>")
    if not closed and "<think>" in completion:
        return None
    tagged = ANSWER.findall(conclusion)
    text = tagged[-1] if tagged else conclusion
    box = last_box(text)
    if box is None and not tagged:
        return None
    return (text if box is None else box).strip()


def last_box(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, braces balanced."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : end]
        start = text.rfind("\\boxed{", 0, start)
    return None


def is_equal(found: str, reference: str) -> bool:
    """Same text, same plain number, or the same to math-verify. An answer that cannot be parsed is not equal."""
    found, reference = _bare(found), _bare(reference)
    if found == reference:
        return True
    if NUMBER.fullmatch(found) and NUMBER.fullmatch(reference):
        return Fraction(found) == Fraction(reference)
    expected = _parse(reference)
    # math-verify answers False to its own errors too; a reference that does not equal itself shows that it is at fault.
    if not math_verify.verify(expected, expected, timeout_seconds=None):
        raise ValueError(f"math-verify cannot judge the reference answer {reference!r}; correct it or use another reward")
    return math_verify.verify(expected, _parse(found), timeout_seconds=None)


def _bare(answer: str) -> str:
    return " ".join(answer.strip().strip("$").split())


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list:
    return math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
