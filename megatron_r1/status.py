"""`python -m megatron_r1 status RUN`: where a run or a pipeline stands and what it cost, from its folder alone; and its Slurm jobs where
there is a Slurm."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from megatron_r1 import cost, runs
from megatron_r1.runs import Run

RECENT = 20  # rollouts, or SFT steps, whose pace is the run's pace


def status(arguments: list[str]) -> int:
    """Print the table; raises ValueError for a folder that is no run's."""
    if len(arguments) != 1:
        raise ValueError("status: give one run's folder, or a pipeline's, as in: status runs/r1_zero")
    folder, found = Path(arguments[0]), runs.find(Path(arguments[0]))
    table = Table("", "", title=str(folder), show_header=False)
    for name, text in rows(found[0]) if len(found) == 1 else [(run.name, where(run)) for run in found]:
        table.add_row(name, text)
    Console().print(table, costs(found))
    return 0


def rows(run: Run) -> list[tuple[str, str]]:
    """(what, its value) of a run, in reading order."""
    latest = run.folder / "checkpoints" / "latest"
    ranks = run.config.get("parallel", {}).get("world_size", 0)
    found = [("stage", f"{run.stage}, {ranks} trainer ranks"), ("state", state(run.folder))]
    found += [*jobs(run.folder.resolve().name), ("checkpoint", latest.read_text().strip() if latest.is_file() else "none yet")]
    if used := past_jobs(run.folder / "logs"):
        found.append(("jobs so far", f"{len(used)}, {sum(used):,.2f} GPU-hours"))
    if run.records:
        found += progress(run.records, steps=run.config.get("steps", 0))
    if error := last_error(run.folder / "logs"):
        found.append(("last error", error))
    return found


def where(run: Run) -> str:
    """One of a pipeline's runs in a line."""
    step = int(max((r["step"] for r in run.records), default=0))
    return f"{run.stage}, {state(run.folder)}, step {of(step, run.config.get('steps', 0))}"


def of(step: int, steps: int) -> str:
    """A step of so many; 0 = how many is not said, as by stages that go through their data once."""
    return f"{step} of {steps}" if steps else str(step)


def costs(found: list[Run]) -> Table:
    """GPU hours and US$ of every run, as the paper's table has them of its stages."""
    ledger = [cost.of_run(run.name, run.config, run.records) for run in found]
    table = Table("stage", title="cost")
    for column in ("GPUs", "GPU hours", "US$"):
        table.add_column(column, justify="right")
    for c in ledger:
        table.add_row(c.name, str(c.devices), cost.number(c.gpu_hours), cost.number(c.usd))
    if len(ledger) > 1:
        hours, usd = cost.total(ledger)
        table.add_row("total", "", cost.number(hours), cost.number(usd), style="bold")
    return table


def state(folder: Path) -> str:
    """What the files in the folder say of the run."""
    if (folder / "done").exists():
        return "done"
    return "asked to stop" if (folder / "stop").exists() else "not done"


def jobs(name: str) -> list[tuple[str, str]]:
    """The Slurm jobs of this name; none where there is no Slurm."""
    if shutil.which("squeue") is None:
        return []
    asked = subprocess.run(["squeue", "-h", "-n", name, "-o", "%i %T %M %R"], capture_output=True, text=True, check=False)
    return [("job", line) for line in asked.stdout.splitlines()]


def past_jobs(logs: Path) -> list[float]:
    """GPU-hours of each Slurm job of the run, from its start to the last line that it wrote: its nodes with all their GPUs."""
    hours = []
    for recorded in logs.glob("*/env.txt"):
        if recorded.parent.is_symlink():  # `latest`
            continue
        variables = dict(line.split("=", 1) for line in recorded.read_text(errors="replace").splitlines() if "=" in line)
        gpus = int(variables.get("SLURM_JOB_NUM_NODES", 0)) * int(variables.get("SLURM_GPUS_ON_NODE", 0))
        end = max(f.stat().st_mtime for f in recorded.parent.iterdir())
        hours.append(gpus * (end - recorded.stat().st_mtime) / 3600)
    return hours


def progress(records: list[dict[str, float]], *, steps: int) -> list[tuple[str, str]]:
    """Step, reward, pace and time to go."""
    step = int(max(r["step"] for r in records))
    timed = [r for r in records if "time/step" in r]
    found = [("step", f"{of(step, steps)}, {age(time.time() - records[-1]['unix_time'])} ago")]
    for name, label in (("reward/mean", "reward"), ("eval/pass@1", "pass@1"), ("perf/tokens_per_second", "tokens/s")):
        values = [(int(r["step"]), r[name]) for r in records if name in r]
        if values:
            found.append((label, f"{values[-1][1]:,.3g} at step {values[-1][0]}"))
    if len(timed) > 1 and step < steps:
        recent = timed[-RECENT:]
        a_step = median(r["time/step"] for r in recent) / max(1, (recent[-1]["step"] - recent[0]["step"]) / (len(recent) - 1))
        found.append(("time left", age((steps - step) * a_step)))
    return found


def age(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def last_error(logs: Path) -> str | None:
    """The last line that begins with `error: ` in the newest log that has one."""
    for log in sorted(logs.rglob("*.log"), key=lambda f: f.stat().st_mtime, reverse=True):
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        if errors:
            return f"{errors[-1].removeprefix('error: ')} ({log})"
    return None
