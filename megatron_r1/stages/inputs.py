"""What the stages make of the config without Megatron, so that evaluation runs where there is none."""

from __future__ import annotations

from pathlib import Path

from megatron_r1 import cost, data
from megatron_r1.config_stages import GRPOConfig, StageConfig
from megatron_r1.metrics import Metrics
from megatron_r1.mixture import Mixture, load_general
from megatron_r1.problem import Problem
from megatron_r1.rollout.engine import SamplingParams
from megatron_r1.verifying.scoring import Scorer


def load_problems(config: StageConfig) -> tuple[Mixture, list[Problem]]:
    """The problems to train on, with their cursor, and those held out."""
    d, seed = config.data, config.run.seed
    problems = data.load_problems(**d.problems(), seed=seed)
    train, held_out = data.split_held_out(problems, d.held_out, seed=seed)
    reasoning = data.Dataset(train, seed=seed)
    if not isinstance(config, GRPOConfig) or not (g := config.general).jsonl:
        return Mixture(reasoning), held_out
    general = data.Dataset(load_general(g.jsonl, first_id=len(problems)), seed=seed)
    return Mixture(reasoning, general, general_count=round(g.share * config.batch.problems), from_step=g.from_step), held_out


def make_scorer(config: StageConfig) -> Scorer:
    """The verifiers' pool."""
    r = config.rewards
    return Scorer(r.weights, by_source=r.by_source, workers=r.workers, timeout_seconds=r.timeout_seconds, options=r.options)


def make_metrics(config: StageConfig, *, steps: int) -> Metrics:
    """The log of a stage without a trainer: its servers alone cost something."""
    meter = cost.Meter(cost.devices(config.model_dump(), trainer=False, rollouts=True), config.run.gpu_hour_price)
    return Metrics(Path(config.run.dir), steps=steps, tensorboard=config.logging.tensorboard, meter=meter)


def evaluation_sampling(config: StageConfig, *, eos_id: int) -> SamplingParams:
    """How evaluation samples."""
    e = config.evaluation
    tokens = e.max_tokens or config.sampling.max_tokens
    return SamplingParams(max_tokens=tokens, temperature=e.temperature, top_p=e.top_p, n=e.samples, stop_token_ids=(eos_id,))
