"""Dynamic sampling (DAPO, arXiv 2503.14476, equation 11): train on groups that have a gradient, and sample others instead of the rest.

The paper drops a group whose answers are all correct or all wrong. Here it is one whose rewards are all equal, which is the
same where accuracy is the reward, and is what makes every advantage 0 whatever it is.
"""

from __future__ import annotations

from megatron_r1 import summary
from megatron_r1.types import Sample


def has_signal(group: list[Sample]) -> bool:
    """Whether the verified rewards of a group differ."""
    return len(set(summary.verified(group))) > 1


def missing(groups: list[list[Sample]], count: int) -> int:
    """How many groups with a signal there are too few of `count`."""
    return count - sum(has_signal(group) for group in groups)


def choose(groups: list[list[Sample]], count: int) -> list[Sample]:
    """The samples of `count` groups in their order: those with a signal, and as many of the others as are needed to fill up."""
    ranked = sorted(range(len(groups)), key=lambda i: not has_signal(groups[i]))
    return [sample for i in sorted(ranked[:count]) for sample in groups[i]]
