"""Rejection sampling of one problem: sample, verify, filter, judge. What is dropped says why.

The cheapest check comes first, so that a judge is asked only about what would be kept otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_r1.problem import Problem
from megatron_r1.rejection import filters
from megatron_r1.rejection.filters import Filters
from megatron_r1.rejection.judge import Judge, Verdict
from megatron_r1.rollout.chat_servers import ChatServers
from megatron_r1.rollout.engine import SamplingParams, request_seed
from megatron_r1.rollout.servers import Refused
from megatron_r1.types import Sample
from megatron_r1.verifying.scoring import Scorer

# Why a completion is dropped, in the order of the checks.
REASONS = (
    "refused",  # the server takes no such prompt (HTTP 400), as one too long for its model
    "truncated",
    "verifier_failed",
    "unchecked",  # none of the required rewards speaks of it
    "wrong",
    "too_long",
    "empty_reasoning",
    "code_block",
    "mixed_language",
    "long_paragraph",
    "repetition",
    "duplicate",  # of an earlier completion of the same problem
    "judge_failed",
    "judged_wrong",
    "problem_quota",
    "source_quota",
)


@dataclass
class Drawn:
    """One completion and what became of it."""

    sample: Sample
    seed: int
    tokens: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    dropped: str = ""  # one of REASONS; "" = kept


@dataclass(frozen=True)
class Drawer:
    """`samples` completions a problem; kept is what reaches every `required` score, or the judge's approval, and passes the filters."""

    servers: ChatServers
    scorer: Scorer
    judge: Judge | None
    sampling: SamplingParams
    samples: int
    required: Mapping[str, float]
    filters: Filters
    per_problem: int | None
    seed: int

    async def draw(self, problem: Problem) -> list[Drawn]:
        """All completions of the problem in their order, each with its fate."""
        drawn = await asyncio.gather(*(self._sample(problem, i) for i in range(self.samples)))
        whole = [d for d in drawn if not d.dropped]
        is_judged = self.judge is not None and self.judge.covers(problem)
        if not is_judged:
            await asyncio.to_thread(self.scorer.collect, [d.sample for d in whole])
        seen: set[str] = set()
        for d in whole:
            d.dropped = "" if is_judged else shortfall(d.sample, self.required)
            d.dropped = d.dropped or filters.reason(d.sample.text, problem, tokens=d.tokens, filters=self.filters) or ""
            if not d.dropped and d.sample.text in seen:
                d.dropped = "duplicate"
            seen.add(d.sample.text)
        if is_judged:
            await asyncio.gather(*(self._judge(problem, d) for d in whole if not d.dropped))
        for d in [d for d in whole if not d.dropped][self.per_problem or self.samples :]:
            d.dropped = "problem_quota"
        return list(drawn)

    async def _sample(self, problem: Problem, index: int) -> Drawn:
        seed = request_seed(self.seed, problem.id, index)
        sample = Sample(problem, index, [], [], [], "stop", weight_version=-1)
        try:
            reply = await self.servers.ask(problem.prompt, self.sampling, seed=seed)
        except Refused as error:
            if error.status != 400:
                raise
            return Drawn(sample, seed, dropped="refused")
        sample.text = filters.with_opened_reasoning(reply.text).strip()
        if reply.finish_reason != "stop":
            return Drawn(sample, seed, reply.tokens, dropped="truncated")
        if self.judge is None or not self.judge.covers(problem):
            self.scorer.submit(sample)  # verifiers run while others are sampled
        return Drawn(sample, seed, reply.tokens)

    async def _judge(self, problem: Problem, drawn: Drawn) -> None:
        drawn.verdict = await self.judge.verdict(problem, filters.conclusion(drawn.sample.text), seed=drawn.seed)
        if not drawn.verdict.correct:
            drawn.dropped = "judge_failed" if drawn.verdict.correct is None else "judged_wrong"


def shortfall(sample: Sample, required: Mapping[str, float]) -> str:
    """Why verified scores are not enough; "" if they are. A reward that says nothing of this sample asks for nothing."""
    if any(name in sample.failures for name in required):
        return "verifier_failed"
    found = [sample.rewards[name] >= least for name, least in required.items() if name in sample.rewards]
    if required and not found:
        return "unchecked"
    return "" if all(found) else "wrong"
