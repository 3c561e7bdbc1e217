"""The plain data that flows between the phases of a step.

Legend of shape suffixes: P problems, G completions a problem, T packed tokens, N sequences in a pack.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_r1.problem import Conversation, Problem

__all__ = ["Conversation", "LossOutput", "Microbatch", "Problem", "Sample"]


@dataclass
class Sample:
    """One completion of one problem, as the rollout engine returned it and as the step then annotates it."""

    problem: Problem
    group_index: int  # 0 .. G-1 within the problem's group
    prompt_ids: list[int]
    completion_ids: list[int]  # includes the stop token when finish_reason == "stop"
    sampler_logprobs: list[float]  # processed log-prob of every completion token, same length as completion_ids
    finish_reason: Literal["stop", "length"]
    weight_version: int  # policy version of the weights that sampled it (the oldest, where several did)
    text: str = ""  # decoded completion, without special tokens
    rewards: dict[str, float] = field(default_factory=dict)  # component -> unweighted score
    failures: dict[str, str] = field(default_factory=dict)  # component -> why its verifier failed
    reward: float = 0.0  # weighted sum of the components; NaN where a component that counts has failed
    advantage: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass
class Microbatch:
    """N sequences packed into one row of T tokens (thd), padded at the end to a common T.

    Position t predicts token t+1 of its own sequence: `labels_T[t]` is that token, and `loss_mask_T[t]` is 1.0 where
    the label is a token to learn (a completion or assistant token). The last position of a sequence and all padding
    have mask 0. Padding forms one trailing sequence of its own, counted in `cu_seqlens`, not in N; under context parallelism each
    sequence ends with padding too, up to the multiple that its ranks divide.
    """

    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, restarts at 0 with each sequence
    loss_mask_T: torch.Tensor  # float32
    sequence_T: torch.Tensor  # int64, index of the sequence each position belongs to (0 .. N-1; N for padding)
    cu_seqlens: torch.Tensor  # int32, [N + 1] or [N + 2] with the padding's own sequence
    last_N: torch.Tensor  # int64, the position of each sequence's last token
    num_sequences: int  # N
    indices: list[int]  # where each sequence came from in the list that was packed
    advantages_T: torch.Tensor | None = None  # float32, the sequence's advantage at each of its positions
    sampler_logprobs_T: torch.Tensor | None = None  # float32, 0 where loss_mask is 0
    old_logprobs_T: torch.Tensor | None = None  # float32, filled by Policy.attach_logprobs
    ref_logprobs_T: torch.Tensor | None = None  # float32, filled by Policy.attach_logprobs


@dataclass
class LossOutput:
    """What an algorithm's loss returns for one microbatch; the optimizer step divides by the global count."""

    loss_sum: torch.Tensor  # scalar with grad: the sum over this microbatch
    count: int  # this microbatch's share of the global denominator (sequences or tokens)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)  # metric -> (weighted sum, weight)
    maxima: dict[str, float] = field(default_factory=dict)  # metric -> maximum
