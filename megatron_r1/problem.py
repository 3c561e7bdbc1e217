"""What a data set holds. Free of torch, so that a verifier's process starts in a tenth of a second."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One question with what a verifier needs to check an answer."""

    id: int  # stable index in its dataset: seeds sampling, names the problem in logs
    prompt: str  # the user's text, before the chat template
    answer: str  # the reference answer
    source: str = ""  # dataset the problem came from


@dataclass(frozen=True)
class Conversation:
    """Chat turns for SFT; only assistant turns carry loss."""

    messages: tuple[dict[str, str], ...]  # {"role": "user" | "assistant" | "system", "content": text}
