"""Reward models for R1's second RL stage: the policy's decoder with a scalar head, trained on judged answers.

    batch_size pairs (helpful) or responses (safety) -> packed microbatches -> the score of each last token
    -> Bradley-Terry or binary cross entropy -> one optimizer step          (Nature 645, 633; Methods)

The exported folder is what `vllm serve` and transformers know as a sequence classifier of one label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_r1 import data
from megatron_r1.algorithms import reward_model
from megatron_r1.chat import Chat
from megatron_r1.config_stages import RewardModelConfig
from megatron_r1.mcore import distributed
from megatron_r1.mcore.policy import Policy, ScoreLoss
from megatron_r1.metrics import Record, Stopwatch
from megatron_r1.packing import TokenSequence, plan
from megatron_r1.preferences import load_preferences
from megatron_r1.stages import common
from megatron_r1.types import Microbatch


@dataclass(frozen=True)
class Example:
    """Token ids of a pair, the chosen first, or of one response and its label."""

    ids: list[list[int]]
    label: float


def main(config: RewardModelConfig) -> None:
    """Train for `config.epochs` over the examples, or until a signal asks to save and end."""
    train, held_out, too_long = load(config)
    steps = config.epochs * (len(train) // config.batch_size)
    parts = common.make(config, steps=steps)
    policy, metrics = parts.policy, parts.metrics
    dataset = data.Dataset(train, seed=config.run.seed)
    if too_long:
        common.say(f"{too_long} examples have more than max_length = {config.max_length} tokens and are left out")
    if not common.resume(config, parts, dataset) and held_out and config.evaluation.at_start:
        metrics.log(0, held_out_record(config, policy, held_out))

    while policy.step < steps and not parts.stop.agreed():
        parts.watchdog.feed()
        before, watch = policy.step, Stopwatch()
        examples = dataset.take(config.batch_size)
        with watch.phase("train"):
            record = policy.train_scores(packed(config, policy, examples), loss(config, examples))
        record |= watch.record()
        record["perf/tokens_per_second"] = sum(len(ids) for e in examples for ids in e.ids) / record["time/step"]
        is_last = policy.step >= steps
        if common.is_due(config.evaluation.every, policy.step, before) or (is_last and config.evaluation.at_end):
            record |= held_out_record(config, policy, held_out) if held_out else {}
        metrics.log(policy.step, record, console=is_last or policy.step % config.logging.console_every == 0)
        if common.is_due(config.checkpoint.every, policy.step, before):
            common.save(config, parts, dataset)
    common.finish(config, parts, dataset, done=policy.step >= steps)


def load(config: RewardModelConfig) -> tuple[list[Example], list[Example], int]:
    """The examples to train on, those held out, and how many were too long for either."""
    chat = Chat(config.model.path, chat_template=config.chat_template)
    judged = load_preferences(config.preferences, config.kind)
    every = [Example([chat.scored_ids(c) for c in j.conversations], j.label) for j in judged]
    fitting = [example for example in every if max(map(len, example.ids)) <= config.max_length]
    too_long, held = len(every) - len(fitting), config.data.held_out
    if len(fitting) - held < config.batch_size:
        raise ValueError(
            f"batch_size = {config.batch_size}: of the {len(every)} examples in {config.preferences}, {too_long} are too long "
            f"and {held} held out, which leaves too few to train on; lower it"
        )
    train, held_out = data.split_held_out(fitting, held, seed=config.run.seed)
    return train, held_out, too_long


def packed(config: RewardModelConfig, policy: Policy, examples: list[Example]) -> list[Microbatch]:
    """This data-parallel rank's microbatches; a pair stays together, for its loss is of both scores."""
    lengths = [sum(map(len, example.ids)) for example in examples]
    chunks = plan(lengths, chunk_tokens=config.chunk_tokens, num_groups=distributed.dp_size(), count_multiple=policy.count_multiple)
    sequences = [TokenSequence(ids=ids, learned=[0] * len(ids)) for example in examples for ids in example.ids]
    answers = len(examples[0].ids)
    members = [[answers * i + k for i in chunk for k in range(answers)] for chunk in chunks[distributed.dp_rank()]]
    return policy.pack(sequences, members)


def loss(config: RewardModelConfig, examples: list[Example]) -> ScoreLoss:
    """The loss of these examples' scores."""
    if config.kind == "pairwise":
        return reward_model.pairwise
    return partial(reward_model.pointwise, labels=[example.label for example in examples])


def held_out_record(config: RewardModelConfig, policy: Policy, held_out: list[Example]) -> Record:
    """eval/ figures of the held-out examples, and the seconds they took. Collective."""
    watch = Stopwatch()
    found = policy.scores(packed(config, policy, held_out), loss(config, held_out))
    record = {name.replace("policy/", "eval/"): value for name, value in found.items()}
    return record | {"time/evaluation": watch.record()["time/step"]}
