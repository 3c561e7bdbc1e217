"""Packing: what must hold for any lengths, and what a packed row means."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_r1.packing import TokenSequence, pack, plan
from megatron_r1.types import Problem, Sample

CASES = [(seed, ranks, multiple) for seed in range(6) for ranks in (1, 2, 3, 8) for multiple in (1, 4)]


def random_lengths(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1, 64) for _ in range(rng.choice([1, 5, 40, 200]))]


@pytest.mark.parametrize(("seed", "ranks", "multiple"), CASES)
def test_every_sequence_is_packed_once_in_equally_many_chunks_none_over_the_cap(seed: int, ranks: int, multiple: int):
    lengths = random_lengths(seed)
    groups = plan(lengths, chunk_tokens=64, num_groups=ranks, count_multiple=multiple)
    assert len(groups) == ranks
    assert sorted(i for chunks in groups for chunk in chunks for i in chunk) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chunk) <= 64 for chunks in groups for chunk in chunks)
    assert len({len(chunks) for chunks in groups}) == 1
    assert len(groups[0]) % multiple == 0
    assert groups == plan(list(lengths), chunk_tokens=64, num_groups=ranks, count_multiple=multiple)


def test_the_docstring_example_is_what_plan_returns():
    assert plan([3, 9, 5, 4, 2, 6], chunk_tokens=10, num_groups=2) == [[[1], [3, 0]], [[5, 4], [2]]]


def test_ranks_get_nearly_equal_tokens_and_chunks_are_nearly_full():
    rng = random.Random(0)
    lengths = [min(1000, int(rng.expovariate(1 / 200)) + 10) for _ in range(2000)]
    groups = plan(lengths, chunk_tokens=2048, num_groups=4)
    tokens = [sum(lengths[i] for chunk in chunks for i in chunk) for chunks in groups]
    assert max(tokens) - min(tokens) < 1000
    assert sum(tokens) > 0.97 * 2048 * sum(len(chunks) for chunks in groups)


def test_a_sequence_longer_than_a_chunk_is_a_one_line_error():
    with pytest.raises(ValueError, match=r"chunk_tokens = 64: sequence 1 has 70 tokens; raise it to at least 70") as error:
        plan([10, 70], chunk_tokens=64)
    assert "\n" not in str(error.value)


def sample(prompt: list[int], completion: list[int], advantage: float) -> Sample:
    return Sample(
        problem=Problem(id=0, prompt="", answer=""),
        group_index=0,
        prompt_ids=prompt,
        completion_ids=completion,
        sampler_logprobs=[-0.1 * t for t in completion],
        finish_reason="stop",
        weight_version=0,
        advantage=advantage,
    )


def test_a_packed_row_holds_each_sequence_and_its_labels_advantages_and_logprobs():
    samples = [sample([1, 2], [3, 4], 0.5), sample([5], [6], -1.0)]
    (batch,) = pack([TokenSequence.from_sample(s) for s in samples], [[1, 0]], multiple=4)
    assert batch.tokens_T.tolist() == [5, 6, 1, 2, 3, 4, 0, 0]
    assert batch.labels_T.tolist() == [6, 0, 2, 3, 4, 0, 0, 0]
    assert batch.loss_mask_T.tolist() == [1, 0, 0, 1, 1, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert batch.sequence_T.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 8]
    assert (batch.num_sequences, batch.indices) == (2, [1, 0])
    assert batch.last_N.tolist() == [1, 5]
    assert batch.advantages_T.tolist() == [-1, -1, 0.5, 0.5, 0.5, 0.5, 0, 0]
    torch.testing.assert_close(batch.sampler_logprobs_T, torch.tensor([-0.6, 0, 0, -0.3, -0.4, 0, 0, 0]))
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens_T.dtype == batch.labels_T.dtype == batch.positions_T.dtype == batch.sequence_T.dtype == torch.int64


def test_under_context_parallelism_each_sequence_ends_with_padding_of_its_own():
    samples = [sample([1, 2], [3, 4, 5], 0.5), sample([6], [7], -1.0)]
    (batch,) = pack([TokenSequence.from_sample(s) for s in samples], [[0, 1]], multiple=8, sequence_multiple=4)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 0, 0, 0, 0, 0, 0]
    assert batch.loss_mask_T.tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.sequence_T.tolist() == [0] * 8 + [1] * 4 + [2] * 4
    assert batch.last_N.tolist() == [4, 9]
    torch.testing.assert_close(batch.sampler_logprobs_T[:9], torch.tensor([0, -0.3, -0.4, -0.5, 0, 0, 0, 0, -0.7]))


def test_what_the_limit_cut_is_learned_from_unless_it_is_masked():
    cut, ended = sample([1], [2, 3], 1.0), sample([4], [5], 1.0)
    cut.finish_reason = "length"
    assert [TokenSequence.from_sample(s).learned for s in (cut, ended)] == [[0, 1, 1], [0, 1]]
    masked, kept = (TokenSequence.from_sample(s, mask_truncated=True) for s in (cut, ended))
    assert (masked.ids, masked.learned, masked.sampler_logprobs) == ([1, 2, 3], [0, 0, 0], [0.0, 0.0, 0.0])
    assert kept == TokenSequence.from_sample(ended)


def test_a_row_without_padding_has_no_padding_sequence_and_pad_to_fixes_the_width():
    conversation = TokenSequence(ids=[7, 8, 9], learned=[0, 1, 1])
    (tight,) = pack([conversation], [[0]])
    assert tight.cu_seqlens.tolist() == [0, 3]
    assert tight.advantages_T is None
    assert tight.sampler_logprobs_T is None
    wide, empty = pack([conversation], [[0], []], pad_to=8)
    assert [len(wide.tokens_T), len(empty.tokens_T)] == [8, 8]
    assert empty.num_sequences == 0
    assert empty.loss_mask_T.sum() == 0
    assert empty.cu_seqlens.tolist() == [0, 8]
