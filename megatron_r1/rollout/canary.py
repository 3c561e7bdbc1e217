"""The canary: do servers and trainer give fixed tokens the same log-probs?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_r1.rollout.engine import EngineError


def check(
    token_ids: Sequence[int], logprobs: Sequence[float], found: Mapping[str, Sequence[float]], *, version: int | None, tolerance: float
) -> float:
    """The largest gap between the trainer's log-probs of token_ids[1:] and those `found` at each server, by its address.

    Raises EngineError for the first server with one beyond `tolerance`; a log-prob that is not a number is such a gap.
    """
    assert len(logprobs) == len(token_ids) - 1 > 0, f"{len(logprobs)=} {len(token_ids)=}"
    largest = 0.0
    for url, theirs in found.items():
        gaps = [abs(their - our) for their, our in zip(theirs, logprobs, strict=True)]
        gaps = [math.inf if math.isnan(gap) else gap for gap in gaps]
        at = max(range(len(gaps)), key=gaps.__getitem__)
        largest = max(largest, gaps[at])
        if gaps[at] > tolerance:
            raise EngineError(
                f"{url}: log-probs of weights {version} differ from the trainer's by {gaps[at]:.3g} (rollout.canary_tolerance = "
                f"{tolerance:g}), most at token {at + 1} ({token_ids[at + 1]}): {theirs[at]:.5f}, the trainer has {logprobs[at]:.5f}"
            )
    return largest
