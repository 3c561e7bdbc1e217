"""gloo with one thread a process that waits for messages.

Each group would make a device of its own, whose thread wakes a hundred times a second. A trainer rank has 21 groups and a vLLM
engine 15, and an engine with nothing to do spent 3% of a core on that.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d


class OneDeviceGloo(ProcessGroupGloo):
    """A group on the device that this process's others use."""

    def __init__(self, store: Store, rank: int, size: int, *, timeout: timedelta) -> None:
        super().__init__(store, rank, size, options(timeout))


def share_device() -> None:
    """From now on torch makes this process's gloo groups on one device."""
    distributed_c10d.ProcessGroupGloo = OneDeviceGloo


def options(timeout: timedelta, host: str | None = None) -> ProcessGroupGloo._Options:
    """Options of a group at the address `host` of this machine, by default at the one that its name means (GLOO_SOCKET_IFNAME)."""
    made = ProcessGroupGloo._Options()
    made._timeout = timeout
    made._devices = [_device(host, os.getpid())]
    return made


@cache
def _device(host: str | None, process: int) -> ProcessGroupGloo.Device:
    """`process` makes it new after a fork, in which threads do not live on."""
    return ProcessGroupGloo.create_default_device() if host is None else ProcessGroupGloo.create_device(hostname=host)
