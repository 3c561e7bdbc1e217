"""Several trainer ranks for tests: pools of real processes that stay up for the session and run functions by reference.

The pytest process itself never imports Megatron: its CUDA adaptations would leak into every other test.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_pools: dict[int, Pool] = {}


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", function(*args)))
        except BaseException:  # whatever it is belongs to the test that asked
            pipe.send(("error", traceback.format_exc()))


class Pool:
    """`world_size` rank processes."""

    def __init__(self, world_size: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        limit = time.monotonic() + timeout
        while len(answers) < len(self.pipes):
            missing = [p for r, p in enumerate(self.pipes) if r not in answers]
            for pipe in wait(missing, max(0.0, limit - time.monotonic())) or [None]:
                if pipe is None:
                    raise TimeoutError(f"{function.__name__}: ranks {[self.pipes.index(p) for p in missing]} took over {timeout} s")
                rank = self.pipes.index(pipe)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"{function.__name__}: rank {rank} died, code {self.processes[rank].exitcode}") from None
                if kind == "error":
                    raise AssertionError(f"rank {rank}:\n{value}")
                answers[rank] = value
        return [answers[r] for r in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks. A failure ends the pool: the next call gets a fresh one."""
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    try:
        return _pools[world_size].run(function, args, timeout)
    except BaseException:
        _pools.pop(world_size).close()
        raise


@atexit.register
def close_all() -> None:
    for pool in _pools.values():
        pool.close()
    _pools.clear()
