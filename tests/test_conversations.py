"""What SFT takes from a file of conversations: which, in which order, and where it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.chat import Chat
from megatron_r1.conversations import Batches, Conversations, Tokenized
from megatron_r1.data import Dataset
from megatron_r1.packing import TokenSequence

TINY = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_v3"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """24 conversations between blank lines and letters of two bytes; the answer of number i has i + 1 digits."""
    lines = [{"messages": [{"role": "user", "content": "\u00e9"}, {"role": "assistant", "content": "7" * (i + 1)}]} for i in range(24)]
    file = tmp_path / "c.jsonl"
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return str(file)


def batches(path: str, *, count: int = 4, longest: int = 1000, kept_tokens: int = 1000) -> Batches:
    tokenized = Tokenized(Conversations(path), Chat(TINY), kept_tokens=kept_tokens)
    return Batches(Dataset(tokenized, seed=1), count=count, longest=longest)


def answers(taken: list[TokenSequence]) -> list[int]:
    """Which conversations a batch is of, by their digits."""
    return [sum(sequence.learned) - 2 for sequence in taken]  # a digit more than the number, and the end token


def test_a_conversation_is_read_again_from_its_own_line(path: str):
    conversations = Conversations(path)
    assert [len(c.messages[1]["content"]) for c in conversations] == list(range(1, 25))
    assert conversations.where(2) == f"{path}:5"


def test_an_epoch_has_each_conversation_once_whether_or_not_it_stays_tokenized(path: str):
    kept, forgotten = batches(path), batches(path, kept_tokens=0)
    taken = [kept.take() for _ in range(12)]
    assert [forgotten.take() for _ in range(12)] == taken
    for epoch in (taken[:6], taken[6:]):
        assert sorted(i for batch in epoch for i in answers(batch)) == list(range(24))
    assert answers(taken[0]) != answers(taken[6])
    assert (len(kept.dataset.items.kept), len(forgotten.dataset.items.kept)) == (24, 0)


def test_a_resumed_run_takes_what_comes_next_though_more_was_tokenized_by_then(path: str):
    unbroken, broken, resumed = batches(path), batches(path), batches(path)
    expected = [unbroken.take() for _ in range(9)]
    assert [broken.take() for _ in range(5)] == expected[:5]
    broken.left_out = 3
    resumed.load_state_dict(broken.state_dict())
    assert resumed.left_out == 3
    assert [resumed.take() for _ in range(4)] == expected[5:]


def test_longer_conversations_are_left_out_and_counted_and_batches_stay_full(path: str):
    longest = len(Tokenized(Conversations(path), Chat(TINY))[9].ids)
    some = batches(path, longest=longest)
    taken = [some.take() for _ in range(10)]
    assert all(len(batch) == 4 for batch in taken)
    assert {i for batch in taken for i in answers(batch)} == set(range(10))
    assert some.left_out > 14


def test_conversations_that_are_all_too_long_are_a_one_line_error(path: str):
    with pytest.raises(ValueError, match="chunk_tokens = 3: every conversation is longer; raise it"):
        batches(path, longest=3).take()


def test_a_conversation_that_the_template_rewrites_is_named_by_its_line_before_anything_is_trained(path: str):
    template = Path(path).with_name("t.jinja")
    template.write_text("{% for m in messages %}{{ m.content | replace('77', '8') }}{{ eos_token }}{% endfor %}")
    with pytest.raises(ValueError, match=r"c\.jsonl:3: the chat template rewrites"):
        Tokenized(Conversations(path), Chat(TINY, chat_template=str(template)))
