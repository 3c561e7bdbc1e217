"""pass@1 on held-out problems: (1/k) sum of correct over k samples a problem, as the paper evaluates."""

from __future__ import annotations

from collections.abc import Callable

from megatron_r1.metrics import Record, percentile
from megatron_r1.summary import groups, is_solved, mean, share
from megatron_r1.types import Problem, Sample

# sample and verify: problems -> scored samples of all of them, the same list on every rank
RollOut = Callable[[list[Problem]], list[Sample]]


def evaluate(problems: list[Problem], roll_out: RollOut) -> Record:
    """eval/ pass@1 with its standard error over problems, every reward's mean, lengths and truncation. Collective."""
    samples = roll_out(problems)
    correct = [share([is_solved(s) for s in group]) for group in groups(samples)]
    pass_1 = mean(correct)
    variance = mean([(c - pass_1) ** 2 for c in correct])
    lengths = [float(len(s.completion_ids)) for s in samples]
    record = {
        "eval/pass@1": pass_1,
        "eval/pass@1_stderr": (variance / len(correct)) ** 0.5,
        "eval/problems": float(len(correct)),
        "eval/length_mean": mean(lengths),
        "eval/length_p95": percentile(lengths, 0.95),
        "eval/truncated": share([s.finish_reason == "length" for s in samples]),
        "eval/verifier_failures": float(sum(len(s.failures) for s in samples)),
    }
    for name in sorted({name for s in samples for name in s.rewards}):
        record[f"eval/{name}"] = mean([s.rewards[name] for s in samples if name in s.rewards])
    return record
