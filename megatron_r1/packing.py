"""Packing as DeepSeek-R1 does it (arXiv 2501.12948v2, B.1): sort by length, best-fit into fixed chunks, equal counts over DP.

Worked example: lengths [3, 9, 5, 4, 2, 6], chunk_tokens 10, 2 ranks. Sorted: 9 6 5 4 3 2. Dealt back and forth (0 1 1 0 0 1),
rank 0 gets 9 4 3 and rank 1 gets 6 5 2. Best fit, each into the fullest chunk that still has room:

    rank 0:  [9] [4 3]        rank 1:  [6 2] [5]

    plan([3, 9, 5, 4, 2, 6], chunk_tokens=10, num_groups=2) == [[[1], [3, 0]], [[5, 4], [2]]]

Both ranks have 2 chunks, so both run 2 microbatches; a rank with fewer would split its longest chunk of several sequences.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch

from megatron_r1.types import Microbatch, Sample


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to train on: an SFT conversation or a sampled completion after its prompt."""

    ids: list[int]
    learned: list[int]  # 1 where the token is to be learned (assistant or completion), else 0; same length as ids
    advantage: float | None = None
    sampler_logprobs: list[float] | None = None  # 0.0 where nothing is learned; same length as ids

    @classmethod
    def from_sample(cls, sample: Sample, *, mask_truncated: bool = False) -> TokenSequence:
        """Prompt and completion of a rollout; the completion is learned, unless it was cut and `mask_truncated` says not to."""
        prompt, completion = sample.prompt_ids, sample.completion_ids
        assert len(sample.sampler_logprobs) == len(completion), f"{len(sample.sampler_logprobs)=} {len(completion)=}"
        is_learned = not (mask_truncated and sample.finish_reason == "length")
        return cls(
            ids=prompt + completion,
            learned=[0] * len(prompt) + [int(is_learned)] * len(completion),
            advantage=sample.advantage,
            sampler_logprobs=[0.0] * len(prompt) + (sample.sampler_logprobs if is_learned else [0.0] * len(completion)),
        )


def plan(lengths: Sequence[int], *, chunk_tokens: int, num_groups: int = 1, count_multiple: int = 1) -> list[list[list[int]]]:
    """Which sequences go into which chunk of which data-parallel rank: [rank][chunk] -> indices into `lengths`.

    Every rank gets the same number of chunks, a multiple of `count_multiple` (interleaved pipelines need one of their size);
    a rank with fewer sequences than chunks gets empty ones. Deterministic, so each rank can plan alone.
    Raises ValueError for a sequence longer than a chunk.
    """
    if lengths and max(lengths) > chunk_tokens:
        longest = max(range(len(lengths)), key=lambda i: lengths[i])
        raise ValueError(
            f"chunk_tokens = {chunk_tokens}: sequence {longest} has {lengths[longest]} tokens; "
            f"raise it to at least {lengths[longest]} or limit the sequences' length"
        )
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    dealt: list[list[int]] = [[] for _ in range(num_groups)]
    for turn, index in enumerate(by_length):
        step = turn % (2 * num_groups)  # back and forth, so that no rank always gets the longer one
        dealt[min(step, 2 * num_groups - 1 - step)].append(index)
    groups = [_best_fit(indices, lengths, chunk_tokens=chunk_tokens) for indices in dealt]
    most = max(len(chunks) for chunks in groups)
    count = -(-most // count_multiple) * count_multiple
    return [_split_to_count(chunks, lengths, count=count) for chunks in groups]


def _best_fit(indices: list[int], lengths: Sequence[int], *, chunk_tokens: int) -> list[list[int]]:
    """Longest first, each into the fullest chunk that has room for it."""
    chunks: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (free tokens, chunk), sorted
    for index in indices:
        best = bisect.bisect_left(by_room, (lengths[index], 0))
        if best < len(by_room):
            free, chunk = by_room.pop(best)
        else:
            free, chunk = chunk_tokens, len(chunks)
            chunks.append([])
        chunks[chunk].append(index)
        bisect.insort(by_room, (free - lengths[index], chunk))
    return chunks


def _split_to_count(chunks: list[list[int]], lengths: Sequence[int], *, count: int) -> list[list[int]]:
    """Splits the longest chunk that holds several sequences until there are `count`; then adds empty ones."""
    chunks = list(chunks)
    while len(chunks) < count:
        several = [c for c, members in enumerate(chunks) if len(members) > 1]
        if not several:
            chunks.append([])
            continue
        longest = max(several, key=lambda c: sum(lengths[i] for i in chunks[c]))
        members = chunks[longest]
        chunks[longest] = members[0::2]
        chunks.append(members[1::2])
    return chunks


def pack(
    sequences: Sequence[TokenSequence],
    chunks: list[list[int]],
    *,
    multiple: int = 1,
    sequence_multiple: int = 1,
    pad_to: int | None = None,
) -> list[Microbatch]:
    """One Microbatch a chunk of one rank's plan.

    Each sequence is padded to `sequence_multiple` (context parallelism). T is the chunk's tokens rounded up to `multiple` (a multiple
    of that one; the tensor-parallel size, for sequence parallelism), or exactly `pad_to` where all microbatches need the same T.
    Advantages and sampler log-probs are there if the sequences have them.
    """
    assert multiple % sequence_multiple == 0, f"{multiple=} {sequence_multiple=}"
    sizes = {"multiple": multiple, "sequence_multiple": sequence_multiple, "pad_to": pad_to}
    return [_microbatch([sequences[i] for i in indices], indices, **sizes) for indices in chunks]


def _padded(sequence: TokenSequence, multiple: int) -> TokenSequence:
    """The sequence with tokens that nothing is learned of at its end."""
    extra = -len(sequence.ids) % multiple
    if extra == 0:
        return sequence
    logprobs = None if sequence.sampler_logprobs is None else sequence.sampler_logprobs + [0.0] * extra
    return replace(sequence, ids=sequence.ids + [0] * extra, learned=sequence.learned + [0] * extra, sampler_logprobs=logprobs)


def _microbatch(
    members: list[TokenSequence], indices: list[int], *, multiple: int, sequence_multiple: int, pad_to: int | None
) -> Microbatch:
    last = [len(s.ids) - 1 for s in members]
    members = [_padded(s, sequence_multiple) for s in members]
    lengths = [len(s.ids) for s in members]
    total = sum(lengths)
    width = pad_to if pad_to is not None else max(1, -(-total // multiple)) * multiple
    assert total <= width, f"{total=} {pad_to=}"
    assert width % multiple == 0, f"{pad_to=} {multiple=}"
    padding = width - total
    starts = [0, *accumulate(lengths), *([width] if padding else [])]
    sizes = torch.tensor(lengths + ([padding] if padding else []))

    def flat(lists: list[list], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([*chain.from_iterable(lists), *([0] * padding)], dtype=dtype)

    def at_predictor(flat_T: torch.Tensor) -> torch.Tensor:
        """What belongs to token t + 1 moves to position t, which predicts it; a sequence's last position predicts nothing."""
        flat_T = flat_T.roll(-1)
        flat_T[torch.tensor(starts[1:]) - 1] = 0
        return flat_T

    tokens_T = flat([s.ids for s in members], torch.int64)
    learned_T = flat([s.learned for s in members], torch.float32)
    advantages_T = sampler_logprobs_T = None
    if all(s.advantage is not None for s in members):
        advantages_T = torch.tensor([*(s.advantage for s in members), *([0.0] if padding else [])]).repeat_interleave(sizes)
    if all(s.sampler_logprobs is not None for s in members):
        sampler_logprobs_T = at_predictor(flat([s.sampler_logprobs for s in members], torch.float32))
    return Microbatch(
        tokens_T=tokens_T,
        labels_T=at_predictor(tokens_T),
        positions_T=torch.arange(width) - torch.tensor(starts[:-1]).repeat_interleave(sizes),
        loss_mask_T=at_predictor(learned_T),
        sequence_T=torch.arange(len(sizes)).repeat_interleave(sizes),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        last_N=torch.tensor([start + i for start, i in zip(starts, last, strict=False)], dtype=torch.int64),
        num_sequences=len(members),
        indices=list(indices),
        advantages_T=advantages_T,
        sampler_logprobs_T=sampler_logprobs_T,
    )
