"""Pools of rank processes that live as long as the test session, so that a test of many ranks need not start them.

A test calls `run_ranks(4, function, *args)`; every rank runs `function(*args)` with torchrun's environment. The function
must be importable and leave torch.distributed initialised or untouched. Megatron is imported in the ranks only: its CPU
adaptations change torch.cuda, and pytest's own process must stay as it is. Ranks are forked from one process that has imported
it and done no more, for each would need 5 seconds of CPU to do so itself.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any
from unittest import mock

from megatron_r1.processes import free_port

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # read when torch is imported
GRACE_SECONDS = 5  # for the other ranks to finish or fail too, once one has failed
_pools: dict[int, Pool] = {}


class RankFailed(AssertionError):
    """A rank raised, died or did not answer in time; the message has its traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """What `function(*args)` returned on each of `world_size` ranks, in rank order.

    Raises RankFailed, and starts new processes for the next call, when a rank raises or `timeout` seconds pass.
    """
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    pool = _pools[world_size]
    try:
        return pool.run(function, args, timeout=timeout)
    except BaseException:
        _pools.pop(world_size).kill()
        raise


class Pool:
    """`world_size` processes, each with one pipe; `bare` ones have not imported Megatron yet."""

    def __init__(self, world_size: int, *, bare: bool = False) -> None:
        context = get_context("spawn") if bare else importer()
        port = free_port()
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, {name: str(value) for name, value in environment.items()} | ONE_THREAD))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], *, timeout: float) -> list[Any]:
        """See `run_ranks`."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(self.pipes):
            pending = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results and rank not in failures}
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                self._receive(pipe, pending[pipe], results=results, failures=failures)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        if len(results) < len(self.pipes):
            raise RankFailed(f"{function.__name__}: no answer from ranks {sorted(pending.values())} in {timeout} seconds")
        return [results[rank] for rank in range(len(self.pipes))]

    def _receive(self, pipe: Connection, rank: int, *, results: dict[int, Any], failures: dict[int, str]) -> None:
        try:
            succeeded, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            self.processes[rank].join(GRACE_SECONDS)
            succeeded, value = False, f"the process ended, exit code {self.processes[rank].exitcode}"
        (results if succeeded else failures)[rank] = value

    def kill(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def importer() -> BaseContext:
    """The context whose processes are forked from one that has imported the program."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["megatron_r1.stages.grpo"])
    with mock.patch.dict(os.environ, ONE_THREAD):
        forkserver.ensure_running()
    return context


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    gc.freeze()  # what was imported is not garbage, and every layout that is shut down has the rest looked through
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:  # pytest has ended
            return
        try:
            function, args = pickle.loads(task)
            answer = pickle.dumps((True, function(*args)))
        except BaseException:  # whatever it was, the test must see it
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


@atexit.register
def _end() -> None:
    for pool in _pools.values():
        pool.kill()
