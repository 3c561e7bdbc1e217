"""Threads of gloo groups."""

from __future__ import annotations

import os

from processes import threads
from ranks import run_ranks

from megatron_r1.parallel import Parallel


def loops_of_a_layout() -> tuple[int, int]:
    from megatron_r1.mcore import distributed

    distributed.init(Parallel(tensor_model_parallel_size=2), seed=1)
    try:
        return threads(os.getpid()).count("gloo_tcp_loop"), distributed.rank()
    finally:
        distributed.shutdown()


def test_all_groups_of_a_layout_share_one_thread():
    assert run_ranks(2, loops_of_a_layout) == [(1, 0), (1, 1)]

