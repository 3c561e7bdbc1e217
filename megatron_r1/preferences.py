"""What reward models are trained on: pairs of answers of which one is better, and answers that are safe or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.data import jsonl_rows
from megatron_r1.problem import Conversation
from megatron_r1.rewards.reward_model import scored_text

Kind = Literal["pairwise", "pointwise"]
ANSWERS = {"pairwise": ("chosen", "rejected"), "pointwise": ("response",)}
LABELS = {"safe": 1.0, "unsafe": 0.0}


@dataclass(frozen=True)
class Judged:
    """One prompt with its answers, as whole conversations: the chosen and the rejected one, or the only one and its label."""

    conversations: tuple[Conversation, ...]
    label: float = 1.0  # of a single answer: 1.0 safe, 0.0 unsafe


def load_preferences(path: str, kind: Kind) -> list[Judged]:
    """The lines of a JSONL file, whose prompt is a text, or "messages" that end with the user's:

    pairwise   {"prompt": "...", "chosen": "...", "rejected": "..."}            the final summary of each is scored
    pointwise  {"prompt": "...", "response": "...", "label": "safe" | "unsafe"} the whole response is scored

    Raises ValueError with file and line for anything else.
    """
    judged = []
    for where, row in jsonl_rows(path):
        label = 1.0
        if kind == "pointwise":
            if row.get("label") not in LABELS:
                raise ValueError(f'{where}: label = {row.get("label")!r}; write "safe" or "unsafe"')
            label = LABELS[row["label"]]
        prompt = _prompt(row, where=where)
        answers = [_answer(row, name, where=where, kind=kind) for name in ANSWERS[kind]]
        judged.append(Judged(tuple(Conversation((*prompt, {"role": "assistant", "content": text})) for text in answers), label))
    if not judged:
        raise ValueError(f"preferences = {path!r}: holds no examples")
    return judged


def _prompt(row: dict[str, Any], *, where: str) -> list[dict[str, str]]:
    if isinstance(row.get("prompt"), str) and "messages" not in row:
        return [{"role": "user", "content": row["prompt"]}]
    messages = row.get("messages")
    if "prompt" in row or not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: give a "prompt" (a text) or "messages" (a list that ends with the user\'s)')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: message {number} is {message!r:.80}; it needs a role and a text content")
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: its messages end with the {messages[-1]['role']}'s; end with the user's, the answers follow it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _answer(row: dict[str, Any], name: str, *, where: str, kind: Kind) -> str:
    """The text that is scored of an answer."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{where}: {name!r} is {row.get(name)!r:.80}; it must be a text ({', '.join(ANSWERS[kind])})")
    text = scored_text(row[name], scope="summary" if kind == "pairwise" else "response")
    if text is None:
        raise ValueError(f"{where}: {name!r} never ends its reasoning with </think>, so it has no summary to score; leave it out")
    return text
