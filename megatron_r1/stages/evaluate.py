"""pass@1 of a model on the held-out problems of `[data]`, sampled by the servers with the trainer's weights."""

from __future__ import annotations

from megatron_r1.config_stages import EvalConfig
from megatron_r1.stages import common


def main(config: EvalConfig) -> None:
    """Evaluate once and log it as step 0."""
    parts = common.make(config, steps=0)
    parts.metrics.log(0, common.held_out_record(config, parts))
    common.close(parts)
