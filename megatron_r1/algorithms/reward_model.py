"""The losses of R1's reward models (Nature 645, 633; Methods), which the paper names without formulas.

    helpful, of pairs         -log sigmoid(score of the chosen - score of the rejected)      Bradley-Terry
    safety, of single answers -log sigmoid(score) if safe, -log sigmoid(-score) if not       binary cross entropy

Both are means over all pairs, or answers, of the optimizer step. Legend: N sequences in a pack, M = N / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid

from megatron_r1.types import LossOutput, Microbatch


def pairwise(scores_N: torch.Tensor, batch: Microbatch) -> LossOutput:
    """Sequences 2 i and 2 i + 1 of the microbatch are a pair, the chosen first; the count is the number of pairs.

    Reports how often the chosen one has the higher score, by how much on average, and the mean score.
    """
    margin_M = scores_N[0::2] - scores_N[1::2]
    return _output(-logsigmoid(margin_M).sum(), scores_N, margin_M)


def pointwise(scores_N: torch.Tensor, batch: Microbatch, *, labels: Sequence[float]) -> LossOutput:
    """labels: 1.0 safe, 0.0 unsafe, of all sequences that were packed (`batch.indices` points there); the count is that of sequences.

    Reports how often the score's sign is right, the mean score towards the right side, and the mean score.
    """
    sign_N = torch.tensor([2 * labels[i] - 1 for i in batch.indices], dtype=scores_N.dtype, device=scores_N.device)
    margin_N = sign_N * scores_N
    return _output(-logsigmoid(margin_N).sum(), scores_N, margin_N)


def _output(loss_sum: torch.Tensor, scores_N: torch.Tensor, margin_M: torch.Tensor) -> LossOutput:
    sums = torch.stack([loss_sum, margin_M.sum(), scores_N.sum(), (margin_M > 0).sum()]).detach().tolist()
    count, sequences = len(margin_M), len(scores_N)
    names = {"policy/loss": count, "policy/margin": count, "policy/score": sequences, "policy/accuracy": count}
    return LossOutput(loss_sum, count, {name: (value, weight) for value, (name, weight) in zip(sums, names.items(), strict=True)})
