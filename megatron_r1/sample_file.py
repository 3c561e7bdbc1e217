"""Every sample of an evaluation, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1.evaluation import Attempt
from megatron_r1.types import Sample


class SampleFile:
    """Written as samples come; the file has its name only once it is whole."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_suffix(".partial")

    def __enter__(self) -> SampleFile:
        self.file = self.partial.open("w")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.partial.rename(self.path)

    def write(self, sample: Sample, attempt: Attempt) -> Attempt:
        """One line; returns the attempt. `correct` is null where a verifier failed, and `failures` says why."""
        row = {
            "problem": sample.problem.id,
            "source": sample.problem.source,
            "sample": sample.group_index,
            "prompt": sample.problem.prompt,
            "reference": sample.problem.answer,
            "completion": sample.text,
            "answer": attempt.answer,
            "correct": attempt.correct,
            "length": attempt.length,
            "finish_reason": sample.finish_reason,
            "rewards": attempt.rewards,
            "failures": attempt.failures,
        }
        self.file.write(json.dumps(row) + "\n")
        return attempt
