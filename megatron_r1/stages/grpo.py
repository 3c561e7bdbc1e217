"""Reinforcement learning with rule rewards: the paper's loop, one rollout and its optimizer steps at a time.

    sync weights -> sample G completions of each problem -> verify -> advantages within each group
    -> old and reference log-probs -> minibatches of random outputs, one optimizer step each
    -> every 400 steps the policy becomes the reference                 (Nature 645, 633; Methods)

Every rank runs this file; whatever touches `policy` or `fleet` is collective.
"""

from __future__ import annotations

import random
from functools import partial

import torch

from megatron_r1 import plugins, selection, shaping, summary
from megatron_r1.config_stages import GRPOConfig
from megatron_r1.mcore.policy import Policy
from megatron_r1.metrics import Record, Stopwatch
from megatron_r1.packing import TokenSequence
from megatron_r1.rollout.engine import SamplingParams
from megatron_r1.stages import common
from megatron_r1.types import Microbatch, Sample


def main(config: GRPOConfig) -> None:
    """Train until `config.steps` optimizer steps are done, or a signal asks to save and end."""
    algorithm = plugins.load("algorithms", config.algorithm.name)
    options = plugins.options(algorithm.Options, config.algorithm.options, where="algorithm.options")
    loss, temperature = partial(algorithm.loss, options=options), config.sampling.temperature
    parts = common.make(config, steps=config.steps)
    policy, problems, metrics = parts.policy, parts.problems, parts.metrics
    if not common.resume(config, parts, problems):
        policy.refresh_reference()
        if config.evaluation.problems and config.evaluation.at_start:
            metrics.log(0, common.held_out_record(config, parts))

    while policy.step < config.steps:
        before, watch = policy.step, Stopwatch()
        cursor = problems.state_dict()
        with watch.phase("sync"):
            parts.fleet.sync()
        parts.watchdog.feed()
        samples, sampled = roll_out(config, parts, watch=watch)
        if not samples:
            problems.load_state_dict(cursor)  # this rollout is not trained on; a resumed run samples it again
            break

        rewards_PG = torch.tensor([s.reward for s in samples]).view(config.batch.problems, -1)
        advantages_PG = algorithm.advantages(rewards_PG, options=options)
        for sample, advantage in zip(samples, advantages_PG.flatten().tolist(), strict=True):
            sample.advantage = advantage

        with watch.phase("logprobs"):
            minibatches = split(config, policy, samples)
            every = [microbatch for minibatch in minibatches for microbatch in minibatch]
            if options.old_logprobs == "trainer":
                policy.attach_logprobs(every, "old", temperature=temperature)
            if options.kl_coefficient:
                policy.attach_logprobs(every, "ref", temperature=temperature)
        with watch.phase("train"):
            turns = minibatches * config.batch.inner_epochs
            left = config.steps - policy.step  # R1's second stage ends with a quarter of a rollout: 1,700 = 106 x 16 + 4
            updates = [policy.train_step(minibatch, loss, temperature=temperature) for minibatch in turns[:left]]
        if common.is_due(config.reference_refresh_steps, policy.step, before):
            policy.refresh_reference()

        record = step_record(config, parts, samples, sampled=sampled, watch=watch)
        if common.is_due(config.evaluation.every, policy.step, before) or is_last(config, policy.step):
            record |= common.held_out_record(config, parts) if config.evaluation.problems else {}
        log(config, parts, updates, record=record, samples=samples)
        if common.is_due(config.checkpoint.every, policy.step, before):
            common.save(config, parts, problems)
    common.finish(config, parts, problems, done=policy.step >= config.steps)


def roll_out(config: GRPOConfig, parts: common.Parts, *, watch: Stopwatch) -> tuple[list[Sample], list[Sample]]:
    """The scored samples to train on, `batch.problems` groups, and all that were sampled; neither on a stop. Collective.

    With dynamic sampling, each further rollout samples as many problems as there are groups without a signal.
    """
    how, groups = sampling(config, parts), []
    for turn in range(1 + config.batch.dynamic_sampling):
        count = selection.missing(groups, config.batch.problems)
        if count == 0:
            break
        parts.watchdog.feed()
        asked = parts.problems.take(count, step=parts.policy.step)  # where an epoch ends, some may have been asked before
        samples = common.roll_out(parts, asked, how, watch=watch, turn=turn, stop=parts.stop.is_noted)
        if parts.stop.agreed():
            return [], []
        groups += [samples[start : start + how.n] for start in range(0, len(samples), how.n)]
    chosen, sampled = selection.choose(groups, config.batch.problems), [sample for group in groups for sample in group]
    shaping.penalise_overlong(sampled, max_tokens=how.max_tokens, overlong_tokens=config.batch.overlong_tokens)
    return chosen, sampled


def is_last(config: GRPOConfig, step: int) -> bool:
    """Whether the run ends here and is to be evaluated."""
    return step >= config.steps and config.evaluation.at_end


def sampling(config: GRPOConfig, parts: common.Parts) -> SamplingParams:
    """How this rollout samples: the length limit follows its schedule in optimizer steps."""
    s, step = config.sampling, parts.policy.step
    reached = [tokens for since, tokens in sorted(s.max_tokens_schedule) if step >= since]
    return SamplingParams(
        max_tokens=reached[-1] if reached else s.max_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        n=config.batch.completions,
        stop_token_ids=(parts.chat.eos_id,),
    )


def split(config: GRPOConfig, policy: Policy, samples: list[Sample]) -> list[list[Microbatch]]:
    """The rollout's outputs at random into minibatches, groups broken up, and this rank's microbatches of each.

    The order depends on seed and step alone, so it is the same on every rank, in every layout and after a resume.
    """
    order = list(range(len(samples)))
    random.Random(f"minibatches {config.run.seed} {policy.step}").shuffle(order)
    size = len(samples) // config.batch.minibatches
    shuffled = [TokenSequence.from_sample(samples[i], mask_truncated=config.batch.mask_truncated) for i in order]
    return [
        common.packed(policy, shuffled[start : start + size], chunk_tokens=config.batch.chunk_tokens)
        for start in range(0, len(shuffled), size)
    ]


def step_record(config: GRPOConfig, parts: common.Parts, samples: list[Sample], *, sampled: list[Sample], watch: Stopwatch) -> Record:
    """The figures of one rollout: rewards and lengths of all that was sampled, the sync's canary, seconds a phase, tokens a second."""
    judges = config.evaluation.judges
    record = summary.reward_record(sampled, judges=judges) | watch.record()
    record |= summary.rollout_record(sampled, version=parts.fleet.version, judges=judges)
    if config.batch.dynamic_sampling:
        record["rollout/dropped"] = 1 - len(samples) / len(sampled)
    tokens = sum(s.length for s in samples)
    record["sync/canary_gap"] = parts.fleet.canary_gap
    record["perf/tokens_per_second"] = tokens / record["time/step"]
    record["perf/rollout_tokens_per_second"] = sum(len(s.completion_ids) for s in sampled) / record["time/rollout"]
    record["perf/train_tokens_per_second"] = tokens / record["time/train"]
    return record


def log(config: GRPOConfig, parts: common.Parts, updates: list[Record], *, record: Record, samples: list[Sample]) -> None:
    """Every optimizer step's figures; the rollout's join those of its last step, which alone is printed."""
    first = parts.policy.step - len(updates) + 1
    for step, update in enumerate(updates[:-1], first):
        parts.metrics.log(step, update, console=False)
    parts.metrics.log(parts.policy.step, updates[-1] | record)
    if count := config.logging.completions:
        page, rows = summary.completions_page(samples, count), summary.completion_rows(samples, count)
        parts.metrics.text(parts.policy.step, "completions", page, rows=rows)
