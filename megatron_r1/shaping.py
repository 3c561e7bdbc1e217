"""Overlong reward shaping (DAPO, arXiv 2503.14476, equation 13): a reward below 0 that grows before the length limit cuts.

    0 up to max_tokens - overlong_tokens,  then linear,  -1 at max_tokens
"""

from __future__ import annotations

from megatron_r1.types import Sample


def overlong_penalty(length: int, *, max_tokens: int, overlong_tokens: int) -> float:
    """The reward, -1 .. 0, of a completion of `length` tokens."""
    return max(-1.0, min(0.0, (max_tokens - overlong_tokens - length) / overlong_tokens))


def penalise_overlong(samples: list[Sample], *, max_tokens: int, overlong_tokens: int) -> None:
    """Add the penalty to each sample's rewards, as "overlong", and to its sum; does nothing for overlong_tokens = 0."""
    if not overlong_tokens:
        return
    for sample in samples:
        penalty = overlong_penalty(len(sample.completion_ids), max_tokens=max_tokens, overlong_tokens=overlong_tokens)
        sample.rewards["overlong"] = penalty
        sample.reward += penalty
