"""Prompts to samples: what every run that samples shares, with a trainer or without. Imports no Megatron."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_r1.rollout.engine import Completion, EngineError, EngineLost, Request, RolloutEngine, SamplingParams, request_seed
from megatron_r1.types import Problem, Sample

MAX_RECOVERIES = 3  # of one generate call, before the run stops


def to_sample(problem: Problem, prompt_ids: list[int], completion: Completion, *, index: int) -> Sample:
    """A completion with its problem."""
    return Sample(
        problem=problem,
        group_index=index,
        prompt_ids=prompt_ids,
        completion_ids=completion.token_ids,
        sampler_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        weight_version=completion.weight_version,
    )


def sample_groups(
    engine: RolloutEngine, prompts: Sequence[tuple[Problem, list[int]]], sampling: SamplingParams, *, seed: int, restart_seconds: float
) -> Iterator[list[Sample]]:
    """`sampling.n` completions of each prompt, a prompt at a time as it finishes, by servers that hold their own weights.

    What servers lose is sampled again, to the same tokens, once they are back within `restart_seconds`.
    """
    missing = {i: Request(i, ids, seed=request_seed(seed, problem.id)) for i, (problem, ids) in enumerate(prompts)}
    for _ in range(MAX_RECOVERIES + 1):
        try:
            for key, completions in engine.generate(list(missing.values()), sampling):
                problem, ids = prompts[key]
                del missing[key]
                yield [to_sample(problem, ids, c, index=i) for i, c in enumerate(completions)]
        except EngineLost:
            engine.wait_ready(restart_seconds)
        if not missing:
            return
    raise EngineError(f"rollout.urls: servers were lost {MAX_RECOVERIES + 1} times in one run; see their logs in <run.dir>/logs")
