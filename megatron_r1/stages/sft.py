"""Supervised fine-tuning on conversations: R1's cold start, with loss on the assistant's tokens alone.

    batch_size conversations -> tokens and masks -> packed microbatches -> one optimizer step

The MTP layer is trained here, with `model.mtp_loss_scale`; RL leaves it alone.
"""

from __future__ import annotations

from megatron_r1 import data
from megatron_r1.algorithms import sft
from megatron_r1.config_stages import SFTConfig
from megatron_r1.metrics import Stopwatch
from megatron_r1.stages import common


def main(config: SFTConfig) -> None:
    """Train for `config.steps` optimizer steps, or until a signal asks to save and end."""
    parts = common.make(config, steps=config.steps, train_mtp=config.model.mtp_loss_scale > 0)
    policy, metrics = parts.policy, parts.metrics
    conversations = data.load_conversations(config.data.conversations)
    dataset = data.Dataset([parts.chat.sequence(c) for c in conversations], seed=config.run.seed)
    if not common.resume(config, parts, dataset) and config.evaluation.problems and config.evaluation.at_start:
        metrics.log(0, common.held_out_record(config, parts))

    while policy.step < config.steps and not parts.stop.agreed():
        parts.watchdog.feed()
        before, watch = policy.step, Stopwatch()
        sequences = dataset.take(config.batch_size)
        with watch.phase("train"):
            record = policy.train_step(common.packed(policy, sequences, chunk_tokens=config.chunk_tokens), sft.loss)
        record |= watch.record()
        record["perf/tokens_per_second"] = sum(len(s.ids) for s in sequences) / record["time/step"]
        is_last = policy.step >= config.steps
        if common.is_due(config.evaluation.every, policy.step, before) or (is_last and config.evaluation.at_end):
            record |= common.held_out_record(config, parts) if config.evaluation.problems else {}
        metrics.log(policy.step, record, console=is_last or policy.step % config.logging.console_every == 0)
        if common.is_due(config.checkpoint.every, policy.step, before):
            common.save(config, parts, dataset)
    common.finish(config, parts, dataset, done=policy.step >= config.steps)
