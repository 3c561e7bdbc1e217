"""Which nodes a measurement of the links calls bad, and that it measures."""

from __future__ import annotations

import math
import os

import pytest
from ranks import run_ranks

from megatron_r1 import allreduce
from megatron_r1.processes import free_port


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_partners_are_mutual_and_every_node_has_both_neighbours_of_the_ring(count):
    for side in (0, 1):
        for place in range(count):
            other = allreduce.partner(place, side, count=count)
            assert other is None or allreduce.partner(other, side, count=count) == place
            assert other is None or abs(place - other) in (1, count - 1)
    met = [{p for side in (0, 1) if (p := allreduce.partner(place, side, count=count)) is not None} for place in range(count)]
    assert sum(map(len, met)) == {1: 0, 2: 2}.get(count, 2 * count - 2 * (count % 2))
    assert all(met) or count == 1


def test_a_node_is_bad_when_it_is_slow_alone_or_with_both_neighbours():
    floors = {"node_gbps": 50.0, "pair_gbps": 5.0}
    assert allreduce.fault(300.0, {"a": 40.0, "b": 41.0}, **floors) is None
    assert allreduce.fault(300.0, {"a": 0.0, "b": 41.0}, **floors) is None, "then it is a that is bad"
    assert "12 GB/s, 50 are needed (NODE_GBPS)" in allreduce.fault(12.0, {"a": 40.0}, **floors)
    assert "1 GB/s with a and 2 GB/s with b, 5 are needed (PAIR_GBPS)" in allreduce.fault(300.0, {"a": 1.0, "b": 2.0}, **floors)
    assert allreduce.fault(math.inf, {}, **floors) is None, "a node of one GPU, alone"


def _measure_beside_a_group(port: int) -> float:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return allreduce.measure(["127.0.0.1"], "127.0.0.1", local=int(os.environ["RANK"]), tasks=2, port=port)


def test_two_ranks_measure_a_bandwidth():
    assert all(0.0 < gbps < math.inf for gbps in run_ranks(2, _measure_beside_a_group, free_port()))


def test_a_node_of_one_gpu_without_neighbours_is_well(monkeypatch, capsys):
    for name, value in {"SLURMD_NODENAME": "a", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "20000"}.items():
        monkeypatch.setenv(name, value)
    assert allreduce.allreduce(["50", "5", "a"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok a"
