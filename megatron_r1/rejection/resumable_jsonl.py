"""A JSONL file that a run adds to, problem by problem, and that a killed run continues to the byte.

Beside `x.jsonl` stands `x.progress.json`: how many problems are done, how many bytes they came to, and what was counted. It is
replaced as a whole after each problem; what a killed run wrote beyond it is cut off and made again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ResumableJsonl:
    """The output and its counts by source. One process at a time may have it open."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Begins the file, or continues it. settings: what its content depends on, JSON-ready, by the config's names.

        Raises ValueError if the file was begun with other settings, or is shorter than it was.
        """
        self.progress_file = file.with_suffix(".progress.json")
        self.settings = json.loads(json.dumps(settings))
        self.sampler: str | None = None
        self.problems = 0  # done
        self.counts: dict[str, Counter[str]] = {}  # source -> what -> how many
        self.bytes = 0
        if self.progress_file.is_file():
            self._restore(json.loads(self.progress_file.read_text()))
        self.output = file.open("ab")
        if file.stat().st_size < self.bytes:
            raise ValueError(f"{file}: has lost some of its {self.bytes} bytes; start a new run.dir")
        self.output.truncate(self.bytes)

    def _restore(self, progress: dict[str, Any]) -> None:
        for name in {**progress["settings"], **self.settings}:
            then, now = progress["settings"].get(name), self.settings.get(name)
            if then != now:
                raise ValueError(f"{name} = {now!r}: the run in this folder was begun with {then!r}; set that, or start a new run.dir")
        self.sampler, self.problems, self.bytes = progress["sampler"], progress["problems"], progress["bytes"]
        self.counts = {source: Counter(counts) for source, counts in progress["counts"].items()}

    def begin(self, sampler: str) -> None:
        """Say what samples. Raises ValueError if something else has begun the file."""
        if self.sampler not in (None, sampler):
            raise ValueError(f"the servers serve {sampler!r}: the run in this folder was begun with {self.sampler!r}; start a new run.dir")
        self.sampler = sampler

    def add(self, source: str, lines: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> None:
        """One problem's lines and counts. What has been added stays, whatever happens to the process or the machine."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        self.output.write(text)
        self.output.flush()
        os.fsync(self.output.fileno())
        self.bytes += len(text)
        self.problems += 1
        self.counts.setdefault(source, Counter()).update(counts)
        keys = ("problems", "bytes", "sampler", "counts", "settings")
        temporary = self.progress_file.with_suffix(".new")
        with temporary.open("w") as file:
            json.dump({key: getattr(self, key) for key in keys}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.progress_file)

    def close(self) -> None:
        self.output.close()
