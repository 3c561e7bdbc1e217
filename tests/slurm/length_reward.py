"""A reward that an untrained model's completions differ in, so that there is something to learn and losses are not all zero."""

from __future__ import annotations

from megatron_r1.problem import Problem


def reward(completion: str, problem: Problem) -> float:
    return len(completion) % 5 / 4
