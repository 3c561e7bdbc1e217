"""Which figures a report has, and their curves from the records of one or several runs. Pure: records in, SVG out.

One run: a colour for each curve. Several: a colour for each run, a dash for each curve. What no run has recorded is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_r1 import cost
from megatron_r1.reporting import scale, svg
from megatron_r1.runs import Run

STEPS = "optimizer steps"
COUNTS = ("mean", "solved", "all_0_groups", "all_1_groups", "equal_groups", "verifier_failures")  # reward/ figures that are no part
CONFIDENCE = 1.96  # standard errors on either side of a mean, 95%
LABEL = 14  # characters that a line's end has room for; longer names are in the legend alone
CURVES = 6  # that are labelled at their ends; more are in the legend alone
COLORS, DASHES = 8, 4  # that page.css has
PHASES = ("rollout", "train", "logprobs", "sync", "verify", "evaluation", "between_steps", "other")  # in their colours' order


@dataclass(frozen=True)
class Plan:
    """A figure to draw. A metric's pattern with a name is one curve, its largest match at each step; without, each match is one."""

    title: str
    note: str
    y_title: str
    curves: tuple[tuple[str, str], ...]  # (pattern of metrics, name)
    smooth: bool = True
    log: bool = False
    top: float | None = None
    refreshes: bool = False  # mark where the reference was replaced


@dataclass(frozen=True)
class Curve:
    """A metric of one run."""

    name: str
    points: list[tuple[float, float]]  # (step, value)
    half_widths: list[float] | None  # of each point's 95% interval; None where no standard error was recorded


@dataclass(frozen=True)
class Entry:
    """A line of a legend."""

    color: int
    dash: int
    name: str
    said: str


@dataclass(frozen=True)
class Figure:
    """A drawn figure."""

    title: str
    note: str
    svg: str
    legend: list[Entry]


PLANS = (
    Plan(
        "Held-out accuracy",
        "Problems never trained on, solved by one sample (pass@1; band: 95% confidence interval) and by majority vote (cons@k).",
        "share of problems",
        (("eval/pass@1", "pass@1"), ("eval/cons@*", "")),
        smooth=False,
        top=1.0,
    ),
    Plan("Held-out pass@1 by source", "Each benchmark by itself.", "share of problems", (("eval/*/pass@1", ""),), smooth=False, top=1.0),
    Plan(
        "Response length",
        "Tokens of the completions sampled for training. R1-Zero's grew by itself, without a reward for it.",
        "tokens a completion",
        (("rollout/length_max", "max"), ("rollout/length_p95", "p95"), ("rollout/length_mean", "mean")),
    ),
    Plan("Reward by part", "Mean of each reward over a rollout, before weights.", "mean reward", (("reward/*", ""),), top=1.0),
    Plan(
        "Solved, and groups without a gradient",
        "A group whose answers are all right or all wrong has no advantage to learn from.",
        "share of samples, groups",
        (("reward/solved", "solved"), ("reward/all_1_groups", "all right"), ("reward/all_0_groups", "all wrong")),
        top=1.0,
    ),
    Plan("Entropy", "Of the policy at the tokens it is trained on.", "nats a token", (("policy/entropy", "entropy"),)),
    Plan(
        "KL to the reference",
        "Falls to zero wherever the reference becomes the policy (dashed), as every 400 steps in the paper.",
        "nats a token (k3)",
        (("policy/kl", "KL"),),
        smooth=False,
        refreshes=True,
    ),
    Plan(
        "Reflective words",
        "wait, mistake, however, but, retry, error, verify, wrong, evaluate, check: the paper's list.",
        "words a completion",
        (("rollout/reflective_words", "all ten"), ("rollout/reflective_wait", "wait")),
    ),
    Plan(
        "Language consistency",
        "Words of the reasoning that are in the language of the prompt.",
        "share of words",
        (("reward/language", "training"), ("eval/language", "held out")),
        top=1.0,
    ),
    Plan(
        "Cut at the length limit",
        "Completions that reached the limit before their end.",
        "share of completions",
        (("rollout/truncated", "training"), ("eval/truncated", "held out")),
    ),
    Plan(
        "Length of right and wrong answers",
        "Wrong answers that grow longer than right ones are a sign of a biased loss.",
        "tokens a completion",
        (("rollout/length_wrong", "wrong"), ("rollout/length_correct", "right")),
    ),
    Plan(
        "Sampler against trainer",
        "The same weights in vLLM and in Megatron: log-probs of sampled tokens, and of the canary after each weight sync.",
        "|difference| (nats)",
        (("sync/logprob_gap_max", "largest"), ("sync/logprob_gap", "mean"), ("sync/canary_gap", "canary")),
        log=True,
    ),
    Plan("Clipped tokens", "Tokens whose ratio to the sampling policy was cut.", "share of tokens", (("policy/clip_share", "clipped"),)),
    Plan("Gradient norm", "Before clipping.", "L2 norm", (("policy/grad_norm", "norm"),)),
    Plan(
        "Expert load",
        "Tokens of a layer's busiest expert over the mean of its experts, in the layer where it is largest.",
        "busiest / mean",
        (("moe/load_max_over_mean/*", "load"),),
    ),
    Plan(
        "Throughput",
        "Prompt and completion tokens over the time of the step; completion tokens over that of the rollout.",
        "tokens a second",
        (("perf/tokens_per_second", "step"), ("perf/rollout_tokens_per_second", "rollout")),
    ),
)
LOSS = Plan("Loss", "Cross entropy of the assistant's tokens.", "nats a token", (("policy/loss", "loss"),))


def figures(runs: list[Run]) -> list[Figure]:
    """All figures that have a curve of at least two points."""
    plans = PLANS if any("reward/mean" in r for run in runs for r in run.records) else (LOSS, *PLANS)
    drawn = [figure for plan in plans for figure in [draw(plan, runs)] if figure]
    return drawn + [figure for run in runs for figure in [phase_times(run, named=len(runs) > 1)] if figure]


def draw(plan: Plan, runs: list[Run]) -> Figure | None:
    """One figure of all the runs; None where there is nothing to draw."""
    found = [(run, curve) for run in runs for curve in curves(plan, run.records)]
    if not any(len(curve.points) > 1 for _, curve in found):
        return None
    names = list(dict.fromkeys(curve.name for _, curve in found))
    several = len({run.name for run, _ in found}) > 1
    said = [f"{run.name} {c.name}" if several and len(names) > 1 else run.name if several else c.name for run, c in found]
    labelled = len(said) <= CURVES and max(map(len, said)) <= LABEL
    series = []
    for (run, curve), text in zip(found, said):
        place = names.index(curve.name)
        color, dash = (runs.index(run), place) if len(runs) > 1 else (place, 0)
        label = text if labelled and len(curve.points) > 1 else ""
        series.append(svg.Series(curve.points, label, text, color % COLORS, dash % DASHES, curve.half_widths, plan.smooth))
    drawn = svg.lines(
        series,
        x_title=STEPS,
        y_title=plan.y_title,
        marks=refreshes(runs) if plan.refreshes else [],
        mark_title="reference replaced at step",
        log=plan.log,
        top=plan.top,
    )
    return Figure(plan.title, plan.note, drawn, [Entry(s.color, s.dash, s.title, change([y for _, y in s.points])) for s in series])


def change(values: list[float]) -> str:
    """The first and the last value."""
    return " \u2192 ".join(scale.number(value) for value in [*values[:1], *values[1:][-1:]])


def curves(plan: Plan, records: Iterable[dict[str, float]]) -> list[Curve]:
    """The plan's curves that the records have; of a step that was done again the last counts."""
    found: dict[str, dict[float, tuple[float, float | None]]] = {}
    for record in records:
        here: dict[str, tuple[float, float | None]] = {}
        for pattern, called in plan.curves:
            for metric in (m for m in matches(pattern, record) if math.isfinite(record[m])):
                name = called or metric.partition("/")[2].removesuffix("/pass@1")
                if name not in here or record[metric] > here[name][0]:
                    here[name] = record[metric], record.get(f"{metric}_stderr")
        for name, value in here.items():
            found.setdefault(name, {})[record["step"]] = value
    order = [name for _, name in plan.curves]
    names = sorted(found, key=lambda n: (order.index(n) if n in order else len(order), n))
    drawn = []
    for name in names:
        steps = sorted(found[name])
        values, errors = zip(*(found[name][step] for step in steps))
        if not plan.log or max(values) > 0:
            half_widths = [CONFIDENCE * e for e in errors] if None not in errors else None
            drawn.append(Curve(name, list(zip(steps, values)), half_widths))
    return drawn


def matches(pattern: str, record: dict[str, float]) -> list[str]:
    """The metrics of a record that a pattern names; standard errors and counts are no curves."""
    if pattern in record:
        return [pattern]
    if "*" not in pattern:
        return []
    found = [metric for metric in record if fnmatchcase(metric, pattern) and not metric.endswith("_stderr")]
    return [m for m in found if not (pattern == "reward/*" and m.partition("/")[2] in COUNTS)]


def refreshes(runs: list[Run]) -> list[float]:
    """The steps at which the reference became the policy, where all runs agree on them."""
    periods = {run.config.get("reference_refresh_steps", 0) for run in runs}
    last = max((r["step"] for run in runs for r in run.records), default=0)
    period = periods.pop() if len(periods) == 1 else 0
    return [float(step) for step in range(period, int(last) + 1, period)] if period else []


def phase_times(run: Run, *, named: bool) -> Figure | None:
    """Seconds of each phase of a step, stacked."""
    timed = {r["step"]: cost.phases(r) for r in run.records if cost.STEP in r}
    if len(timed) < 2:
        return None
    apart = {name.removeprefix("time/") for name in cost.APART}
    seen = {name for phases in timed.values() for name in phases} - apart
    names = [*(n for n in PHASES if n in seen), *sorted(seen - set(PHASES))]
    layers = [svg.Series([(x, timed[x].get(n, 0.0)) for x in sorted(timed)], title=phase_name(n), color=phase_color(n)) for n in names]
    whole = sum(y for layer in layers for _, y in layer.points) or 1.0
    legend = [Entry(s.color, 0, s.title, f"{sum(y for _, y in s.points) / whole:.0%}") for s in layers]
    title = f"Time of a step: {run.name}" if named else "Time of a step"
    note = "One rollout and its optimizer steps; evaluation, start and checkpoints are in the cost table." if run.stage == "grpo" else ""
    return Figure(title, note, svg.areas(layers, x_title=STEPS, y_title="seconds"), legend)


def phase_color(name: str) -> int:
    """The colour of a phase, the same everywhere."""
    return PHASES.index(name) if name in PHASES else len(PHASES) - 1


def phase_name(name: str) -> str:
    """A phase as a reader says it."""
    return name.replace("_", " ").replace("logprobs", "log-probs")
