"""1.0 for a completion of the asked form (R1's format reward, arXiv 2501.12948v2, 2.2 and equations 4 to 10).

R1-Zero's template asks for `<think>reasoning</think><answer>answer</answer>`. R1's chat has no such tags around its answer, and what
its later stages reward is the reasoning "inside `<think>` and `</think>`".
"""

from __future__ import annotations

import re

from megatron_r1.problem import Problem

THINK, ANSWER = ("<think>", "</think>"), ("<answer>", "</answer>")
TAGGED = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
FREE = re.compile(r"\s*<think>.*</think>\s*\S.*", re.DOTALL)


def reward(completion: str, problem: Problem, *, answer_tags: bool = True) -> float:
    """1.0 if each tag stands exactly once, in order, with only white space outside; else 0.0.

    answer_tags: the answer stands in `<answer>` and `</answer>`; false: it is any text after the reasoning.
    """
    tags, form = (THINK + ANSWER, TAGGED) if answer_tags else (THINK, FREE)
    return float(all(completion.count(tag) == 1 for tag in tags) and form.fullmatch(completion) is not None)
