"""The chat template: prompts to token ids, conversations to token ids with a mask of what the assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_r1 import chat_templates
from megatron_r1.packing import TokenSequence
from megatron_r1.problem import Conversation, Problem


class Chat:
    """A model's tokenizer and how it writes a chat down."""

    def __init__(self, folder: str | Path, *, chat_template: bool | str = True):
        """folder: with the tokenizer's files. chat_template: a Jinja file instead of the tokenizer's own template, or False: a
        prompt is its text alone, and an answer follows it.

        Raises ValueError for a folder without a tokenizer, and for a tokenizer without an end token or, when it is to be
        used, a chat template.
        """
        if not Path(folder, "tokenizer.json").is_file() and not Path(folder, "tokenizer_config.json").is_file():
            raise ValueError(f"model.path = {str(folder)!r}: no tokenizer.json there; copy the model's tokenizer files into it")
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"model.path = {str(folder)!r}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"model.path = {str(folder)!r}: its tokenizer has no eos_token, so no completion can end; set it in tokenizer_config.json"
            )
        self.template = chat_templates.chat_template(chat_template) or self.tokenizer.chat_template
        if not self.template:
            raise ValueError(
                f"model.path = {str(folder)!r}: its tokenizer has no chat template; "
                "set chat_template to a Jinja file, or chat_template = false to send prompts as they are"
            )
        self.eos_id: int = self.tokenizer.eos_token_id

    @cached_property
    def opened(self) -> str:
        """The tag with which the template's prompt begins the reasoning, as R1's does; "" where it leaves that to the model."""
        prompt = self._render([{"role": "user", "content": "."}], is_open=True)
        return next((tag for tag in ("<think>\n", "<think>") if prompt.endswith(tag)), "")

    def prompt_ids(self, problem: Problem) -> list[int]:
        """What the model is given to answer the problem, up to where the assistant begins."""
        return self._ids(self._render([{"role": "user", "content": problem.prompt}], is_open=True))

    def check_prompts(self, problems: Sequence[Problem], *, limit: int) -> None:
        """ValueError for the first problem with a prompt of more than `limit` tokens, which would leave its answers too little room."""
        around = len(self.prompt_ids(Problem(id=0, prompt=".", answer="")))
        for problem in problems:
            if len(problem.prompt.encode()) + around <= limit:
                continue  # no token is less than a byte
            if (length := len(self.prompt_ids(problem))) > limit:
                raise ValueError(
                    f"rollout.max_prompt_tokens = {limit}: problem {problem.id} ({problem.prompt!r:.40}) is a prompt of {length} tokens; "
                    "raise it, or leave that problem out"
                )

    def sequence(self, conversation: Conversation) -> TokenSequence:
        """The conversation's tokens; learned are those the assistant writes, its end token included.

        Each turn is tokenized on its own, as in a rollout, where the completion follows the prompt's tokens.
        Raises what `parts` raises, and ValueError if the template does not end an assistant's turn.
        """
        ids: list[int] = []
        learned: list[int] = []
        for context, written in self.parts(conversation):
            given, answer = self._ids(context), self._ids(written)
            if self.eos_id not in answer:
                raise ValueError(
                    f"the chat template does not end an assistant's message with {self.tokenizer.eos_token!r}, "
                    "so the model would never learn to stop; correct the template or the tokenizer's eos_token"
                )
            end = len(answer) - answer[::-1].index(self.eos_id)  # templates may write a line break after the end token
            ids += given + answer
            learned += [0] * len(given) + [1] * end + [0] * (len(answer) - end)
        return TokenSequence(ids=ids, learned=learned)

    def parts(self, conversation: Conversation) -> list[tuple[str, str]]:
        """The conversation's text by the assistant's turns: what stands before the turn, and the turn, which is learned.

        Where the template shortens an earlier answer (R1's drops its reasoning), what stands before the last answer is context and not
        learned. Raises ValueError if the template drops or rewrites what was said.
        """
        messages = list(conversation.messages)
        parts: list[tuple[str, str]] = []
        done = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            history = self._render(messages[:turn], is_open=False)
            before = self._render(messages[:turn], is_open=True)
            after = self._render(messages[: turn + 1], is_open=False)
            is_whole = without_space(message["content"]) in without_space(after[len(history) :])
            if not before.startswith(history) or not after.startswith(before) or not is_whole:
                raise ValueError(
                    f"the chat template rewrites the conversation at message {turn} ({message['content']!r:.40}), "
                    "so its tokens cannot be learned as written; use a template that keeps every message in full"
                )
            if not before.startswith(done):
                parts, done = [], ""
            parts.append((before[len(done) :], after[len(before) :]))
            done = after
        return parts

    def scored_ids(self, conversation: Conversation) -> list[int]:
        """The conversation as a reward model's server tokenizes its messages: rendered whole, then tokenized at once.

        Raises ValueError if the template drops or rewrites what was said.
        """
        text = self._render(list(conversation.messages), is_open=False)
        for turn, message in enumerate(conversation.messages):
            if message["content"].strip() not in text:
                raise ValueError(
                    f"the chat template rewrites the conversation at message {turn} ({message['content']!r:.40}), "
                    "so it would not be scored as written; use a template that keeps every message in full"
                )
        return self._ids(text)

    def completion(self, ids: Sequence[int]) -> str:
        """A completion as rewards read it: without special tokens, and from `<think>` on where the prompt has written that."""
        return self.opened + self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: list[dict[str, str]], *, is_open: bool) -> str:
        """The messages as one text; open: up to where the assistant's next turn begins."""
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, add_generation_prompt=is_open)
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise ValueError(f"the chat template refuses a conversation of {roles}: {error}; reorder its messages") from None


def without_space(text: str) -> str:
    """What a template must keep of a message; it may set line breaks of its own around the reasoning."""
    return "".join(text.split())
