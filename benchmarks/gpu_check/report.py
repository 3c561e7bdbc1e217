"""What the check found: rows of a short table, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

MARK = "row "  # begins a line of a section's output that holds a row


@dataclass(frozen=True)
class Row:
    """One figure. `target` is a bound: the figure must not be below it, or with `at_most` not above it."""

    section: str
    name: str
    value: float | None  # None: not measured, and `note` says why
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """ok, MISSED, skipped, or nothing where there is no target."""
        if self.value is None:
            return "skipped"
        if self.target is None:
            return ""
        met = self.value <= self.target if self.at_most else self.value >= self.target
        return "ok" if met else "MISSED"  # NaN meets nothing


def emit(row: Row) -> None:
    """Hand a row to the process that collects them."""
    print(MARK + json.dumps(asdict(row)), flush=True)


def collect(output: str) -> list[Row]:
    """The rows among the lines of a section's output."""
    return [Row(**json.loads(line.removeprefix(MARK))) for line in output.splitlines() if line.startswith(MARK)]


def table(rows: Iterable[Row], about: dict[str, str]) -> str:
    """Text for a terminal and for docs/gpu.md: what it ran on, then a row a line."""
    heading = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = [heading, "", "| check | figure | target | |", "| --- | --- | --- | --- |"]
    for row in rows:
        bound = "" if row.target is None else f"{'<=' if row.at_most else '>='} {number(row.target)}"
        figure = "-" if row.value is None else f"{number(row.value)} {row.unit}".strip()
        remark = "; ".join(text for text in (row.verdict, row.note) if text)
        lines.append(f"| {row.section}: {row.name} | {figure} | {bound} | {remark} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits that count."""
    if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def as_json(rows: Iterable[Row], about: dict[str, str]) -> dict[str, Any]:
    """Everything, for a file."""
    return {"about": about, "rows": [asdict(row) | {"verdict": row.verdict} for row in rows]}
