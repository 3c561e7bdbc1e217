"""What the stages make of the config without Megatron, so that evaluation runs where there is none."""

from __future__ import annotations

from megatron_r1 import data
from megatron_r1.config_stages import StageConfig
from megatron_r1.problem import Problem
from megatron_r1.rollout.engine import SamplingParams
from megatron_r1.scoring import Scorer


def load_problems(config: StageConfig) -> tuple[data.Dataset[Problem], list[Problem]]:
    """The problems to train on, with their cursor, and those held out."""
    d = config.data
    fields = d.model_dump(exclude={"held_out", "conversations"})
    problems = data.load_problems(**fields, seed=config.run.seed)
    train, held_out = data.split_held_out(problems, d.held_out, seed=config.run.seed)
    return data.Dataset(train, seed=config.run.seed), held_out


def make_scorer(config: StageConfig) -> Scorer:
    """The verifiers' pool."""
    r = config.rewards
    return Scorer(r.weights, workers=r.workers, timeout_seconds=r.timeout_seconds, options=r.options)


def evaluation_sampling(config: StageConfig, *, eos_id: int) -> SamplingParams:
    """How evaluation samples."""
    e = config.evaluation
    tokens = e.max_tokens or config.sampling.max_tokens
    return SamplingParams(max_tokens=tokens, temperature=e.temperature, top_p=e.top_p, n=e.samples, stop_token_ids=(eos_id,))
