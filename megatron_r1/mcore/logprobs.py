"""Log-probs and entropy of the policy from logits that tensor parallelism splits over the vocabulary.

Legend: T packed tokens, M of them with a label to learn, V vocabulary shard of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

ENTROPY_ROWS = 1024  # rows at a time, so that the copies the entropy needs stay small beside the logits


def token_logprobs(
    logits: torch.Tensor, labels_T: torch.Tensor, *, mask_T: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each label and entropy of each distribution, float32 [T], both 0 where mask_T is 0.

    logits [1, T, V] as the last pipeline stage returns them. They are divided by the sampling temperature, so that the
    policy is the distribution that was sampled from. The log-probs carry a gradient, the entropy does not.

    Only rows with a label go through the softmax: the others would get a gradient of exactly 0 for the same cost.
    """
    rows_M = mask_T.nonzero().squeeze(1)
    logits_MV = logits[0].index_select(0, rows_M).float()
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    entropy_M = _entropy(logits_MV)
    # Megatron's function overwrites its input where that is float32 already: index_select's copy, no longer needed
    logprobs_M = -vocab_parallel_cross_entropy(logits_MV, labels_T.index_select(0, rows_M))
    zeros_T = torch.zeros(mask_T.shape, dtype=torch.float32, device=logits.device)
    return zeros_T.index_copy(0, rows_M, logprobs_M), zeros_T.index_copy(0, rows_M, entropy_M)


@torch.no_grad()
def _entropy(logits_MV: torch.Tensor) -> torch.Tensor:
    """log Z - E[logit], both over the whole vocabulary."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = []
    for rows in logits_MV.split(ENTROPY_ROWS):
        top = rows.amax(dim=-1, keepdim=True)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        shifted = rows - top
        weights = shifted.exp()
        sums = torch.stack([weights.sum(-1), (weights * shifted).sum(-1)])
        dist.all_reduce(sums, group=group)
        parts.append(sums[0].log() - sums[1] / sums[0])
    return torch.cat(parts)
