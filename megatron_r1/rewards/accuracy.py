"""1.0 if the final answer is the reference answer, judged by math-verify (R1's accuracy reward, Nature 645 equation 4).

The final answer is the last `\\boxed{}` of the last `<answer>` after the reasoning, that `<answer>` itself if it has no box, or
the last box where there are no answer tags.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import cache, lru_cache
from types import ModuleType

from megatron_r1.problem import Problem
from megatron_r1.verifying.completion import final_answer

NUMBER = re.compile(r"[+-]?\d{1,99}(\.\d{1,99})?")
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
STOPS = " .,;\u3002\uff0c\uff1b"  # that a sentence has after its answer
LONGEST = 2000  # characters of an answer; of what never ends, math-verify would make numbers that Python refuses

# It warns that it runs without a time limit: the verifier pool has one, and it works off the main thread.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def reward(completion: str, problem: Problem) -> float:
    """1.0 or 0.0. Raises ValueError for a reference answer math-verify cannot judge."""
    found = final_answer(completion)
    return float(found is not None and is_equal(found, problem.answer))


def warm_up() -> None:
    """Import math-verify before the first answer's time runs."""
    _math_verify()


def is_equal(found: str, reference: str) -> bool:
    """Same text, same plain number, or the same to math-verify. An answer that cannot be parsed is not equal."""
    found, reference = _bare(found), _bare(reference)
    if found == reference:
        return True
    if len(found) > LONGEST:
        return False
    if NUMBER.fullmatch(found) and NUMBER.fullmatch(reference):
        return Fraction(found) == Fraction(reference)
    expected = _parse(reference)
    # math-verify answers False to its own errors too; a reference that does not equal itself shows that it is at fault.
    if not _math_verify().verify(expected, expected, timeout_seconds=None):
        raise ValueError(f"math-verify cannot judge the reference answer {reference!r}; correct it or use another reward")
    return _math_verify().verify(expected, _parse(found), timeout_seconds=None)


def _bare(answer: str) -> str:
    """The answer without what surrounds it: the sentence's full stop, mathematics' dollars, emphasis, a box of text."""
    bare, before = " ".join(answer.split()), ""
    while bare != before:
        before, bare = bare, bare.rstrip(STOPS).lstrip()
        for mark in "$*`":
            if len(bare) > 1 and bare[0] == bare[-1] == mark:
                bare = bare[1:-1]
    words = TEXT.fullmatch(bare)
    return (words[1] if words else bare).strip("$ ")


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list:
    return _math_verify().parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


@cache
def _math_verify() -> ModuleType:
    """1.5 seconds, and of the processes that read this file only the verifiers judge answers."""
    import math_verify

    return math_verify
