"""The columns of the benchmarks the paper evaluates on, as rows with a "prompt" and an "answer"; other columns stay as they are.

    aime      problem or question, answer, in any spelling of the two (HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024,
              opencompass/AIME2025, MathArena/aime_2025)
    math500   problem, answer, beside subject and level (HuggingFaceH4/MATH-500)
    gpqa      Question, Correct Answer, Incorrect Answer 1 to 3 (Idavidrein/gpqa), or question, correct and incorrect answers;
              the four are shuffled and the answer is a letter

DeepSeek asks for the final answer in a box (DeepSeek-R1's README, "Usage Recommendations"); GPQA's prompt asks for the letter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Please reason step by step, and put the letter of the right option within \\boxed{}."
LETTERS = "ABCD"


def aime(row: Row, *, where: str, seed: int) -> Row:
    """AIME's answers are integers from 0 to 999; a leading zero is none to the verifier."""
    return {**row, **boxed(column(row, "problem", "question", where=where), column(row, "answer", where=where))}


def math500(row: Row, *, where: str, seed: int) -> Row:
    """MATH-500's answers are LaTeX."""
    return {**row, **boxed(column(row, "problem", where=where), column(row, "answer", where=where))}


def gpqa(row: Row, *, where: str, seed: int) -> Row:
    """Four options in an order that depends on seed and question alone, not on where the row stands."""
    question = column(row, "question", where=where)
    right = column(row, "correct answer", "correct_answer", where=where)
    wrong = [column(row, f"incorrect answer {i}", f"incorrect_answer_{i}", where=where) for i in (1, 2, 3)]
    options = [right, *wrong]
    if len(set(options)) < len(options):
        raise ValueError(f"{where}: two options are the same text, so no letter is the answer; correct the row or drop it")
    random.Random(f"options {seed} {question}").shuffle(options)
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return {**row, "prompt": f"{question}\n\n{listed}\n\n{LETTER}", "answer": LETTERS[options.index(right)]}


LAYOUTS: dict[str, Callable[..., Row]] = {"aime": aime, "math500": math500, "gpqa": gpqa}


def boxed(problem: str, answer: str) -> Row:
    """A problem whose answer is to be in a box."""
    return {"prompt": f"{problem}\n\n{BOXED}", "answer": answer}


def column(row: Row, *names: str, where: str) -> str:
    """The text in the first of these columns, whatever case its name is written in; ValueError if there is none."""
    found = {name.lower(): value for name, value in row.items()}
    value = next((found[name] for name in names if name in found), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        sought, given = " or ".join(map(repr, names)), ", ".join(map(repr, row))
        raise ValueError(f"{where}: no text in a column {sought} among {given}; set data.layout to what the rows are")
    return value.strip()
