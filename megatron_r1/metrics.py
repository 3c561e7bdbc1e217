"""One dict a step goes to TensorBoard, to metrics.jsonl and, shortened, to the console.

Prefixes say where a figure comes from: reward/ policy/ rollout/ sync/ moe/ eval/ reject/ data/ time/ perf/ cost/.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_r1 import cost, runs

Record = dict[str, float]

# metric -> how the console line spells it, in this order; what a record lacks is left out
CONSOLE: tuple[tuple[str, str], ...] = (
    ("policy/loss", "loss {:.4f}"),
    ("reward/mean", "reward {:.3f}"),
    ("reward/solved", "solved {:.2f}"),
    ("reward/verifier_failures", "failed {:.0f}"),
    ("eval/pass@1", "pass@1 {:.3f}"),
    ("reject/samples", "sampled {:.0f}"),
    ("reject/kept", "kept {:.0f}"),
    ("data/left_out", "left out {:.0f}"),
    ("rollout/length_mean", "len {:.0f}"),
    ("rollout/truncated", "cut {:.2f}"),
    ("policy/entropy", "H {:.3f}"),
    ("policy/kl", "KL {:.4f}"),
    ("policy/grad_norm", "|g| {:.3f}"),
    ("sync/logprob_gap_max", "gap {:.0e}"),
    ("perf/tokens_per_second", "{:,.0f} tok/s"),
    ("time/step", "{:.1f} s"),
)


def console_line(step: int, steps: int, record: Record) -> str:
    """`step 12/200  reward 0.913  ...` with what the record has."""
    parts = [text.format(record[name]) for name, text in CONSOLE if name in record]
    return "  ".join([f"step {step:>{len(str(steps))}}/{steps}", *parts])


class Metrics:
    """The run's record. Only the rank that writes gives a folder; on the others every call is a no-op.

    meter    what the run's devices cost; None leaves cost/ out
    started  time.perf_counter() at the start of what `time/between_steps` is to count; None is now
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        steps: int,
        tensorboard: bool = True,
        meter: cost.Meter | None = None,
        started: float | None = None,
    ) -> None:
        self.steps, self.meter = steps, meter
        self._timed_until = time.perf_counter() if started is None else started
        self._file = self._samples = self._writer = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.jsonl"
        runs.end_line(file)
        if meter is not None:
            meter.resume(runs.read_records(file))
        self._file = file.open("a", buffering=1)
        self._samples = folder / "completions.jsonl"
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank writes

            self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def log(self, step: int, record: Record, *, console: bool = True) -> None:
        """Write the record of an optimizer step everywhere; `console=False` keeps it off the console."""
        if self._file is None:
            return
        record = self._with_cost(record)
        self._file.write(json.dumps({"step": step, "unix_time": round(time.time(), 3), **record}) + "\n")
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(name, value, step)
        if console:
            print(console_line(step, self.steps, record), flush=True)

    def _with_cost(self, record: Record) -> Record:
        """A record that has times, with the seconds since the last such record that it does not have, and what all cost."""
        if self.meter is None or not any(name.startswith("time/") for name in record):
            return record
        now = time.perf_counter()
        between = max(0.0, now - self._timed_until - cost.seconds(record))
        self._timed_until = now
        record = {**record, "time/between_steps": between}
        return {**record, **self.meter.add(record)}

    def text(self, step: int, name: str, markdown: str, *, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """A page in TensorBoard's text tab; `rows` are the same as data, for completions.jsonl."""
        if self._writer is not None:
            self._writer.add_text(name, markdown, step)
        if self._samples is not None and rows:
            runs.append_bounded(self._samples, [{"step": step, **row} for row in rows])

    def close(self) -> None:
        for sink in (self._file, self._writer):
            if sink is not None:
                sink.close()


@dataclass
class Stopwatch:
    """Seconds of each named phase of a step, as time/<phase>."""

    seconds: Record = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        key = f"time/{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    def record(self) -> Record:
        """The phases so far and the whole step."""
        return {**self.seconds, "time/step": time.perf_counter() - self.started}


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile of a non-empty list, share in 0 .. 1."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


@contextmanager
def progress(title: str, total: int, *, shown: bool = True) -> Iterator[Any]:
    """A progress bar on standard error, only on a terminal; yields advance(n)."""
    if not (shown and sys.stderr.isatty()):
        yield lambda n=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n=1: bar.advance(task, n)
