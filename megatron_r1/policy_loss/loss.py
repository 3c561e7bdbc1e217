"""From a policy-gradient term to the loss: the sampler's correction, the KL term, the sum over tokens, and what is measured.

Shapes: T packed tokens, N sequences in a pack.
"""

from __future__ import annotations

import torch

from megatron_r1.policy_loss import correction, kl, ratios
from megatron_r1.policy_loss.options import PolicyLossOptions
from megatron_r1.types import LossOutput, Microbatch


def policy_ratio(logprobs_T: torch.Tensor, batch: Microbatch, *, options: PolicyLossOptions) -> torch.Tensor:
    """policy / old at each position, with gradient; 1 where nothing is learned."""
    old_T = ratios.old_logprobs(batch, which=options.old_logprobs)
    return ratios.log_ratio(logprobs_T, old_T, batch, level=options.ratio).exp()


def from_gain(
    gain_T: torch.Tensor,
    ratio_T: torch.Tensor,
    clipped_T: torch.Tensor,
    *,
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    batch: Microbatch,
    options: PolicyLossOptions,
) -> LossOutput:
    """The negated objective, summed over this microbatch; the optimizer step divides by the global count.

    gain_T      what the algorithm maximises at each position, with gradient, finite where nothing is learned
    ratio_T     policy / old, and where the algorithm clipped it, bool; only metrics
    logprobs_T  float32, with gradient, for the KL term
    The count is learned tokens for aggregation "token_mean", else sequences.
    """
    means = {}
    if options.correction != "none":
        weight_T = correction.sampler_weights(batch, options=options)
        gain_T = weight_T * gain_T
        means |= {"policy/correction_weight": weight_T, "policy/correction_masked": weight_T == 0}
    if options.off_policy_delta is not None:
        masked_T = correction.is_off_policy(logprobs_T, batch, delta=options.off_policy_delta)
        gain_T = gain_T.masked_fill(masked_T, 0.0)
        means["policy/off_policy_masked"] = masked_T
    kl_T = torch.zeros_like(gain_T)
    if options.kl_coefficient:
        kl_T = kl.penalty(logprobs_T, batch, options=options)
    objective_T = (gain_T - options.kl_coefficient * kl_T) * batch.loss_mask_T
    total, count = _total(objective_T, batch, options=options)
    loss_sum = -total
    ratio_T = ratio_T.detach()
    means |= {"policy/kl": kl_T.detach(), "policy/entropy": entropy_T, "policy/ratio": ratio_T, "policy/clip_share": clipped_T}
    # unbounded without a dual clip: watch its tail
    maxima = {"policy/ratio_max_negative": ratio_T.where(batch.advantages_T < 0, 0.0)}
    if batch.old_logprobs_T is not None and batch.sampler_logprobs_T is not None:
        gap_T = (batch.old_logprobs_T - batch.sampler_logprobs_T).abs()  # same weights, two engines
        means["sync/logprob_gap"] = maxima["sync/logprob_gap_max"] = gap_T
    sums, largest = _measure(means, maxima, batch)
    sums["policy/loss"] = (float(loss_sum.detach()), float(count))
    return LossOutput(loss_sum, count, sums, largest)


def _total(objective_T: torch.Tensor, batch: Microbatch, *, options: PolicyLossOptions) -> tuple[torch.Tensor, int]:
    """The sum over this microbatch and its share of the global denominator."""
    tokens_N = ratios.sum_by_sequence(batch.loss_mask_T, batch)
    if options.aggregation == "token_mean":
        return objective_T.sum(), int(tokens_N.sum())
    if options.aggregation == "constant":
        return objective_T.sum() / options.constant_tokens, batch.num_sequences
    return (ratios.sum_by_sequence(objective_T, batch) / tokens_N.clamp(min=1)).sum(), batch.num_sequences


@torch.no_grad()
def _measure(
    means: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor], batch: Microbatch
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """(sum, tokens) and maximum over this microbatch's learned tokens, read back from the device in one transfer."""
    learned_T = batch.loss_mask_T > 0
    sums = [value_T.float().where(learned_T, 0.0).sum() for value_T in means.values()]
    largest = [value_T.where(learned_T, 0.0).max() for value_T in maxima.values()]
    *numbers, tokens = torch.stack([*sums, *largest, learned_T.sum().float()]).tolist()
    return {name: (value, tokens) for name, value in zip(means, numbers)}, dict(zip(maxima, numbers[len(means) :]))
