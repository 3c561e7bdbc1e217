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
TEXT = re.compile(r"^\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}$")
STOPS = tuple(".,;\u3002\uff0c\uff1b")  # that a sentence has after its answer
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
    """Same words, same plain number, or the same to math-verify. An answer that cannot be parsed, or never ends, is not equal.

    math-verify is given the answers as written, for it may need a sentence's dollars and full stop to find what is mathematics; then,
    if that has not made them equal, without them.
    """
    if len(found) > LONGEST:
        return False
    written, bare = [_plain(answer) for answer in (found, reference)], [_bare(answer) for answer in (found, reference)]
    words = [TEXT.sub(r"\1", answer) for answer in bare]
    if words[0] == words[1]:
        return True
    if all(NUMBER.fullmatch(answer) for answer in words):
        return Fraction(words[0]) == Fraction(words[1])
    verify, can_judge = _math_verify().verify, False
    for answer, expected in dict.fromkeys((tuple(written), tuple(bare))):
        expected_form = _parse(expected)
        # math-verify answers False to its own errors too; a reference that does not equal itself shows that it is at fault.
        if not verify(expected_form, expected_form, timeout_seconds=None):
            continue
        can_judge = True
        if verify(expected_form, _parse(answer), timeout_seconds=None):
            return True
    if not can_judge:
        raise ValueError(f"math-verify cannot judge the reference answer {reference!r}; correct it or use another reward")
    return False


def _plain(answer: str) -> str:
    return " ".join(answer.strip().strip("$").split())


def _bare(answer: str) -> str:
    """The answer without what surrounds it: LaTeX's spaces, the sentence's full stop, mathematics' dollars, emphasis."""
    bare, before = _plain(answer), ""
    while bare != before:
        before, bare = bare, bare.strip().removesuffix("\\")
        if bare[-1:] in STOPS:
            bare = bare[:-1]
        for mark in "$*`":
            if len(bare) > 1 and bare[0] == bare[-1] == mark:
                bare = bare[1:-1]
    return bare


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list:
    return _math_verify().parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


@cache
def _math_verify() -> ModuleType:
    """1.5 seconds, and of the processes that read this file only the verifiers judge answers."""
    import math_verify

    return math_verify
