"""How the tests are shared out, and what they share: one real vLLM server for a session, ranks with the stand-in for Transformer Engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import pytest
from fake_te import on_stand_in
from ranks import Pool
from servers import save, tiny_model
from transformers import DeepseekV3ForCausalLM

from megatron_r1.processes import free_port
from megatron_r1.rollout.server_process import ServerProcess, server_command
from megatron_r1.rollout.vllm_server import VLLMServers

START_SECONDS = 300.0  # 17 on an idle machine


@dataclass
class RealServer:
    process: ServerProcess
    engine: VLLMServers
    old: DeepseekV3ForCausalLM  # two policies of the served shape
    new: DeepseekV3ForCausalLM


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[RealServer]:
    """A dummy-loaded tiny V3 behind `vllm serve`, and a client of it; the tests that use it send it the weights they need."""
    folder = tmp_path_factory.mktemp("server")
    old, new = tiny_model(1), tiny_model(2)
    save(old, folder / "model")
    port = free_port()
    settings = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "kv_cache_bytes": 48 << 20}
    argv, env = server_command(str(folder / "model"), port=port, **settings, extra=["--enable-server-load-tracking"])  # for /load
    process = ServerProcess(argv, env, port=port, log_file=folder / "server.log")
    process.start()
    engine = VLLMServers([process.url], max_num_seqs=32, request_limit_seconds=120.0, start_limit_seconds=START_SECONDS)
    try:
        process.wait_ready(START_SECONDS)
        yield RealServer(process, engine, old, new)
    finally:
        engine.close()
        process.stop()


@pytest.fixture(scope="module")
def in_engine() -> Iterator[Callable[..., Any]]:
    """`in_engine(function, ...)`: what the function returns in a process that may import vLLM."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield lambda function, *args, **options: process.submit(function, *args, **options).result(120)


@pytest.fixture(scope="module")
def on_engine() -> Iterator[Callable[..., list[Any]]]:
    """`on_engine(n, function, *args)`: on n ranks of their own, for which Transformer Engine is the stand-in."""
    pools: dict[int, Pool] = {}

    def run(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if ranks not in pools:
            pools[ranks] = Pool(ranks, bare=True)
        return pools[ranks].run(on_stand_in, (function, *args), timeout=240)

    yield run
    for pool in pools.values():
        pool.kill()


def group(nodeid: str) -> str:
    """What one worker runs: a file, whose tests share servers and ranks, or all that needs the one Slurm."""
    file = nodeid.partition("::")[0]
    return "slurm" if "/slurm/" in file else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow groups begin first, the longest before all."""
    slow = {group(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (group(item.nodeid) != "slurm", group(item.nodeid) not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out groups. xdist's own, by marks in node ids, has no effect with this pytest."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Megatron's CPU adaptation changes torch, and would change what transformers computes here: tests import it on ranks alone."""
    if "megatron.core" in sys.modules:
        raise pytest.UsageError("a test file imports megatron, itself or through megatron_r1.mcore or .stages; see tests/ranks.py")


@pytest.fixture(autouse=True)
def megatron_stays_on_the_ranks() -> Iterator[None]:
    """Nor while they run; the first that does is at fault."""
    was_here = "megatron.core" in sys.modules
    yield
    assert was_here or "megatron.core" not in sys.modules, "this test imports megatron, itself or through megatron_r1.mcore or .stages"
