"""A program: convert a folder, killed by SIGKILL at a random write, again and again until it is whole; do the results differ?

    python tests/killed_conversions.py SOURCE SCRATCH COUNT SEED

The process imports everything once and forks for each attempt, so that a kill costs milliseconds. Prints how many of COUNT
results were the same, file by file, as that of a conversion that nobody killed, and how many kills it took.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from megatron_r1.weights import conversion, ledger, plans, streams


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def attempt(source: Path, target: Path, *, kill_at: int | None) -> bool:
    """In a process of its own: convert or go on with it; whether it was whole before the kill."""
    child = os.fork()
    if child == 0:
        numbers = itertools.count()
        for owner, name in ((streams.Files, "write"), (streams.Files, "settle"), (ledger.Ledger, "_append"), (ledger.Ledger, "finish")):
            setattr(owner, name, mortal(getattr(owner, name), numbers, kill_at))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        conversion.run(plans.hf_to_megatron(source), target, workers=2, resume=True, overwrite=False)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"{status=}"
    return status == 0


def mortal(function, numbers, kill_at: int | None):
    """The function, but a kill instead of its call number `kill_at`, or after half of what it would write."""

    def run(*arguments):
        if next(numbers) == kill_at:
            if function.__name__ == "write":
                function(*arguments[:-1], arguments[-1][: len(arguments[-1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return run


def main(source: Path, scratch: Path, count: int, seed: int) -> None:
    conversion.SETTLE_BYTES = 2**18
    conversion.RUN_BYTES = 2**14
    draw, kills, same = random.Random(seed), 0, 0
    assert attempt(source, scratch / "unbroken", kill_at=None)
    expected = files_of(scratch / "unbroken")
    for i in range(count):
        target = scratch / f"killed{i}"
        while not attempt(source, target, kill_at=draw.randrange(1200)):
            assert not target.exists(), "half of a conversion under its own name"
            kills += 1
        same += files_of(target) == expected
        shutil.rmtree(target)
    print(f"{same} of {count} the same after {kills} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
