"""The run's folder: one run at a time writes there, and two files in it speak of the run as a whole."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

DONE, STOP = "done", "stop"  # it is done; save and end, please


def hold(folder: Path) -> TextIO:
    """Lock the run's folder against a second run; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"run.dir = {str(folder)!r}: another run is writing there; wait for its end or choose another folder") from None
    return file
