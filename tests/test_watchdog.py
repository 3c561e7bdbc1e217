"""A process that is not fed writes its stacks first and ends after that; one that is fed goes on."""

from __future__ import annotations

import signal
import subprocess
import sys

HANG = """
import threading, time
from megatron_r1 import watchdog
watchdog.GRACE_SECONDS = 2.0
dog = watchdog.Watchdog(3.0 / 60)
for _ in range(4):
    dog.feed()
    time.sleep(1.0)
print("fed for longer than the limit", flush=True)
def stuck_here():
    {end}
    time.sleep(20)
stuck_here()
"""


def run(end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HANG.format(end=end)], capture_output=True, text=True, timeout=60, check=False)


def test_a_process_that_hangs_shows_where_and_ends():
    done = run("pass")
    assert done.stdout == "fed for longer than the limit\n"
    assert "in stuck_here" in done.stderr
    assert done.returncode == -signal.SIGALRM


def test_a_closed_watchdog_ends_nothing():
    done = run("dog.close(); time.sleep(5); raise SystemExit(7)")
    assert (done.returncode, done.stderr) == (7, "")
