"""Judged answers from JSONL: what is scored of each, and faults named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.chat import Chat
from megatron_r1.preferences import Judged, load_preferences
from megatron_r1.problem import Conversation

TINY = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_v3"
USER = {"role": "user", "content": "hello?"}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(text: str, *before: dict[str, str]) -> Conversation:
    return Conversation((*before, USER, {"role": "assistant", "content": text}))


def test_of_a_pair_only_the_summaries_are_kept(tmp_path: Path):
    system = {"role": "system", "content": "be kind"}
    rows = [
        {"prompt": "hello?", "chosen": "<think>hm</think>Hello!", "rejected": "What?"},
        {"messages": [system, USER], "chosen": "a", "rejected": "<think></think> b"},
    ]
    assert load_preferences(write(tmp_path / "p.jsonl", *rows), "pairwise") == [
        Judged((conversation("Hello!"), conversation("What?"))),
        Judged((conversation("a", system), conversation("b", system))),
    ]


def test_of_a_labelled_response_all_is_kept(tmp_path: Path):
    text = "<think>hm</think> Hello! "
    rows = [{"prompt": "hello?", "response": text, "label": label} for label in ("safe", "unsafe")]
    found = load_preferences(write(tmp_path / "p.jsonl", *rows), "pointwise")
    assert found == [Judged((conversation(text),), 1.0), Judged((conversation(text),), 0.0)]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairwise", {"prompt": "a", "chosen": "b"}, "'rejected' is None; it must be a text"),
        ("pairwise", {"chosen": "b", "rejected": "c"}, 'give a "prompt"'),
        ("pairwise", {"prompt": "a", "messages": [USER], "chosen": "b", "rejected": "c"}, 'give a "prompt"'),
        ("pairwise", {"prompt": "a", "chosen": "<think>b", "rejected": "c"}, "'chosen' never ends its reasoning"),
        ("pairwise", {"messages": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "message 0 is"),
        ("pairwise", {"messages": [{**USER, "role": "assistant"}], "chosen": "b", "rejected": "c"}, "end with the assistant's"),
        ("pointwise", {"prompt": "a", "response": "b", "label": 1}, 'label = 1; write "safe" or "unsafe"'),
        ("pointwise", {"prompt": "a", "label": "safe"}, "'response' is None"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(kind: str, row: dict, message: str, tmp_path: Path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "response": "d", "label": "safe"}
    with pytest.raises(ValueError, match=r"p\.jsonl:2: .*" + message):
        load_preferences(write(tmp_path / "p.jsonl", good, row), kind)


def test_an_empty_file_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no examples"):
        load_preferences(write(tmp_path / "p.jsonl"), "pairwise")


def test_the_whole_conversation_is_tokenized_at_once_with_its_end_token():
    chat = Chat(TINY)
    ids = chat.scored_ids(conversation("Hello!"))
    assert chat.tokenizer.decode(ids) == "<bos><user>hello?<assistant>Hello!<eos>"
    assert ids[-1] == chat.eos_id


def test_a_template_that_drops_the_reasoning_is_refused():
    chat = Chat(TINY)
    chat.template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert chat.scored_ids(conversation("Hello!"))
    with pytest.raises(ValueError, match="rewrites the conversation at message 1"):
        chat.scored_ids(conversation("<think>hm</think>Hello!"))
