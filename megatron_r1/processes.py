"""What starting processes on one machine needs: a port for them, and their end when their parent has ended. Imports no torch."""

from __future__ import annotations

import ctypes
import random
import signal
import socket

# Below those that the kernel gives to outgoing connections: such a one could take the port between this look and its use.
PORTS = range(30000, 32768)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """A TCP port that nothing listens on now, at no address of this machine."""
    draw = random.SystemRandom()  # other processes of this machine draw too, and a seeded run must not draw as they do
    while True:
        port = draw.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of ended connections is no hindrance
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue


def die_with_parent(how: int = signal.SIGTERM) -> None:
    """In a child before exec: the kernel ends it when the thread that started it ends, so that nothing outlives a run."""
    LIBC.prctl(PR_SET_PDEATHSIG, how)
