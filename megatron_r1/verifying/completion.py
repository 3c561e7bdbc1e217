"""What a completion says, read in one way by every reward: its conclusion, its final answer, its code."""

from __future__ import annotations

import re
from dataclasses import dataclass

PYTHON = re.compile(r"py(?:thon)?[\d.]*", re.IGNORECASE)
BOX, BRACE = re.compile(r"\\boxed\{"), re.compile(r"[{}]")
MARKS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt|bb)|boldsymbol|bm|bf|rm|operatorname|left|right)(?![a-zA-Z])"
    r"|\\[()\[\]]|[{}$*`]"
)
SPACES = re.compile(r"\\[ ,;:!]|\\quad(?![a-zA-Z])|~")
INFO = re.compile(r"[^\s:{}.][^\s:{}]*")  # words, also of "python:folder/name.py" and "{.python}"
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FENCED = re.compile(r"(?:^|<answer>)[ \t]*(`{3,})([^\n`]*)\n(.*?)^[ \t]*\1[ \t]*(?=$|</answer>)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: ```info, a line break, text, ```."""

    info: tuple[str, ...]  # the words after the opening fence, the language first
    text: str

    @property
    def is_python(self) -> bool:
        """Whether it says so, or does not say what it is."""
        return not self.info or PYTHON.fullmatch(self.info[0]) is not None


def conclusion(completion: str) -> str | None:
    """What follows the reasoning; None while still inside it. All of a completion without tags."""
    _, closed, after = completion.rpartition("</think>")
    return None if not closed and "<think>" in completion else after


def final_answer(completion: str) -> str | None:
    """The answer a completion ends with; None if it has none or is still inside its reasoning."""
    after = conclusion(completion)
    if after is None:
        return None
    tagged = ANSWER.findall(after)
    text = tagged[-1] if tagged else after
    box = last_box(text)
    if box is None and not tagged:
        return None
    return (text if box is None else box).strip()


def last_box(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, braces balanced."""
    boxes, opened, last = {box.end() for box in BOX.finditer(text)}, [], (-1, -1)
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in boxes:
            last = max(last, (start, brace.start()))
    return text[slice(*last)] if last[0] >= 0 else None


def without_marks(text: str) -> str:
    """The words or the letter of a text, without LaTeX's fonts, spaces and mathematics, and without Markdown's emphasis."""
    return MARKS.sub("", SPACES.sub(" ", text))


def code_blocks(completion: str) -> list[Block]:
    """The fenced blocks of the conclusion, in order; one that is not closed is none."""
    return [Block(tuple(INFO.findall(info)), body) for _, info, body in FENCED.findall(conclusion(completion) or "")]
