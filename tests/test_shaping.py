"""The overlong penalty, value by value as the paper's equation 13 has them."""

from __future__ import annotations

import math

import pytest
from test_selection import group

from megatron_r1 import shaping


def equation_13(length: int, maximum: int, cache: int) -> float:
    if length <= maximum - cache:
        return 0.0
    return ((maximum - cache) - length) / cache if length <= maximum else -1.0


@pytest.mark.parametrize(("maximum", "cache"), [(20_480, 4096), (48, 16), (8, 8), (5, 1)])
def test_the_penalty_is_equation_13_at_every_length(maximum: int, cache: int):
    found = [shaping.overlong_penalty(n, max_tokens=maximum, overlong_tokens=cache) for n in range(1, maximum + 3)]
    assert found == [equation_13(n, maximum, cache) for n in range(1, maximum + 3)]
    assert (found[maximum - 1], found[-1]) == (-1.0, -1.0)
    assert cache == maximum or found[maximum - cache - 1] == 0.0


def test_the_penalty_joins_the_rewards_and_a_failed_verification_stays_one():
    samples = group(0, 1.0, math.nan, tokens=7) + group(1, 0.0, tokens=4)
    shaping.penalise_overlong(samples, max_tokens=8, overlong_tokens=4)
    assert [s.rewards for s in samples] == [{"overlong": -0.75}, {"overlong": -0.75}, {"overlong": 0.0}]
    assert (samples[0].reward, samples[2].reward) == (0.25, 0.0)
    assert math.isnan(samples[1].reward)


def test_off_it_leaves_the_samples_as_they_are():
    samples = group(0, 1.0, 0.5)
    shaping.penalise_overlong(samples, max_tokens=2, overlong_tokens=0)
    assert samples == group(0, 1.0, 0.5)
