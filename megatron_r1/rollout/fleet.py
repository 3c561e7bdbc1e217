"""The trainer's side of the rollouts: every rank makes each call, one rank of each model-parallel group talks to the servers.

The weights are sent by the ranks that `scope` names. The leader of each model-parallel group samples and verifies the group's share of
the problems; then every rank is given all samples. A server that died and came back is given the weights again and the requests it lost: a
request's seed is its own, so what it samples does not depend on when, where or beside what it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_r1.mcore import distributed
from megatron_r1.rollout.engine import EngineError, EngineLost, Request, RolloutEngine, SamplingParams, never, request_seed
from megatron_r1.rollout.placement import Colocated, Dedicated
from megatron_r1.rollout.sampling import MAX_RECOVERIES, to_sample
from megatron_r1.types import Microbatch, Problem, Sample
from megatron_r1.weights.division import Division

if TYPE_CHECKING:
    from megatron_r1.weights.exporter import Scope


class Weights(Protocol):
    """All weights by their Hugging Face names, on the ranks that send them; a collective to iterate, to the end."""

    division: Division

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class WeightOwner(Protocol):
    """What the fleet needs of the policy."""

    version: int
    count_multiple: int  # of microbatches in one call

    def hf_weights(self, scope: Scope) -> Weights: ...

    def attach_logprobs(self, microbatches: list[Microbatch], which: str, *, temperature: float) -> None: ...


class Fleet:
    """All servers as one engine. `canary` is one sequence of fixed tokens on whose log-probs both sides must agree."""

    def __init__(
        self,
        engine: RolloutEngine,
        policy: WeightOwner,
        *,
        canary: Microbatch,
        tolerance: float,
        seed: int,
        placement: Dedicated | Colocated | None = None,
        scope: Scope = "all",
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.canary = canary
        self.tolerance = tolerance
        self.seed = seed
        self.scope = scope  # of the weights: who sends what
        self.placement = placement or Dedicated()
        self.has_weights = False  # whether the servers hold those of `version`
        self.version = -1  # of the weights the servers hold; -1 = none of ours
        self.canary_gap = 0.0  # max abs log-prob difference at the last sync

    def sync(self) -> None:
        """Send the policy's weights if the servers hold others, and let the canary check what arrived. Collective."""
        if self.has_weights and self.version == self.policy.version:
            return
        for _ in range(MAX_RECOVERIES + 1):
            self.has_weights = not distributed.any_rank(self._try_to_sync())
            if self.has_weights:
                self.version = self.policy.version
                return
        raise EngineError(f"rollout.urls: servers were lost {MAX_RECOVERIES + 1} times in one sync; see their logs in <run.dir>/logs")

    def _try_to_sync(self) -> bool:
        """Send and check once; whether this rank saw a server die on the way."""
        self.placement.sending()
        weights = self.policy.hf_weights(self.scope)
        stream, lost = iter(weights), False
        try:
            self.engine.update_weights(stream, self.policy.version, division=weights.division)
        except EngineLost:
            lost = True
            for _ in stream:  # with the other ranks
                pass
        self.policy.attach_logprobs([self.canary] * self.policy.count_multiple, "old", temperature=1.0)
        self.placement.sampling()
        if distributed.rank() == 0 and not lost:
            length = int(self.canary.last_N[0]) + 1
            tokens = self.canary.tokens_T[:length].tolist()
            logprobs = self.canary.old_logprobs_T[: length - 1].tolist()
            try:
                self.canary_gap = self.engine.canary(tokens, logprobs, tolerance=self.tolerance)
            except EngineLost:
                lost = True
        return lost

    def generate(
        self,
        prompts: Sequence[tuple[Problem, list[int]]],
        sampling: SamplingParams,
        *,
        on_sample: Callable[[Sample], None] = lambda sample: None,
        turn: int = 0,
        stop: Callable[[], bool] = never,
    ) -> list[Sample]:
        """`sampling.n` completions of each of this group's prompts, in the prompts' order; on its leader, else nothing.

        `on_sample` is called as each completion arrives, so that verifiers overlap generation. Once `stop` says so, what has
        not arrived is aborted and left out. With the same weights another `turn` samples others of a prompt. Collective.
        """
        leads = distributed.is_model_parallel_leader()
        requests = {i: Request(i, ids, seed=self._seed_of(problem, turn)) for i, (problem, ids) in enumerate(prompts)} if leads else {}
        done: dict[int, list[Sample]] = {}
        for _ in range(MAX_RECOVERIES + 1):
            self.sync()
            lost = self._collect(requests, sampling, done, prompts=prompts, on_sample=on_sample, stop=stop)
            distributed.together()
            if not distributed.any_rank(lost):
                self.placement.training()
                self.has_weights = self.placement.keeps_weights
                return [sample for i in requests for sample in done.get(i, ())]
            self.has_weights = False  # a server came back empty, so all of them get the weights again
        raise EngineError(f"rollout.urls: servers were lost {MAX_RECOVERIES + 1} times in one rollout; see their logs in <run.dir>/logs")

    def _seed_of(self, problem: Problem, turn: int) -> int:
        return request_seed(self.seed, self.policy.version, problem.id, *([turn] if turn else []))

    def _collect(
        self,
        requests: dict[int, Request],
        sampling: SamplingParams,
        done: dict[int, list[Sample]],
        *,
        prompts: Sequence[tuple[Problem, list[int]]],
        on_sample: Callable[[Sample], None],
        stop: Callable[[], bool],
    ) -> bool:
        """Generate what `done` lacks, into `done`; whether servers were lost on the way."""
        missing = [request for key, request in requests.items() if key not in done]
        try:
            for key, completions in self.engine.generate(missing, sampling, stop=stop) if missing else ():
                problem, prompt_ids = prompts[key]
                done[key] = [to_sample(problem, prompt_ids, c, index=i) for i, c in enumerate(completions)]
                for sample in done[key]:
                    on_sample(sample)
        except EngineLost:
            return True
        return False
