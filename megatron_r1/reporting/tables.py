"""The report's tables as HTML: held-out accuracy by checkpoint, the cost ledger, settings that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from megatron_r1 import cost
from megatron_r1.reporting.figures import CONFIDENCE, Entry, change, phase_color, phase_name
from megatron_r1.runs import Run

PLACES = ("run.dir",)  # settings that say where, not what
PASS_1 = "eval/pass@1"


def table(head: list[str], rows: list[list[str]], *, words: int = 1, total: bool = False) -> str:
    """Rows of HTML cells; the first `words` columns are text, the others numbers; `total` sets the last row apart."""

    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}>{cell}</{tag}>" if i < words else f'<{tag} class="n">{cell}</{tag}>' for i, cell in enumerate(row))

    body = "".join(f"<tr{' class=total' if total and row is rows[-1] else ''}>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def card(title: str, note: str, inside: str) -> str:
    """A table with its title."""
    return f'<section class="card table"><h3>{escape(title)}</h3><p class="note">{escape(note)}</p>{inside}</section>'


def legend(entries: list[Entry], *, keys: bool = False) -> str:
    """Names and values; `keys` are areas' squares instead of lines."""
    items = []
    for e in entries:
        line = f'<svg viewBox="0 0 18 4" aria-hidden="true"><path class="swatch c{e.color} d{e.dash}" d="M1 2H17"/></svg>'
        mark = f'<i class="key c{e.color}"></i>' if keys else line
        items.append(f"<li>{mark}<span>{escape(e.name)}</span> <b>{escape(e.said)}</b></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def held_out(runs: list[Run]) -> str:
    """pass@1 of every run's last evaluation, and of the first run's start; empty where nothing was evaluated."""
    tested = [(run, r) for run in runs for r in [*first_start(run, runs), *last_tested(run)]]
    if not tested:
        return ""
    votes = sorted({name for _, r in tested for name in r if name.startswith("eval/cons@") and not name.endswith("_stderr")})
    rows = []
    for run, r in tested:
        error = r.get(f"{PASS_1}_stderr")
        interval = f"<small>\u00b1 {CONFIDENCE * error:.3f}</small>" if error is not None else ""
        name = f"{run.name}, at its start" if r["step"] == 0 and len(run.records) > 1 else run.name
        size = f", {r['eval/problems']:,.0f} problems" if "eval/problems" in r else ""
        row = [f"{escape(name)}<small>{escape(run.stage)}, step {r['step']:,.0f}{size}</small>", f"<b>{r[PASS_1]:.3f}</b>{interval}"]
        row += [f"{r[name]:.3f}" if name in r else "" for name in votes]
        rows.append([*row, f"{r['eval/length_mean']:,.0f}" if "eval/length_mean" in r else ""])
    head = ["checkpoint", "pass@1", *(name.removeprefix("eval/") for name in votes), "tokens"]
    note = "pass@1: mean over samples and problems, with its 95% confidence interval. Tokens: mean length of a completion."
    return card("Held-out accuracy by checkpoint", note, table(head, rows))


def first_start(run: Run, runs: list[Run]) -> list[dict[str, float]]:
    """The evaluation before the first step, of the run that all others began after."""
    first = [r for r in run.records if PASS_1 in r and r["step"] == 0][:1] if run is runs[0] else []
    return first if last_tested(run) != first else []


def last_tested(run: Run) -> list[dict[str, float]]:
    """The last record with an evaluation."""
    return [r for r in run.records if PASS_1 in r][-1:]


def ledger(runs: list[Run]) -> str:
    """GPU hours and US$ by stage, and by phase."""
    costs = [cost.of_run(run.name, run.config, run.records) for run in runs]
    hours, usd = cost.total(costs)
    rows = [
        [escape(c.name) + bar(c.phases), str(c.devices), cost.number(c.wall_seconds / 3600), cost.number(c.gpu_hours), cost.number(c.usd)]
        for c in costs
    ]
    if len(rows) > 1:
        rows.append(["total", "", cost.number(sum(c.wall_seconds for c in costs) / 3600), cost.number(hours), cost.number(usd)])
    stages = table(["stage", "GPUs", "hours", "GPU hours", "US$"], rows, total=len(rows) > 1)
    prices = ", ".join(sorted({f"US$ {c.price:.2f}" for c in costs}))
    note = (
        f"{prices} a GPU hour; a run pays all its GPUs while it lasts, and steps redone twice. On a CPU, ranks and servers count as GPUs."
    )
    return f'<div class="two">{card("Cost by stage", note, stages)}{by_phase(costs, hours)}</div>'


def by_phase(costs: list[cost.Cost], hours: float) -> str:
    """The same hours by phase, of all stages together."""
    sums: dict[str, list[float]] = {}
    for c in costs:
        for phase, value in c.phases.items():
            entry = sums.setdefault(phase, [0.0, 0.0])
            entry[0] += value / 3600
            entry[1] += value / 3600 * c.price
    rows = []
    for phase, (own, usd) in sorted(sums.items(), key=lambda item: -item[1][0]):
        name = f'<i class="key c{phase_color(phase)}"></i> {escape(phase_name(phase))}'
        rows.append([name, cost.number(own), cost.number(usd), f"{own / (hours or 1.0):.1%}"])
    note = "Between steps: start, checkpoints, and what else is in no step. Other: what of a step no phase covers."
    return card("Cost by phase", note, table(["phase", "GPU hours", "US$", "share"], rows))


def bar(phases: Mapping[str, float]) -> str:
    """The shares of the phases as a strip."""
    whole = sum(phases.values())
    shares = [(phase_color(name), value / whole, escape(phase_name(name))) for name, value in phases.items() if value]
    parts = "".join(f'<i class="c{color}" style="flex:{share:.4f}" title="{name}"></i>' for color, share, name in shares)
    return f'<div class="bar">{parts}</div>' if parts else ""


def differences(runs: list[Run]) -> str:
    """The settings in which the runs differ, a column each."""
    flat = [flattened(run.config) for run in runs]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if k not in PLACES and len({json.dumps(f.get(k)) for f in flat}) > 1]
    if not keys:
        return ""
    rows = [[escape(k), *(escape(said(f.get(k))) for f in flat)] for k in keys]
    note = "Everything else in the effective configs is the same."
    return card("Settings that differ", note, table(["setting", *(escape(run.name) for run in runs)], rows, words=1 + len(runs)))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by section.key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def said(value: Any) -> str:
    """A setting as TOML has it; "-" where a config does not have it."""
    return "-" if value is None else json.dumps(value)


def tiles(runs: list[Run]) -> str:
    """The run's figures at a glance."""
    found = []
    last = runs[-1].records
    for label, metric in (("held-out pass@1", PASS_1), ("reward", "reward/mean"), ("tokens a response", "rollout/length_mean")):
        values = [r[metric] for r in last if metric in r]
        if values:
            found.append((label, change([round(value, 3) for value in values])))
    hours, usd = cost.total([cost.of_run(run.name, run.config, run.records) for run in runs])
    found.append((f"cost of {cost.number(hours)} GPU hours", f"US$ {cost.number(usd)}"))
    return f'<div class="tiles">{"".join(f"<div class=tile><span>{escape(n)}</span><b>{escape(v)}</b></div>" for n, v in found)}</div>'
