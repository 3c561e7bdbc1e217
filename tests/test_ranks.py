"""The rank pools report what each rank returned, and every way a rank can fail."""

from __future__ import annotations

import os
import time

import pytest
from ranks import RankFailed, run_ranks


def who() -> tuple[str, str, int]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.getpid()


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("broken here")


def die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)


def test_every_rank_answers_and_the_next_call_meets_the_same_processes():
    first, second = run_ranks(2, who), run_ranks(2, who)
    assert [answer[:2] for answer in first] == [("0", "2"), ("1", "2")]
    assert first == second


@pytest.mark.parametrize(("function", "message"), [(fail_on_rank_1, "ValueError: broken here"), (die_on_rank_1, "exit code 7")])
def test_a_failing_rank_is_named_and_the_pool_starts_anew(function, message):
    before = run_ranks(2, who)
    with pytest.raises(RankFailed, match=rf"rank 1: [\s\S]*{message}"):
        run_ranks(2, function)
    assert run_ranks(2, who) != before


def test_a_hanging_rank_ends_with_the_timeout():
    with pytest.raises(RankFailed, match=r"no answer from ranks \[0, 1\] in 1 seconds"):
        run_ranks(2, time.sleep, 30, timeout=1)
