"""Supervised fine-tuning on conversations: R1's cold start, with loss on the assistant's tokens alone.

    batch_size conversations -> tokens and masks -> packed microbatches -> one optimizer step

A conversation longer than chunk_tokens is left out: R1 trains with a context of so many (arXiv 2501.12948v2, B.4.2).
The MTP layer is trained here, with `model.mtp_loss_scale`; RL leaves it alone.
"""

from __future__ import annotations

from megatron_r1 import data
from megatron_r1.algorithms import sft
from megatron_r1.config_stages import SFTConfig
from megatron_r1.conversations import Batches, Conversations, Tokenized
from megatron_r1.metrics import Stopwatch
from megatron_r1.stages import common


def main(config: SFTConfig) -> None:
    """Train for `config.steps` optimizer steps, or until a signal asks to save and end."""
    parts = common.make(config, steps=config.steps, train_mtp=config.model.mtp_loss_scale > 0)
    policy, metrics = parts.policy, parts.metrics
    dataset = data.Dataset(Tokenized(Conversations(config.data.conversations), parts.chat), seed=config.run.seed)
    batches = Batches(dataset, count=config.batch_size, longest=config.chunk_tokens)
    if not common.resume(config, parts, batches) and config.evaluation.problems and config.evaluation.at_start:
        metrics.log(0, common.held_out_record(config, parts))

    while policy.step < config.steps and not parts.stop.agreed():
        parts.watchdog.feed()
        before, watch = policy.step, Stopwatch()
        sequences = batches.take()
        with watch.phase("train"):
            record = policy.train_step(common.packed(policy, sequences, chunk_tokens=config.chunk_tokens), sft.loss)
        record |= watch.record()
        record |= {"data/left_out": float(batches.left_out)} if batches.left_out else {}
        record["perf/tokens_per_second"] = sum(len(s.ids) for s in sequences) / record["time/step"]
        is_last = policy.step >= config.steps
        if common.is_due(config.evaluation.every, policy.step, before) or (is_last and config.evaluation.at_end):
            record |= common.held_out_record(config, parts) if config.evaluation.problems else {}
        metrics.log(policy.step, record, console=is_last or policy.step % config.logging.console_every == 0)
        if common.is_due(config.checkpoint.every, policy.step, before):
            common.save(config, parts, batches)
    common.finish(config, parts, batches, done=policy.step >= config.steps)
