"""How good a policy is, from k samples of each problem: pass@1, cons@k and pass@k, each with its uncertainty, by source.

    pass@1   the share of a problem's samples that are correct; its mean over the problems (arXiv 2501.12948v2, D.1)
    cons@k   whether the final answer that most samples of a problem agree on is correct. Answers are one if the verifier takes
             them for equal; the correct ones are, each equals the reference. If n answers have the most votes and one of them is
             correct it counts 1/n, what drawing one would give on average. A sample without a final answer has no vote.
    pass@k   the chance that any of k samples is correct, from n >= k of which c are: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)

Samples of one problem are not independent, so the problem is the unit: a standard error is that of the mean over problems, and an
interval the normal 95% one, cut to [0, 1].

A verifier that failed says nothing: its sample is neither correct nor wrong, does not vote, and is counted as `unjudged`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import comb, sqrt

from rich.table import Table

from megatron_r1 import plugins
from megatron_r1.metrics import Record, percentile
from megatron_r1.summary import is_correct, judge_of, mean, share
from megatron_r1.types import Problem, Sample

Z_95 = 1.959964  # of a normal distribution, 95% lies within so many standard deviations of its mean
NUMBER = re.compile(r"[+-]?\d{1,99}(\.\d{1,99}|/0*[1-9]\d{0,98})?")  # what Fraction reads, of a sane length

# (reward, found, reference) -> whether that reward takes the two final answers for equal; None: it cannot judge them
Equal = Callable[[str, str, str], bool | None]


@dataclass(frozen=True)
class Attempt:
    """What counts of one sample, without its tokens."""

    problem: Problem
    judge: str  # the reward that says whether it is correct; "" if none does
    correct: bool | None  # None: no verdict
    answer: str | None  # the final answer, where the judge has a notion of it and gave a verdict
    length: int  # tokens of the completion
    truncated: bool
    rewards: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems."""

    mean: float
    stderr: float | None  # None: a single problem shows no spread
    count: int  # problems

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% confidence interval."""
        if self.stderr is None:
            return None
        return max(0.0, self.mean - Z_95 * self.stderr), min(1.0, self.mean + Z_95 * self.stderr)


@dataclass(frozen=True)
class Score:
    """A row of the table: one source, or all problems."""

    source: str  # "" = all
    problems: int
    samples: int
    k: int  # samples a problem
    pass_1: Estimate | None  # None: no sample has a verdict
    cons: Estimate | None  # None: k = 1, or no problem asks for a final answer
    pass_k: dict[int, Estimate]
    length_mean: float
    length_p95: float
    truncated: float  # share of the samples
    unjudged: int  # samples without a verdict
    undecided: int  # pairs of answers that the verifier could not compare; they count as different
    failures: int  # of any reward's verifier
    rewards: dict[str, float]  # means over what was verified


def attempt(sample: Sample, *, judges: Sequence[str]) -> Attempt:
    """A verified sample; the first of `judges` that scored it, or failed to, says whether it is correct (a score of 1)."""
    judge, correct = judge_of(sample, judges), is_correct(sample, judges)
    return Attempt(
        problem=sample.problem,
        judge=judge,
        correct=correct,
        answer=None if correct is None else final_answer(judge, sample.text),
        length=len(sample.completion_ids),
        truncated=sample.finish_reason == "length",
        rewards=sample.rewards,
        failures=sample.failures,
    )


def final_answer(judge: str, text: str) -> str | None:
    """What the completion answers, as the reward reads it; None of a reward without final answers, as one that runs code."""
    find = finder(judge)
    return None if find is None else find(text)


@lru_cache
def finder(judge: str) -> Callable[[str], str | None] | None:
    """The function of a reward's module that finds a completion's answer: `chosen` (an option's letter), or `final_answer`."""
    module = plugins.load("rewards", judge)
    return getattr(module, "chosen", None) or getattr(module, "final_answer", None)


def scores(attempts: Sequence[Attempt], *, k: int, pass_at: Sequence[int] = (), equal: Equal) -> list[Score]:
    """All problems first, then each source where there are several; `attempts` has k of each problem, in any order."""
    groups: dict[int, list[Attempt]] = {}
    for one in attempts:
        groups.setdefault(one.problem.id, []).append(one)
    assert all(len(group) == k for group in groups.values()), f"{k=} {len(attempts)=} {len(groups)=}"
    votes = {key: consensus(group, equal) for key, group in sorted(groups.items())} if k > 1 else {}
    sources = sorted({one.problem.source for one in attempts})
    rows = [score("", groups, votes, k=k, pass_at=pass_at)]
    for source in sources if len(sources) > 1 else ():
        own = {key: group for key, group in groups.items() if group[0].problem.source == source}
        rows.append(score(source, own, votes, k=k, pass_at=pass_at))
    return rows


def score(
    source: str, groups: dict[int, list[Attempt]], votes: dict[int, tuple[float | None, int]], *, k: int, pass_at: Sequence[int]
) -> Score:
    """The row of some problems."""
    attempts = [one for group in groups.values() for one in group]
    judged = [[one.correct for one in group if one.correct is not None] for group in groups.values()]
    outcomes = [votes[key] for key in groups if key in votes]
    lengths = [float(one.length) for one in attempts]
    chances = {at: [pass_at_k(len(g), sum(g), at) for g in judged if len(g) >= at] for at in pass_at}
    names = sorted({name for one in attempts for name in one.rewards})
    return Score(
        source=source,
        problems=len(groups),
        samples=len(attempts),
        k=k,
        pass_1=estimate([share(flags) for flags in judged if flags]),
        cons=estimate([value for value, _ in outcomes if value is not None]),
        pass_k={at: found for at, values in chances.items() if (found := estimate(values)) is not None},
        length_mean=mean(lengths),
        length_p95=percentile(lengths, 0.95),
        truncated=share([one.truncated for one in attempts]),
        unjudged=sum(one.correct is None for one in attempts),
        undecided=sum(undecided for _, undecided in outcomes),
        failures=sum(len(one.failures) for one in attempts),
        rewards={name: mean([one.rewards[name] for one in attempts if name in one.rewards]) for name in names},
    )


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of the problems' figures; None of none."""
    if not values:
        return None
    n, middle = len(values), mean(list(values))
    spread = sqrt(sum((v - middle) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return Estimate(middle, None if spread is None else spread / sqrt(n), n)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that any of k of n samples is correct, when c of the n are."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def consensus(group: Sequence[Attempt], equal: Equal) -> tuple[float | None, int]:
    """(whether the vote of one problem is correct, 0 .. 1; comparisons that failed). (None, 0) where no final answer is asked for."""
    judged = [one for one in group if one.correct is not None]
    if not judged or finder(judged[0].judge) is None:
        return None, 0
    right = sum(one.correct for one in judged)
    wrong = [one.answer for one in judged if one.answer is not None and not one.correct]
    if right == 0 or right > len(wrong):  # decided, however the wrong answers fall together
        return float(right > 0), 0
    sizes, undecided = classes(wrong, lambda found, first: equal(judged[0].judge, found, first))
    ahead, level = sum(size > right for size in sizes), sizes.count(right)
    return (0.0 if ahead else 1.0 / (1 + level)), undecided


def classes(answers: Iterable[str], equal: Callable[[str, str], bool | None]) -> tuple[list[int], int]:
    """(how many answers each class of equal ones has, comparisons that failed).

    An answer joins the first class whose first answer it equals, so the outcome depends on the order alone.
    """
    sizes: dict[str, int] = {}
    undecided = 0
    for text, count in Counter(map(canonical, answers)).items():
        home = text
        for first in () if text in sizes else list(sizes):
            verdict = False if NUMBER.fullmatch(text) and NUMBER.fullmatch(first) else equal(text, first)
            undecided += verdict is None
            if verdict:
                home = first
                break
        sizes[home] = sizes.get(home, 0) + count
    return list(sizes.values()), undecided


def canonical(answer: str) -> str:
    """One text for answers that need no verifier to be equal: spacing, dollar signs, and how a plain number is written."""
    bare = " ".join(answer.strip().strip("$").split())
    return str(Fraction(bare)) if NUMBER.fullmatch(bare) else bare


def record(rows: Sequence[Score]) -> Record:
    """eval/ figures of all problems, and eval/<source>/ ones of each source."""
    figures: Record = {}
    for row in rows:
        prefix = f"eval/{row.source}/" if row.source else "eval/"
        estimates = {"pass@1": row.pass_1, f"cons@{row.k}": row.cons} | {f"pass@{at}": e for at, e in row.pass_k.items()}
        for name, found in estimates.items():
            if found is not None:
                figures[prefix + name] = found.mean
            if found is not None and found.stderr is not None:
                figures[f"{prefix}{name}_stderr"] = found.stderr
        plain = ("problems", "samples", "length_mean", "length_p95", "truncated", "unjudged", "undecided")
        figures |= {prefix + name: float(getattr(row, name)) for name in plain}
        figures[prefix + "verifier_failures"] = float(row.failures)
        figures |= {prefix + name: value for name, value in row.rewards.items()}
    return figures


def table(rows: Sequence[Score], *, title: str) -> Table:
    """The rows as people read them; counts of what could not be judged stand in the last columns."""
    k, more, undecided = rows[0].k, list(rows[0].pass_k), rows[0].undecided
    note = f"{undecided} pairs of answers could not be compared and count as different" if undecided else None
    heads = ["source", "problems", "pass@1", *([f"cons@{k}"] if rows[0].cons else []), *(f"pass@{at}" for at in more)]
    result = Table(*heads, "tokens", "p95", "cut", "unjudged", "failures", title=title, caption=note)
    for column in result.columns[1:]:
        column.justify = "right"
    for row in rows:
        figures = [row.pass_1, *([row.cons] if rows[0].cons else []), *(row.pass_k.get(at) for at in more)]
        lengths = [f"{row.length_mean:.0f}", f"{row.length_p95:.0f}", f"{row.truncated:.1%}"]
        shown = [f"{row.problems} x {k}", *map(spelled, figures), *lengths, str(row.unjudged), str(row.failures)]
        result.add_row(row.source or "all", *shown)
    return result


def spelled(found: Estimate | None) -> str:
    """`0.715 [0.671, 0.759]`: mean and 95% interval."""
    if found is None:
        return "-"
    interval = found.interval
    return f"{found.mean:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
