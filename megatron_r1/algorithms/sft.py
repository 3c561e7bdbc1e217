"""Supervised fine-tuning: cross entropy, averaged over all assistant tokens of the optimizer step."""

from __future__ import annotations

import torch

from megatron_r1.types import LossOutput, Microbatch


def loss(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: Microbatch) -> LossOutput:
    """The negated log-likelihood of the learned tokens, summed over this microbatch; the count is their number.

    logprobs_T  log-prob of labels_T under the policy, with grad
    entropy_T   entropy of the policy at each position; only a metric
    """
    learned_T = batch.loss_mask_T > 0
    loss_sum = -logprobs_T.float().where(learned_T, 0.0).sum()
    entropy = entropy_T.detach().float().where(learned_T, 0.0).sum()
    value, entropy_sum, count = torch.stack([loss_sum.detach(), entropy, learned_T.sum().float()]).tolist()
    return LossOutput(loss_sum, int(count), {"policy/loss": (value, count), "policy/entropy": (entropy_sum, count)})
