"""What a rollout looked like, in figures: rewards by component, groups without a gradient, lengths, truncation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from megatron_r1.metrics import Record, percentile
from megatron_r1.types import Sample

# the paper's list of reflective words (arXiv 2501.12948v2, C.2)
WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
REFLECTIVE = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


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


def judge_of(sample: Sample, judges: Sequence[str]) -> str:
    """The first of `judges` that scored the sample, or failed to; which one that is depends on the problem's source. "" if none did."""
    return next((name for name in judges if name in sample.rewards or name in sample.failures), "")


def is_correct(sample: Sample, judges: Sequence[str]) -> bool | None:
    """Whether its judge gave full marks; None without a verdict, as of a general prompt, or where the verifier failed."""
    judge = judge_of(sample, judges)
    return sample.rewards[judge] >= 1.0 if judge in sample.rewards else None


def reward_record(samples: list[Sample], *, judges: Sequence[str]) -> Record:
    """reward/<component> means over what was verified, solved share, groups whose rewards are all equal, verifier failures.

    What is solved is counted over the samples of which one of `judges` says so or not, if there are any.
    With problems of more than one source, also the mean of each: reward/source/<name>.
    """
    record = {"reward/mean": mean(verified(samples))}
    for name in sorted({name for s in samples for name in (*s.rewards, *s.failures)}):
        record[f"reward/{name}"] = mean([s.rewards[name] for s in samples if name in s.rewards])
    sources = sorted({s.problem.source for s in samples})
    if len(sources) > 1:
        for source in sources:
            record[f"reward/source/{source}"] = mean(verified([s for s in samples if s.problem.source == source]))
    verdicts = [[v for s in group if (v := is_correct(s, judges)) is not None] for group in groups(samples)]
    if solved := [flags for flags in verdicts if flags]:
        record["reward/solved"] = share([flag for flags in solved for flag in flags])
        record["reward/all_0_groups"] = share([not any(flags) for flags in solved])
        record["reward/all_1_groups"] = share([all(flags) for flags in solved])
    record["reward/equal_groups"] = share([len(set(verified(group))) <= 1 for group in groups(samples)])
    record["reward/verifier_failures"] = float(sum(len(s.failures) for s in samples))
    return record


def rollout_record(samples: list[Sample], *, version: int, judges: Sequence[str]) -> Record:
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
    record |= reflective_record([s.text for s in samples])
    for title, right in (("correct", True), ("wrong", False)):
        some = [float(len(s.completion_ids)) for s in samples if is_correct(s, judges) is right]
        if some:
            record[f"rollout/length_{title}"] = mean(some)
    return record


def reflective_record(texts: list[str]) -> Record:
    """rollout/ counts a completion of the paper's reflective words, all of them and "wait" alone (arXiv 2501.12948v2, C.2)."""
    found = [[word.lower() for word in REFLECTIVE.findall(text)] for text in texts]
    return {
        "rollout/reflective_words": mean([float(len(words)) for words in found]),
        "rollout/reflective_wait": mean([float(words.count("wait")) for words in found]),
    }


def spread(samples: list[Sample], count: int) -> list[Sample]:
    """`count` of them, evenly from first to last."""
    return samples[:: max(1, len(samples) // max(1, count))][:count]


def completions_page(samples: list[Sample], count: int) -> str:
    """Markdown of `count` completions with their rewards, for TensorBoard's text tab."""
    blocks = []
    for s in spread(samples, count):
        scores = ", ".join(f"{name} {value:g}" for name, value in sorted(s.rewards.items()))
        failed = "".join(f"; {name} FAILED: {why}" for name, why in s.failures.items())
        answer = f"{s.problem.answer:.200}"  # tests are long
        blocks.append(f"**{s.problem.prompt}** (answer {answer})\n\n```\n{s.text}\n```\n\n{scores}{failed}; {s.finish_reason}")
    return "\n\n---\n\n".join(blocks)


def completion_rows(samples: list[Sample], count: int) -> list[dict[str, Any]]:
    """The same completions as lines of completions.jsonl; of a long text the middle is left out."""
    return [
        {
            "prompt": shortened(s.problem.prompt),
            "answer": shortened(str(s.problem.answer)),
            "completion": shortened(s.text),
            "tokens": len(s.completion_ids),
            "rewards": s.rewards,
            "failures": s.failures,
            "finish_reason": s.finish_reason,
        }
        for s in spread(samples, count)
    ]


def shortened(text: str, limit: int = 6000) -> str:
    """The text, or its beginning and end with a line between that says how many characters are missing."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
