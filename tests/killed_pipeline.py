"""A program: the miniature's whole pipeline, killed by SIGKILL at random moments and started again; is its table that of one nobody killed?

    python tests/killed_pipeline.py UNBROKEN SCRATCH KILLS SEED

UNBROKEN is the folder of a finished `python -m megatron_r1 r1-tiny dir=UNBROKEN`. Every process of the run in SCRATCH dies at once,
as when a machine fails.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
from processes import has_ended, is_soon

from megatron_r1 import runs

FIGURES = ("eval/pass@1", "eval/pass@1_stderr", "eval/length_mean")


def table(folder: Path) -> dict[str, list[float]]:
    """Of each evaluated checkpoint its held-out figures."""
    last = {file.parent.name: json.loads(file.read_text().splitlines()[-1]) for file in folder.glob("evaluation/*/metrics.jsonl")}
    return {name: [record[figure] for figure in FIGURES] for name, record in last.items()}


def seconds(folder: Path) -> float:
    """From the first record of a pipeline to its last."""
    times = [record["unix_time"] for run in runs.find(folder) for record in run.records]
    return max(times) - min(times)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Everything that the process has started, and itself."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            one.kill()
    process.wait()
    assert is_soon(lambda: all(has_ended(one.pid) for one in tree), 60.0), f"{tree} still run"


def main(unbroken: Path, scratch: Path, kills: int, seed: int) -> bool:
    draw, share = random.Random(seed), seconds(unbroken) / kills
    command = [sys.executable, "-m", "megatron_r1", "r1-tiny", f"dir={scratch}"]
    for attempt in range(kills):
        started = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True)
        try:
            print(f"attempt {attempt}: ended with code {process.wait(draw.uniform(0.5, 1.5) * share)}", flush=True)
        except subprocess.TimeoutExpired:
            kill(process)
            print(f"attempt {attempt}: killed after {time.monotonic() - started:.0f} s", flush=True)
    subprocess.run(command, check=True)
    expected, found = table(unbroken), table(scratch)
    for name, figures in expected.items():
        print(f"{name}: unbroken {figures}, killed {found.get(name)}")
    return found == expected


if __name__ == "__main__":
    sys.exit(not main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
