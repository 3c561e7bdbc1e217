"""A run that hangs says where, and ends, so that whatever started it can start it again.

The timer is faulthandler's own thread in C: it fires while Python waits in a collective or a lock.
"""

from __future__ import annotations

import faulthandler


class Watchdog:
    """Fed once a step. After `minutes` without food: the stacks of all threads to standard error, and exit code 1; 0 = never."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60.0 * minutes

    def feed(self) -> None:
        """There was progress: count from now."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
