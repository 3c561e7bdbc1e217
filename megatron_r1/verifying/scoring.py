"""Scores completions in a pool of verifier processes while generation goes on.

Each verification has a time limit that works whatever it does: a process that exceeds it is killed and replaced. A verifier
that fails (raises, hangs, dies) never scores 0: its component is missing from `sample.rewards`, the reason stands in
`sample.failures`, and `sample.reward` is NaN, which `advantages` leaves out of the group. A zero instead would teach the
policy that its answer was wrong, and would shift the baseline of all other completions of the problem.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import queue
import select
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from megatron_r1 import plugins
from megatron_r1.problem import Problem

if TYPE_CHECKING:  # checks.py reads this file before anything starts, and torch takes seconds to import
    from megatron_r1.types import Sample

START_SECONDS = 120.0  # imports of a reward's packages from a slow shared disk


class Verifier:
    """One process of grading.py, used by one thread at a time."""

    def __init__(self, rewards: list[str]):
        self.command = [sys.executable, "-m", "megatron_r1.verifying.grading", *rewards]
        self.is_closed = False
        self.start()

    def start(self) -> None:
        """Starts the process and returns; it imports its rewards while the caller goes on."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment)
        self.is_ready = False

    def ask(self, request: Mapping[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
        """{"score": float} or {"failure": why}; afterwards the verifier is fit for the next request.

        A process that died is given the request a second time: it may have been killed from outside, not by this text.
        Raises RuntimeError when no process can be started.
        """
        line = json.dumps(request).encode() + b"\n"
        for _ in range(2):
            self._wait_until_ready()
            try:
                self.process.stdin.write(line)  # cannot block for long: a process that is ready does nothing but read
                return self._read(timeout_seconds)
            except TimeoutError:
                self._replace()
                return {"failure": f"no verdict within {timeout_seconds:g} s"}
            except (BrokenPipeError, EOFError):
                code = self._replace()
        return {"failure": f"its process died twice, the last time with exit code {code}"}

    def close(self) -> None:
        """Ends the process at once."""
        self.is_closed = True
        self._kill()

    def _wait_until_ready(self) -> None:
        if self.is_ready:
            return
        try:
            self._read(START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self._kill()
            raise RuntimeError(f"a verifier process did not start; run `{' '.join(self.command)}` to see why") from error
        self.is_ready = True

    def _read(self, timeout_seconds: float) -> dict[str, Any]:
        """The process's next line, which a pipe passes on in one piece as it is shorter than 4 KiB."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(1000 * timeout_seconds):
            raise TimeoutError
        line = os.read(self.process.stdout.fileno(), 4096)
        if not line:
            raise EOFError
        return json.loads(line)

    def _replace(self) -> int:
        code = self._kill()
        if not self.is_closed:
            self.start()
        return code

    def _kill(self) -> int:
        """The exit code: its own if it was dead already."""
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


class Scorer:
    """Verifies completions in `workers` processes; `submit` as they arrive, `collect` when all are there."""

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        by_source: Mapping[str, Mapping[str, float]] | None = None,
        workers: int = 1,
        timeout_seconds: float = 10.0,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """weights: reward name -> its weight in `sample.reward`; options: reward name -> its keyword arguments.

        by_source: pattern of a problem's `source` -> the weights it has instead. Raises ValueError for a reward or an option
        that does not exist, and where a reward cannot work on this machine.
        """
        self.weights = dict(weights)
        self.by_source = dict(by_source or {})
        check(self.weights, options or {}, by_source=self.by_source)
        names = reward_names(self.weights, self.by_source)
        self.options = {name: dict((options or {}).get(name, {})) for name in names}
        self.timeout_seconds = timeout_seconds
        self.verifiers = [Verifier(names) for _ in range(workers)]
        self.idle: queue.SimpleQueue[Verifier] = queue.SimpleQueue()
        for verifier in self.verifiers:
            self.idle.put(verifier)
        self.executor = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self.pending: dict[int, Future[dict[str, dict[str, Any]]]] = {}  # id of the sample -> component -> answer

    def submit(self, sample: Sample) -> None:
        """Starts to verify a completion; returns at once. From any thread."""
        self.pending[id(sample)] = self.executor.submit(self._verify, sample)

    def collect(self, samples: list[Sample]) -> None:
        """Waits for the samples' verdicts and fills `rewards`, `failures` and `reward`; submits those that were not.

        `reward` is NaN where a component with a weight other than 0 has failed. No wait is without end: each verification
        has its time limit.
        """
        for sample in samples:
            if id(sample) not in self.pending:
                self.submit(sample)
        for sample in samples:
            answers = self.pending.pop(id(sample)).result()
            sample.rewards = {name: answer["score"] for name, answer in answers.items() if "score" in answer}
            sample.failures = {name: answer["failure"] for name, answer in answers.items() if "failure" in answer}
            weights = weights_of(sample.problem.source, self.weights, by_source=self.by_source)
            sample.reward = sum(
                weight * sample.rewards.get(name, math.nan) for name, weight in weights.items() if weight or name in sample.rewards
            )

    def equal(self, name: str, found: str, reference: str) -> bool | None:
        """Whether reward `name` takes one final answer for the other; None where it fails to judge them. Blocks."""
        problem = Problem(id=0, prompt="", answer=reference)
        request = {"reward": name, "completion": f"<answer>{found}</answer>", "problem": asdict(problem), "options": self.options[name]}
        verifier = self.idle.get()
        try:
            answer = verifier.ask(request, timeout_seconds=self.timeout_seconds)
        finally:
            self.idle.put(verifier)
        return answer["score"] >= 1.0 if "score" in answer else None

    def close(self) -> None:
        """Ends the processes; verifications that have not begun are dropped."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        for verifier in self.verifiers:
            verifier.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verify(self, sample: Sample) -> dict[str, dict[str, Any]]:
        verifier = self.idle.get()
        try:
            request = {"completion": sample.text, "problem": asdict(sample.problem)}
            return {
                name: verifier.ask({**request, "reward": name, "options": self.options[name]}, timeout_seconds=self.timeout_seconds)
                for name in weights_of(sample.problem.source, self.weights, by_source=self.by_source)
            }
        finally:
            self.idle.put(verifier)


def weights_of(source: str, weights: Mapping[str, float], *, by_source: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """The weights of the first pattern that matches the source, in the order of the config; `weights` where none does."""
    return next((chosen for pattern, chosen in by_source.items() if fnmatchcase(source, pattern)), weights)


def reward_names(weights: Mapping[str, float], by_source: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Every reward that some problem may get."""
    return list(dict.fromkeys(name for table in (weights, *by_source.values()) for name in table))


def check(
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]],
    *,
    by_source: Mapping[str, Mapping[str, float]],
) -> None:
    """ValueError for an unknown reward, options of a reward without a weight, or an option the reward does not take.

    A reward's module may have check(**options), which raises ValueError where it cannot work on this machine, and warm_up(), for
    imports that only a verifier process needs, before the first answer's time limit runs.
    """
    names = reward_names(weights, by_source)
    for pattern, table in by_source.items():
        if not table:
            raise ValueError(f"rewards.by_source.{pattern!r}: no rewards; give one a weight, or remove the pattern")
    for name in options:
        if name not in names:
            tables = "rewards.weights has no" if not by_source else "neither rewards.weights nor rewards.by_source has"
            raise ValueError(f"rewards.options.{name}: {tables} {name!r}; give it a weight or remove its options")
    for name in names:
        module = plugins.load("rewards", name)
        if not callable(getattr(module, "reward", None)):
            raise ValueError(f"rewards.weights.{name}: {module.__name__} has no function reward(completion, problem)")
        try:
            inspect.signature(module.reward).bind("", None, **options.get(name, {}))
        except TypeError as error:
            raise ValueError(f"rewards.options.{name}: {error}; see reward() in {module.__name__}") from None
        if hasattr(module, "check"):
            module.check(**options.get(name, {}))
