"""The chat template: what the model is given, what it learns, and clear errors for tokenizers that cannot do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1.chat import Chat
from megatron_r1.problem import Conversation, Problem

TINY = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_v3"
CHATML = (
    "{% for m in messages %}{{ '<user>' + m.role + '\n' + m.content + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>assistant\n' }}{% endif %}"
)


def tokenizer(folder: Path, **changes: object) -> Path:
    """A copy of the tiny tokenizer with settings changed; None removes one."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple({"role": role, "content": content} for role, content in turns))


def learned_text(chat: Chat, one: Conversation) -> str:
    sequence = chat.sequence(one)
    return chat.tokenizer.decode([i for i, mask in zip(sequence.ids, sequence.learned, strict=True) if mask])


def test_digits_tags_and_operators_are_one_token_each_and_any_text_survives():
    chat = Chat(TINY)
    prompt = chat.prompt_ids(Problem(0, "23 + 45", "68"))
    assert chat.tokenizer.convert_ids_to_tokens(prompt) == ["<bos>", "<user>", "2", "3", "\u0120+\u0120", "4", "5", "<assistant>"]
    text = "<think>3+5=8\n</think><answer>\u4e2d\u6587 caf\u00e9 - 1</answer>"
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(chat.tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert chat.completion([*ids, chat.eos_id]) == text
    config = json.loads((TINY / "config.json").read_text())
    assert len(chat.tokenizer) <= config["vocab_size"]
    assert config["vocab_size"] % 64 == 0
    names = ("bos", "eos", "pad")
    assert [config[f"{n}_token_id"] for n in names] == [getattr(chat.tokenizer, f"{n}_token_id") for n in names]


def test_only_what_the_assistant_writes_is_learned_with_its_end_token():
    chat = Chat(TINY)
    one = conversation(("system", "add"), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4"))
    sequence = chat.sequence(one)
    assert chat.tokenizer.decode(sequence.ids) == "<bos>add<user>1+1<assistant>2<eos><user>2+2<assistant>4<eos>"
    assert learned_text(chat, one) == "2<eos>4<eos>"


def test_a_conversation_begins_with_the_prompt_a_rollout_would_be_given():
    for chat in (Chat(TINY), Chat(TINY, chat_template=False)):
        prompt = chat.prompt_ids(Problem(0, "1+1", "2"))
        sequence = chat.sequence(conversation(("user", "1+1"), ("assistant", "2")))
        assert sequence.ids[: len(prompt)] == prompt
        assert sequence.learned == [0] * len(prompt) + [1, 1]


def test_a_prompt_that_is_too_long_is_a_one_line_error_that_names_its_problem():
    chat = Chat(TINY)
    problems = [Problem(6, "1+1", "2"), Problem(7, "1+" * 20 + "1", "21")]
    longest = len(chat.prompt_ids(problems[1]))
    chat.check_prompts(problems, limit=longest)
    with pytest.raises(ValueError, match=rf"rollout.max_prompt_tokens = {longest - 1}: problem 7 .* of {longest} tokens; raise it"):
        chat.check_prompts(problems, limit=longest - 1)


def test_a_line_break_after_the_end_token_is_not_learned(tmp_path: Path):
    chat = Chat(tokenizer(tmp_path, chat_template=CHATML))
    assert learned_text(chat, conversation(("user", "1+1"), ("assistant", "2"), ("user", "more"), ("assistant", "3"))) == "2<eos>3<eos>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": None}, "has no eos_token"),
        ({"chat_template": None}, "has no chat template; .* chat_template = false"),
    ],
)
def test_a_tokenizer_that_cannot_chat_is_a_one_line_error(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        Chat(tokenizer(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_a_one_line_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no tokenizer.json there"):
        Chat(tmp_path)
    folder = tokenizer(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        Chat(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}<eos>{% endfor %}", "rewrites the conversation at message 1"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end an assistant's message with '<eos>'"),
        ("{{ raise_exception('no system role') }}", "refuses a conversation of user: no system role"),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_a_one_line_error(tmp_path: Path, template: str, message: str):
    chat = Chat(tokenizer(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=message) as error:
        chat.sequence(conversation(("user", "1+1"), ("assistant", "<think>hm</think>2")))
    assert "\n" not in str(error.value)
