"""R1-Zero's and R1's templates, letter by letter: what a rollout is given, and what SFT learns from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_r1 import chat_templates
from megatron_r1.chat import Chat
from megatron_r1.problem import Conversation, Problem
from megatron_r1.rewards import accuracy

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny_v3"
ZERO, R1 = (str(ROOT / "configs" / "templates" / f"{name}.jinja") for name in ("r1_zero", "r1"))
BEGIN, END, USER, ASSISTANT = (
    f"<\uff5c{name}\uff5c>" for name in ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
)
PARAGRAPH = (
    "This is a conversation between a User and an Assistant. The User asks a question and the Assistant answers it. The Assistant "
    "first works the question out in private and then gives the User the answer. It encloses its reasoning in <think> and </think> "
    "and its answer in <answer> and </answer>, that is, <think> the reasoning </think> <answer> the answer </answer>."
)


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with the special tokens of V3's."""
    tokenizer = AutoTokenizer.from_pretrained(str(TINY))
    tokenizer.add_special_tokens({"bos_token": BEGIN, "eos_token": END, "additional_special_tokens": [USER, ASSISTANT]})
    folder = tmp_path_factory.mktemp("v3")
    tokenizer.save_pretrained(folder)
    return folder


def halves(chat: Chat, *turns: tuple[str, str]) -> tuple[str, str]:
    """What a conversation's tokens say: those that are context, and those that are learned."""
    sequence = chat.sequence(Conversation(tuple({"role": role, "content": content} for role, content in turns)))
    pairs = list(zip(sequence.ids, sequence.learned, strict=True))
    return tuple(chat.tokenizer.decode([i for i, mask in pairs if mask == wanted]) for wanted in (0, 1))


def test_r1_zero_prompts_with_its_paragraph_and_nothing_else(v3: Path):
    chat = Chat(v3, chat_template=ZERO)
    prompt = chat.tokenizer.decode(chat.prompt_ids(Problem(0, "What is 1+1?", "2")))
    assert prompt == f"{BEGIN}{PARAGRAPH} User: What is 1+1?. Assistant:"
    for word in ("step by step", "reflect", "verify", "check", "box"):
        assert word not in prompt


def test_r1_zero_learns_the_answer_with_its_tags_and_end_token(v3: Path):
    chat = Chat(v3, chat_template=ZERO)
    one = [("user", "1+1"), ("assistant", "\n<think>two</think><answer>2</answer>")]
    assert halves(chat, *one) == (f"{BEGIN}{PARAGRAPH} User: 1+1. Assistant:", f" <think>two</think><answer>2</answer>{END}")
    both = halves(chat, *one, ("user", "2+2"), ("assistant", "4"))
    assert both[0] == f"{BEGIN}{PARAGRAPH} User: 1+1. Assistant:\nUser: 2+2. Assistant:"
    assert both[1] == f" <think>two</think><answer>2</answer>{END} 4{END}"
    with pytest.raises(ValueError, match="R1-Zero's prompt has no system message"):
        halves(chat, ("system", "be brief"), *one)


def test_r1_prompts_with_v3s_tokens_and_opens_the_reasoning(v3: Path):
    chat = Chat(v3, chat_template=R1)
    ids = chat.prompt_ids(Problem(0, "1+1", "2"))
    assert chat.tokenizer.decode(ids) == f"{BEGIN}{USER}1+1{ASSISTANT}<think>\n"
    assert [chat.tokenizer.convert_ids_to_tokens(ids)[i] for i in (0, 1, 5)] == [BEGIN, USER, ASSISTANT]


def test_a_completion_is_read_with_the_tag_that_the_prompt_has_opened_so_unfinished_reasoning_answers_nothing(v3: Path):
    one = Problem(0, "1+1", "2")
    for template, opened in ((R1, "<think>\n"), (ZERO, "")):
        chat = Chat(v3, chat_template=template)
        cut, whole = (chat.completion(chat.tokenizer(text)["input_ids"]) for text in ("is it \\boxed{2}?", "yes</think>\\boxed{2}"))
        assert (cut, whole) == (f"{opened}is it \\boxed{{2}}?", f"{opened}yes</think>\\boxed{{2}}")
        assert accuracy.reward(whole, one) == 1.0
        assert accuracy.reward(cut, one) == (0.0 if opened else 1.0)


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("<think>\ntwo\n</think>\n\n**2**", "two\n</think>\n\n**2**"),
        ("<think>two</think>2", "two\n</think>\n\n2"),
        ("two</think>2", "two\n</think>\n\n2"),
        ("Hello!", "\n</think>\n\nHello!"),
    ],
)
def test_r1_learns_the_reasoning_and_the_answer_however_they_were_spaced(v3: Path, answer: str, learned: str):
    given = halves(Chat(v3, chat_template=R1), ("system", "Be brief."), ("user", "1+1"), ("assistant", answer))
    assert given == (f"{BEGIN}Be brief.{USER}1+1{ASSISTANT}<think>\n", f"{learned}{END}")


def test_r1_learns_only_the_last_answer_as_the_earlier_ones_stand_without_their_reasoning(v3: Path):
    turns = [("user", "1+1"), ("assistant", "<think>\nhm\n</think>\n\n2"), ("user", "more"), ("assistant", "<think>\nso\n</think>\n\n3")]
    given = halves(Chat(v3, chat_template=R1), *turns)
    assert given == (f"{BEGIN}{USER}1+1{ASSISTANT}\n\n2{END}{USER}more{ASSISTANT}<think>\n", f"so\n</think>\n\n3{END}")


def test_a_conversation_begins_with_the_prompt_a_rollout_would_be_given(v3: Path):
    for template in (ZERO, R1):
        chat = Chat(v3, chat_template=template)
        prompt = chat.prompt_ids(Problem(0, "1+1", "2"))
        turns = ({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"})
        sequence = chat.sequence(Conversation(turns))
        assert sequence.ids[: len(prompt)] == prompt
        assert sequence.learned == [0] * len(prompt) + [1] * (len(sequence.ids) - len(prompt))


def test_r1s_answer_in_a_place_where_it_cannot_be_learned_is_an_error(v3: Path):
    with pytest.raises(ValueError, match="rewrites the conversation at message 1"):
        halves(Chat(v3, chat_template=R1), ("user", "1+1"), ("assistant", "hm <think>two</think>2"))


def test_a_template_file_wins_over_the_tokenizers_own_wherever_the_model_goes(v3: Path, tmp_path: Path):
    shutil.copytree(v3, tmp_path / "hf")
    shutil.copy(R1, tmp_path / "hf" / "chat_template.jinja")
    problem = Problem(0, "1+1", "2")
    assert Chat(tmp_path / "hf").prompt_ids(problem) == Chat(v3, chat_template=R1).prompt_ids(problem)


def test_servers_are_given_the_same_template(v3: Path):
    assert chat_templates.server_flags(True) == []
    assert chat_templates.server_flags(False) == ["--chat-template", chat_templates.PLAIN]
    assert chat_templates.server_flags(R1) == ["--chat-template", R1]
    with pytest.raises(ValueError, match=r"chat_template = 'r1.jinj': no such file; give a Jinja file"):
        chat_templates.chat_template("r1.jinj")
