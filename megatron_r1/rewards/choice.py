"""1.0 if the option a completion chooses is the problem's letter (R1's STEM and logic prompts: 4 to 8 options; Nature 645, 633).

The choice is, first found first taken:

    the final answer of completion.py: the last box, or the last <answer>       \\boxed{C}  <answer>(C) 42 J</answer>
    the last "answer is" or "Answer:" of the conclusion, or the like of it       **Answer: C**  C is the correct answer.
    the option in brackets, if the conclusion has only one                       Therefore (C).
    the whole conclusion                                                         C
"""

from __future__ import annotations

import re

from megatron_r1.problem import Problem
from megatron_r1.verifying.completion import conclusion, final_answer, without_marks

# a letter alone, or one that a bracket, a full stop or a colon sets off from the option's text
OPTION = re.compile(
    r"(?i:option |choice |\u9009\u9879 ?)?(?:\(([A-H])\)(?:\s.*)?|([A-H])[).:]?|([A-H])\s*[).:]\s.*|([A-H])\s+\(.*\))", re.DOTALL
)
# English and Chinese: "the answer is C", "da an shi C", "xuan C"
SAID = re.compile(
    r"(?:\b(?i:answer|(?:correct|right|best) (?:option|choice))(?i:\s+is|\s+must be)?"
    r"|\u7b54\u6848\s*[\u662f\u4e3a]?|\u9009\u9879\s*[\u662f\u4e3a]?|\u9009(?!\u9879))"
    r"\s*[:\uff1a]?\s*(?i:option\s+|\u9009\u9879\s*)?(?:\(([A-H])\)|([A-H])(?![\w']))"
    r"|\b([A-H]) (?i:is the (?:correct|right|best) (?:answer|option|choice))\b"
)
BRACKETED = re.compile(r"\(([A-H])\)")


def reward(completion: str, problem: Problem) -> float:
    """1.0 or 0.0. Raises ValueError for a reference answer that is not a letter from A to H."""
    expected = letter(problem.answer)
    if expected is None:
        raise ValueError(f"multiple choice: the reference answer {problem.answer!r:.80} is not a letter from A to H")
    return float(chosen(completion) == expected)


def chosen(completion: str) -> str | None:
    """The letter a completion chooses; None if it does not say, or is still inside its reasoning."""
    after = conclusion(completion)
    if after is None:
        return None
    answer = final_answer(completion)
    if answer is not None:
        return letter(answer) or _said(answer)
    return _said(after) or letter(after)


def letter(text: str) -> str | None:
    """The letter of a text that is an option: "C", "(c)", "C. 42 J"; None for any other."""
    bare = " ".join(without_marks(text).split())
    found = OPTION.fullmatch(bare.upper() if len(bare) <= len("(c).") else bare)
    return next(filter(None, found.groups())) if found else None


def _said(text: str) -> str | None:
    """The letter that a text ends up naming."""
    bare = " ".join(without_marks(text).split())
    said = [next(filter(None, letters)) for letters in SAID.findall(bare)]
    if said:
        return said[-1]
    options = set(BRACKETED.findall(bare))
    return options.pop() if len(options) == 1 else None
