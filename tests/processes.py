"""Looking for processes that a test has started. Others of the machine come and go meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


def running(mark: str) -> list[int]:
    """Other processes of this machine whose command line has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return [pid for pid in found if pid != os.getpid()]


def argv(process: int) -> list[str]:
    """Its command line; nothing of one that is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return []


def is_soon(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def stat(process: int) -> list[str]:
    """What the kernel says of it after its name: state, parent, group, ... (proc(5)); nothing of one that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def has_ended(process: int) -> bool:
    """Gone, or a zombie, as which it stays where a container's first process reaps none."""
    return (stat(process) or ["X"])[0] in "ZX"


def in_group(leader: int) -> list[int]:
    """The processes of a process group."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if stat(pid)[2:3] == [str(leader)]]


def threads(process: int) -> list[str]:
    """The names of its threads; one that ends meanwhile is left out."""
    names = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(OSError):
                names.append((task / "comm").read_text().strip())
    return names
