"""`python -m megatron_r1 status RUN`: where a run stands, from its folder alone; and its Slurm jobs where there is a Slurm."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import tomllib
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

RECENT = 20  # rollouts, or SFT steps, whose pace is the run's pace
STAGES = ("grpo", "sft")


def status(arguments: list[str]) -> int:
    """Print the table; raises ValueError for a folder that is no run's."""
    if len(arguments) != 1:
        raise ValueError("status: give one run's folder, as in: status runs/r1_zero")
    folder = Path(arguments[0])
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give run.dir of a run")
    table = Table("", "", title=str(folder), show_header=False)
    for name, text in rows(folder):
        table.add_row(name, text)
    Console().print(table)
    return 0


def rows(folder: Path) -> list[tuple[str, str]]:
    """(what, its value) of a run, in reading order."""
    stage, config = effective_config(folder)
    records = read_records(folder / "metrics.jsonl")
    latest = folder / "checkpoints" / "latest"
    found = [("stage", f"{stage}, {config['parallel']['world_size']} trainer ranks"), ("state", state(folder)), *jobs(folder.name)]
    found.append(("checkpoint", latest.read_text().strip() if latest.is_file() else "none yet"))
    if records:
        found += progress(records, steps=config["steps"], ranks=config["parallel"]["world_size"])
    if error := last_error(folder / "logs"):
        found.append(("last error", error))
    return found


def effective_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The stage's name and the config of its last start."""
    files = [f for stage in STAGES for f in [folder / f"{stage}.toml"] if f.is_file()]
    if not files:
        raise ValueError(f"{folder}: no {' or '.join(f'{s}.toml' for s in STAGES)} there; it is not the folder of a run")
    newest = max(files, key=lambda f: f.stat().st_mtime)
    return newest.stem, tomllib.loads(newest.read_text())


def read_records(file: Path) -> list[dict[str, float]]:
    """All whole lines; a run may be writing the last one."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


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


def progress(records: list[dict[str, float]], *, steps: int, ranks: int) -> list[tuple[str, str]]:
    """Step, reward, pace, hours so far and hours to go. A step that was done twice (after a crash) counts twice in the hours."""
    step = int(max(r["step"] for r in records))
    timed = [r for r in records if "time/step" in r]
    found = [("step", f"{step} of {steps}, {age(time.time() - records[-1]['unix_time'])} ago")]
    for name, label in (("reward/mean", "reward"), ("eval/pass@1", "pass@1"), ("perf/tokens_per_second", "tokens/s")):
        values = [(int(r["step"]), r[name]) for r in records if name in r]
        if values:
            found.append((label, f"{values[-1][1]:,.3g} at step {values[-1][0]}"))
    if timed:
        found.append(("rank-hours", f"{ranks * sum(r['time/step'] for r in timed) / 3600:,.2f}"))
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
