"""A report as one HTML page that needs nothing else: no network, no script. All text of runs is escaped."""

from __future__ import annotations

import re
import time
from html import escape
from pathlib import Path
from typing import Any

from megatron_r1.reporting import tables
from megatron_r1.reporting.figures import Figure, figures
from megatron_r1.runs import Run, read_records

SHOWN = 9  # sample completions of a run
CSS = Path(__file__).with_name("page.css")


def page(title: str, runs: list[Run], *, overlay: bool) -> str:
    """The page of one run, of several over each other (`overlay`), or of a pipeline's one after another."""
    parts = [header(title, runs), tables.tiles(runs) if not overlay else overlay_legend(runs)]
    groups = [(", ".join(run.name for run in runs), runs)] if overlay or len(runs) == 1 else [(run.name, [run]) for run in runs]
    if len(groups) > 1:
        parts.append("<nav>" + "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name, _ in groups) + "</nav>")
    if overlay:
        parts.append(tables.differences(runs))
    parts.append(f'<div class="results">{tables.held_out(runs)}</div>')
    for name, group in groups:
        heading = name if len(groups) > 1 else "Curves"
        cards = "".join(map(figure, figures(group)))
        parts.append(f'<h2 id="{anchor(name)}">{escape(heading)}</h2>' + (f'<div class="grid">{cards}</div>' if cards else ""))
        if len(groups) > 1:
            parts += [completions(group[0]), config(group[0])]
    parts.append(f'<h2 id="cost">Cost</h2>{tables.ledger(runs)}')
    if len(groups) == 1:
        parts += ["<h2>Sample completions and config</h2>", *(part for run in runs for part in (completions(run), config(run)))]
    body = "".join(parts)
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    foot = f"Written {written} from metrics.jsonl. Thin lines are each rollout or step, bold ones their moving mean."
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS.read_text()}</style></head>"
        f"<body><main>{body}<footer>{foot}</footer></main></body></html>\n"
    )


def header(title: str, runs: list[Run]) -> str:
    """What was trained, how far, when."""
    said = []
    for run in runs:
        step = max((r["step"] for r in run.records), default=0)
        seed = run.config.get("run", {}).get("seed")
        said.append(f"{run.stage}, step {step:,.0f} of {run.config.get('steps', 0):,}" + (f", seed {seed}" if seed is not None else ""))
    what = said[0] if len(runs) == 1 else f"{len(runs)} runs"
    times = [r["unix_time"] for run in runs for r in run.records]
    span = f" \u00b7 {day(min(times))} to {day(max(times))}" if times else ""
    return f'<h1>{escape(title)}</h1><p class="sub">{escape(what)}{span}</p>'


def day(unix_time: float) -> str:
    """A time as the page says it."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix_time))


def overlay_legend(runs: list[Run]) -> str:
    """Which colour is which run, with its seed."""
    entries = [tables.Entry(i, 0, run.name, f"seed {run.config.get('run', {}).get('seed', '-')}") for i, run in enumerate(runs)]
    return f'<div style="margin:14px 0 18px">{tables.legend(entries)}</div>'


def figure(f: Figure) -> str:
    """A chart with its title, note and legend."""
    legend = tables.legend(f.legend, keys='class="area' in f.svg)
    return f'<figure class="card"><h3>{escape(f.title)}</h3><p class="note">{escape(f.note)}</p>{f.svg}{legend}</figure>'


def completions(run: Run) -> str:
    """Some of completions.jsonl, from the first steps to the last."""
    rows = read_records(run.folder / "completions.jsonl")
    steps = sorted({row["step"] for row in rows})
    chosen = {steps[i * (len(steps) - 1) // 2] for i in range(3)} if steps else set()
    shown = [row for step in sorted(chosen) for row in [r for r in rows if r["step"] == step][: SHOWN // len(chosen)]]
    return "".join(map(completion, shown))


def completion(row: dict[str, Any]) -> str:
    """One sample: its prompt to open, then the text, its rewards and what a verifier could not answer."""
    prompt = " ".join(row["prompt"].split())
    meta = f"step {row['step']:,} \u00b7 {row['tokens']:,} tokens \u00b7 " + ("cut" if row["finish_reason"] == "length" else "complete")
    scores = [f"{name} {value:g}" for name, value in row["rewards"].items()]
    scores += [f"{name} failed: {why}" for name, why in row["failures"].items()] + [f"answer {row['answer']}"]
    chips = "".join(f'<span class="chip">{escape(text)}</span>' for text in scores)
    head = escape(prompt if len(prompt) <= 90 else f"{prompt[:88]}...")
    whole = f'<p class="note">{escape(row["prompt"])}</p>' if len(prompt) > 90 else ""
    return (
        f'<details><summary>{head} <span class="meta">{escape(meta)}</span></summary><div class="body">{whole}'
        f'<pre>{escape(row["completion"])}</pre><div class="chips">{chips}</div></div></details>'
    )


def config(run: Run) -> str:
    """The effective config, to open."""
    title = f"Effective config: {run.name}/{run.stage}.toml"
    text = (run.folder / f"{run.stage}.toml").read_text()
    return f'<details><summary>{escape(title)}</summary><div class="body"><pre>{escape(text)}</pre></div></details>'


def anchor(name: str) -> str:
    """A name as a fragment of the page's address."""
    return "run-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
