"""Estimates of KL(policy || reference) from one sampled token. With r = policy / old and d = log reference - log policy:

    k1           -d                    http://joschu.net/blog/kl-approx.html (Schulman, 2020)
    k2           d^2 / 2               the same
    k3           exp(d) - d - 1        the same; R1's (Nature 645, equation 2): not negative, and unbiased in value
    k3_unbiased  r (exp(d) - d - 1)    DeepSeek-V3.2 (arXiv 2512.02556): unbiased in its gradient too, which is -r d and does
                                       not explode where the policy is far below the reference

Their mean gradients on policy: k2 and k3_unbiased the divergence's, k3 that of KL(reference || policy), k1 0. k3_unbiased keeps
its own on samples of `old`.
"""

from __future__ import annotations

import torch

from megatron_r1.policy_loss import ratios
from megatron_r1.policy_loss.options import PolicyLossOptions
from megatron_r1.types import Microbatch


def penalty(logprobs_T: torch.Tensor, batch: Microbatch, *, options: PolicyLossOptions) -> torch.Tensor:
    """The estimate at each learned position, with gradient, 0 elsewhere; of whole outputs for ratio "sequence"."""
    assert batch.ref_logprobs_T is not None, f"{options.kl_coefficient=} needs reference log-probs"
    level = "sequence" if options.ratio == "sequence" else "token"
    d_T = -ratios.log_ratio(logprobs_T, batch.ref_logprobs_T, batch, level=level)
    if options.kl_estimator == "k1":
        return -d_T
    if options.kl_estimator == "k2":
        return d_T.square() / 2
    k3_T = torch.expm1(d_T) - d_T  # expm1 keeps it exact near 0
    if options.kl_estimator == "k3":
        return k3_T
    old_T = ratios.old_logprobs(batch, which=options.old_logprobs)
    return ratios.log_ratio(logprobs_T, old_T, batch, level=level).exp() * k3_T
