"""1.0 for `<think>reasoning</think><answer>answer</answer>` and nothing else (R1's format reward, arXiv 2501.12948v2, 2.2)."""

from __future__ import annotations

import re

from megatron_r1.problem import Problem

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LAYOUT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def reward(completion: str, problem: Problem, *, think_in_prompt: bool = False) -> float:
    """1.0 if each tag stands exactly once, in order, with only white space outside; else 0.0.

    think_in_prompt: the chat template's generation prompt already ends with `<think>`.
    """
    text = "<think>" + completion if think_in_prompt else completion
    return float(all(text.count(tag) == 1 for tag in TAGS) and LAYOUT.fullmatch(text) is not None)
