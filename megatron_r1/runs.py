"""The folders that runs write, read again: the effective config, the records, sample completions.

A run's folder has <stage>.toml and metrics.jsonl; the folder of a pipeline has such folders in it. All that is needed is there: no
process is asked.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NESTED = ("*/*.toml", "*/*/*.toml")  # where a pipeline's folder has its runs
SAMPLES_BYTES = 8 << 20  # of a run's completions.jsonl


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it."""

    name: str  # the folder's, from the pipeline's folder on
    folder: Path
    stage: str
    config: dict[str, Any]  # the effective one, of the last start
    records: list[dict[str, float]]


def read(folder: Path, *, name: str = "") -> Run:
    """The run in a folder; raises ValueError where there is none."""
    stage, config = effective_config(folder)
    return Run(name or folder.name, folder, stage, config, read_records(folder / "metrics.jsonl"))


def find(folder: Path) -> list[Run]:
    """The run in a folder, or those of a pipeline's in the order they began; raises ValueError where there is neither."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give run.dir of a run, or the folder of a pipeline")
    if not (folder / "metrics.jsonl").is_file():
        inside = sorted({file.parent for pattern in NESTED for file in folder.glob(pattern) if (file.parent / "metrics.jsonl").is_file()})
        found = [read(run, name=str(run.relative_to(folder))) for run in inside]
        if found:
            return sorted(found, key=lambda run: run.records[0]["unix_time"] if run.records else float("inf"))
    return [read(folder)]


def effective_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The stage's name and the config of its last start."""
    files = list(folder.glob("*.toml"))
    if not files:
        raise ValueError(f"{folder}: no effective config (<stage>.toml) there; it is not the folder of a run")
    newest = max(files, key=lambda f: f.stat().st_mtime)
    return newest.stem, tomllib.loads(newest.read_text())


def check_seed(folder: Path, seed: int) -> None:
    """Raise ValueError where a run in this folder, done or half done, has another seed: to go on from it would mix the two."""
    has = effective_config(folder)[1].get("run", {}).get("seed", seed) if any(folder.glob("*.toml")) else seed
    if has != seed:
        raise ValueError(f"seed = {seed}: {folder} is a run of seed {has}; set that, or another dir")


def read_records(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL; a run may be writing the last one, or may have died at it."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def end_line(file: Path) -> None:
    """End a line that a killed run has left half written, so that the next one begins a line of its own."""
    if file.is_file() and file.stat().st_size:
        with file.open("rb+") as f:
            f.seek(-1, 2)
            if f.read(1) != b"\n":
                f.write(b"\n")


def append_bounded(file: Path, rows: list[dict[str, Any]], *, limit_bytes: int = SAMPLES_BYTES) -> None:
    """Add rows that have a "step"; a file that outgrows the limit loses every second step, never its first or its last."""
    end_line(file)
    with file.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    if file.stat().st_size <= limit_bytes:
        return
    kept = read_records(file)
    steps = sorted({row["step"] for row in kept})
    stay = {*steps[::2], steps[-1]}
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in kept if row["step"] in stay))
    part.replace(file)
