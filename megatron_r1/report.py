"""`python -m megatron_r1 report RUN [RUN2 ...]`: the paper's figures of a run, and what it cost, as one HTML page.

RUN is a run's folder or a pipeline's; the page is RUN/report.html. Several are drawn over each other, in the first one's folder.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megatron_r1 import runs
from megatron_r1.reporting.page import page
from megatron_r1.runs import Run

FILE = "report.html"


def report(arguments: list[str]) -> int:
    """Write the page; raises ValueError for a folder that is no run's."""
    if not arguments:
        raise ValueError("report: give a run's folder, or a pipeline's, as in: report runs/r1_zero")
    print(f"report: {write([Path(a) for a in arguments])}", flush=True)
    return 0


def write(folders: list[Path]) -> Path:
    """The page's file, written whole or not at all."""
    found = [runs.find(folder) for folder in folders]
    overlay = len(folders) > 1
    chosen = told_apart([run for group in found for run in group]) if overlay else found[0]
    if not any(run.records for run in chosen):
        raise ValueError(f"{folders[0]}: no metrics yet; wait for the run's first step")
    title = " and ".join(run.name for run in chosen) if overlay else folders[0].resolve().name
    target, part = folders[0] / FILE, folders[0] / f"{FILE}.part"
    part.write_text(page(title, chosen, overlay=overlay), encoding="utf-8", errors="replace")  # half a character of a cut completion
    part.replace(target)
    return target


def told_apart(found: list[Run]) -> list[Run]:
    """The runs, named by the parts of their paths in which they differ."""
    paths = [str(run.folder.resolve()) for run in found]
    if len(set(paths)) < len(paths):
        raise ValueError("report: the same folder is given twice; give each run once")
    split = [path.split(os.sep) for path in paths]
    while len({parts[0] for parts in split}) == 1 and min(map(len, split)) > 1:
        split = [parts[1:] for parts in split]
    while len({parts[-1] for parts in split}) == 1 and min(map(len, split)) > 1:
        split = [parts[:-1] for parts in split]
    return [replace(run, name="/".join(parts)) for run, parts in zip(found, split)]
