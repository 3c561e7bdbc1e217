"""What SFT learns from: conversations read from their file and tokenized when their turn comes.

R1's 800,000 are four billion tokens, which no node holds once for each of its ranks (arXiv 2501.12948v2, Table 5).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from megatron_r1.chat import Chat
from megatron_r1.data import Dataset, jsonl_lines, jsonl_row
from megatron_r1.packing import TokenSequence
from megatron_r1.problem import Conversation

ROLES = ("system", "user", "assistant")
Read = TypeVar("Read")
KEPT_TOKENS = 1 << 22  # that stay tokenized: all of a small file, so that its later epochs cost nothing; 200 MB


class Conversations(Sequence[Conversation]):
    """Those of a JSONL file, {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]} a line.

    All are read once and forgotten but for where each begins. Raises ValueError with file and line for anything else.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.starts, self.numbers = array("q"), array("q")  # bytes before a conversation's line, and that line's number
        for start, number, row in jsonl_lines(path):
            messages(row, where=f"{path}:{number}")
            self.starts.append(start)
            self.numbers.append(number)
        if not self.starts:
            raise ValueError(f"{path}: holds no conversations")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Conversation:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        where = self.where(index)
        return Conversation(tuple(messages(jsonl_row(line, where=where), where=where)))

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.path}:{self.numbers[index]}"


class Tokenized(Sequence[TokenSequence]):
    """The conversations' tokens. One that the chat template rewrites is a ValueError with file and line, before the first is trained on."""

    def __init__(self, conversations: Conversations, chat: Chat, *, kept_tokens: int = KEPT_TOKENS) -> None:
        self.conversations, self.chat = conversations, chat
        self.kept: dict[int, TokenSequence] = {}
        self.room = kept_tokens
        for index in range(len(conversations)):
            self._read(index, chat.parts)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> TokenSequence:
        if index in self.kept:
            return self.kept[index]
        sequence = self._read(index, self.chat.sequence)
        if len(sequence.ids) <= self.room:
            self.room -= len(sequence.ids)
            self.kept[index] = sequence
        return sequence

    def _read(self, index: int, how: Callable[[Conversation], Read]) -> Read:
        try:
            return how(self.conversations[index])
        except ValueError as error:
            raise ValueError(f"{self.conversations.where(index)}: {error}") from None


class Batches:
    """`count` sequences at a time, none longer than `longest`; the next are tokenized while these are trained on.

    The cursor is that of what was taken, so a resumed run takes what comes next. `left_out` counts the longer ones passed over so far.
    """

    def __init__(self, dataset: Dataset[TokenSequence], *, count: int, longest: int) -> None:
        self.dataset, self.count, self.longest = dataset, count, longest
        self.left_out = 0
        self.cursor = dataset.state_dict()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.coming: Future[tuple[list[TokenSequence], int, dict[str, int]]] | None = None

    def take(self) -> list[TokenSequence]:
        """The next batch. Raises ValueError when two epochs have none that is short enough, or the file has fewer than a batch."""
        sequences, left_out, self.cursor = (self.coming or self.pool.submit(self._draw)).result()
        self.left_out += left_out
        self.coming = self.pool.submit(self._draw)
        return sequences

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins."""
        return self.cursor | {"left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues there; before the first batch is taken."""
        assert self.coming is None, "a batch of another place is on its way"
        self.dataset.load_state_dict(state)
        self.cursor, self.left_out = self.dataset.state_dict(), state.get("left_out", 0)

    def _draw(self) -> tuple[list[TokenSequence], int, dict[str, int]]:
        """A batch, how many were too long for it, and the cursor after it."""
        fitting: list[TokenSequence] = []
        left_out, first = 0, self.dataset.epoch
        while len(fitting) < self.count:
            drawn = self.dataset.take(self.count - len(fitting))
            short = [sequence for sequence in drawn if len(sequence.ids) <= self.longest]
            fitting += short
            left_out += len(drawn) - len(short)
            if self.dataset.epoch > first + 1 and not fitting:
                raise ValueError(f"chunk_tokens = {self.longest}: every conversation is longer; raise it")
        return fitting, left_out, self.dataset.state_dict()


def messages(row: dict[str, Any], *, where: str) -> list[dict[str, str]]:
    """A line's turns, of which the last is the assistant's."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'{where}: no list of "messages"; write {{"messages": [{{"role": "user", "content": "..."}}, ...]}}')
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise ValueError(f"{where}: message {number} is {turn!r:.80}; it needs a role ({', '.join(ROLES)}) and a text content")
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{where}: ends with a {turns[-1]['role']} message; end with the assistant's, it is what is learned")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
