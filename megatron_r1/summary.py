"""What a rollout looked like, in figures: rewards by component, groups without a gradient, lengths, truncation."""

from __future__ import annotations

import math

from megatron_r1.metrics import Record, percentile
from megatron_r1.types import Sample


def groups(samples: list[Sample]) -> list[list[Sample]]:
    """The samples by problem, in the order problems first appear."""
    by_problem: dict[int, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem.id, []).append(sample)
    return list(by_problem.values())


def share(flags: list[bool]) -> float:
    """The fraction that is true; 0 of none."""
    return sum(flags) / len(flags) if flags else 0.0


def mean(values: list[float]) -> float:
    """The average; 0 of none."""
    return sum(values) / len(values) if values else 0.0


def verified(samples: list[Sample]) -> list[float]:
    """The rewards of the samples whose verifiers all answered; those of the others are NaN."""
    return [s.reward for s in samples if not math.isnan(s.reward)]


def reward_record(samples: list[Sample], *, solved_by: str = "accuracy") -> Record:
    """reward/<component> means over what was verified, solved share, groups whose rewards are all equal, verifier failures."""
    record = {"reward/mean": mean(verified(samples))}
    for name in sorted({name for s in samples for name in (*s.rewards, *s.failures)}):
        record[f"reward/{name}"] = mean([s.rewards[name] for s in samples if name in s.rewards])
    solved = [[s.rewards.get(solved_by, 0.0) >= 1.0 for s in group] for group in groups(samples)]
    record["reward/solved"] = share([flag for group in solved for flag in group])
    record["reward/all_0_groups"] = share([not any(group) for group in solved])
    record["reward/all_1_groups"] = share([all(group) for group in solved])
    record["reward/equal_groups"] = share([len(set(verified(group))) <= 1 for group in groups(samples)])
    record["reward/verifier_failures"] = float(sum(len(s.failures) for s in samples))
    return record


def rollout_record(samples: list[Sample], *, version: int) -> Record:
    """rollout/ lengths in tokens of the completion, truncation, and how many weight versions the samples are behind."""
    lengths = [float(len(s.completion_ids)) for s in samples]
    record = {
        "rollout/length_mean": mean(lengths),
        "rollout/length_p50": percentile(lengths, 0.50),
        "rollout/length_p95": percentile(lengths, 0.95),
        "rollout/length_max": max(lengths),
        "rollout/truncated": share([s.finish_reason == "length" for s in samples]),
        "rollout/staleness_max": float(max(version - s.weight_version for s in samples)),
    }
    for title, right in (("correct", True), ("wrong", False)):
        some = [float(len(s.completion_ids)) for s in samples if (s.rewards.get("accuracy", 0.0) >= 1.0) == right]
        if some:
            record[f"rollout/length_{title}"] = mean(some)
    return record


def completions_page(samples: list[Sample], count: int) -> str:
    """Markdown of `count` completions with their rewards, for TensorBoard's text tab."""
    step = max(1, len(samples) // max(1, count))
    blocks = []
    for s in samples[::step][:count]:
        scores = ", ".join(f"{name} {value:g}" for name, value in sorted(s.rewards.items()))
        failed = "".join(f"; {name} FAILED: {why}" for name, why in s.failures.items())
        blocks.append(f"**{s.problem.prompt}** (answer {s.problem.answer})\n\n```\n{s.text}\n```\n\n{scores}{failed}; {s.finish_reason}")
    return "\n\n---\n\n".join(blocks)
