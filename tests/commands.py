"""`python -m megatron_r1 ...` as a user starts it, in a process forked from one that has imported the program: each start would take 7
seconds of a core otherwise. The command lines themselves are run by test_pipeline_runs.py and tests/slurm."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from ranks import importer

from megatron_r1.__main__ import main
from megatron_r1.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
STREAMS = (1, 2)  # standard output and standard error


class Command:
    """A command that runs; what it prints is kept."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()  # it goes with this object
        self._log = Path(self._folder.name, "output")
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        argv = [str(argument) for argument in arguments]
        self._process = importer().Process(target=_run, args=(argv, inherited | environment, self._log))
        self._process.start()
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> tuple[int, str]:
        """The exit code, and all it has printed."""
        self._process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout:g} seconds:\n{self.output}")
        return self.poll(), self.output


def run(*arguments: object, timeout: float) -> tuple[int, str]:
    """Run a command to its end: its exit code, and all it has printed."""
    return Command(*arguments).wait(timeout)


def _run(argv: list[str], environment: dict[str, str], log: Path) -> None:
    die_with_parent()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        for stream in STREAMS:
            os.dup2(file.fileno(), stream)
    sys.exit(main(argv))
