"""How far a conversion is: bytes, GB/s and time left; one line that is rewritten on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import threading
import time

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 60.0


class Progress:
    """Counts bytes from any thread, and prints to stderr."""

    def __init__(self, what: str, *, total: int, done: int) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._start = self._printed = time.monotonic()
        self._interval = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes."""
        with self._lock:
            self._done += count
            if time.monotonic() - self._printed >= self._interval:
                self._print()

    def finish(self) -> None:
        """Print the last line."""
        with self._lock:
            self._print()
            if sys.stderr.isatty():
                print(file=sys.stderr)

    def _print(self) -> None:
        self._printed = time.monotonic()
        speed = (self._done - self._before) / max(self._printed - self._start, 1e-9)
        left = (self._total - self._done) / speed if speed else 0
        share = 100 * self._done / self._total if self._total else 100
        text = (
            f"{self._what}  {share:5.1f}%  {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB  {speed / 1e9:.3f} GB/s"
            f"  {time.strftime('%H:%M:%S', time.gmtime(left))} left"
        )
        print(f"\r{text}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
