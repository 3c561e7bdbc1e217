"""What starting processes on one machine needs: quick imports, a port, who they are, and their end. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

# Below those that the kernel gives to outgoing connections: such a one could take the port between this look and its use.
PORTS = range(30000, 32768)
MARKS: list[socket.socket] = []  # of the ports given away, open as long as this process lives
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Nothing that is imported is garbage: to look through it again and again takes a sixth of the time, now and in every later search."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def free_port() -> int:
    """A TCP port that nothing listens on now, at no address of this machine, and that no other call is given while this process lives.

    A server listens seconds after it is given its port, and vLLM's lets a second one listen on the same (SO_REUSEPORT).
    Raises ValueError if there is none.
    """
    draw = random.SystemRandom()  # other processes of this machine draw too, and a seeded run must not draw as they do
    for port in draw.sample(PORTS, len(PORTS)):
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0megatron_r1 port {port}")  # no file: the kernel forgets the name with the process
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of ended connections is no hindrance
                probe.bind(("", port))
        except OSError:
            mark.close()
            continue
        MARKS.append(mark)
        return port
    raise ValueError(f"ports {PORTS[0]} to {PORTS[-1]}: none is free; end some of the processes that listen there")


def die_with_parent(how: int = signal.SIGTERM) -> None:
    """In a child: the kernel ends it when the thread that started it ends, so that nothing outlives a run."""
    LIBC.prctl(PR_SET_PDEATHSIG, how)


def descendants(pid: int) -> Iterator[int]:
    """The process and all beneath it; one that ends meanwhile is skipped."""
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        yield one
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                waiting += map(int, Path(f"/proc/{one}/task/{thread}/children").read_text().split())


def end_namespace(bwrap: int) -> None:
    """Kills the first process of the namespace, with which all others end, and lets it run at once.

    By itself it would take turns with all that the program has forked, and as root that may be thousands: it took 9 s, in which they
    went on to 24,000.
    """
    with contextlib.suppress(OSError):
        for first in map(int, Path(f"/proc/{bwrap}/task/{bwrap}/children").read_text().split()):
            os.kill(first, signal.SIGKILL)
            os.sched_setscheduler(first, os.SCHED_FIFO, os.sched_param(1))  # refused without CAP_SYS_NICE
