"""Ratios of two policies' probabilities at each position of a pack, of tokens or of the outputs they are in.

Shapes: T packed tokens, N sequences in a pack.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_r1.types import Microbatch

# exp(20) is 5e8: past it a ratio says only "broken"; unclamped it overflows float32 and one token turns the step into NaN.
MAX_LOG_RATIO = 20.0


def sum_by_sequence(values_T: torch.Tensor, batch: Microbatch) -> torch.Tensor:
    """Sums over each sequence, [N + 1]; the last row is the padding's."""
    sums = torch.zeros(batch.num_sequences + 1, dtype=values_T.dtype, device=values_T.device)
    return sums.index_add(0, batch.sequence_T, values_T)


def log_ratio(
    logprobs_T: torch.Tensor, other_T: torch.Tensor, batch: Microbatch, *, level: Literal["token", "sequence", "geometric"]
) -> torch.Tensor:
    """log(policy / other), 0 where nothing is learned.

    level  "token", or of whole outputs, at each of their positions: "sequence" their sum over tokens, "geometric" their mean
    """
    # where and not a product: what stands at unlearned positions may be inf, and inf * 0 is NaN
    log_ratio_T = torch.where(batch.loss_mask_T > 0, logprobs_T - other_T, 0.0)
    if level != "token":
        sums_N = sum_by_sequence(log_ratio_T, batch)
        if level == "geometric":
            sums_N = sums_N / sum_by_sequence(batch.loss_mask_T, batch).clamp(min=1)
        log_ratio_T = sums_N[batch.sequence_T]
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def old_logprobs(batch: Microbatch, *, which: Literal["trainer", "sampler"]) -> torch.Tensor:
    """pi_old's log-probs of the learned tokens, by the trainer or by the rollout engine."""
    old_T = batch.old_logprobs_T if which == "trainer" else batch.sampler_logprobs_T
    assert old_T is not None, f"the {which}'s old log-probs are missing from the batch: {old_T=}"
    return old_T
