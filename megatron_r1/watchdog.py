"""A run that hangs says where, and ends, so that whatever started it can start it again.

Both timers are C's: they go off while Python waits in a collective or a lock. Every rank has time to write its stacks before
the first one ends, which ends them all.
"""

from __future__ import annotations

import faulthandler
import signal

GRACE_SECONDS = 10.0  # between the stacks and the end


class Watchdog:
    """Fed once a step, from the first one: a start has limits of its own.

    After `minutes` without food: the stacks of all threads to standard error, then the end by SIGALRM; 0 = never.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60.0 * minutes

    def feed(self) -> None:
        """There was progress: count from now."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds)
            signal.setitimer(signal.ITIMER_REAL, self.seconds + GRACE_SECONDS)

    def close(self) -> None:
        """Count no more."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
