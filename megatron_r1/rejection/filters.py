"""What makes a correct completion unfit to learn from. Pure functions of its text.

R1 drops reasoning with mixed languages, long paragraphs and code blocks, and for its cold start repetition (arXiv 2501.12948v2,
B.3.2 and B.3.3). None of its thresholds is published: the defaults are this project's.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from megatron_r1.problem import Problem
from megatron_r1.rewards import language

# One word, or one Chinese character, as Chinese does not part its words.
UNIT = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\s\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
CODE_FENCE = "```"
LINE_CHARACTERS = 20  # shorter lines, as the brackets of formulas, may repeat as they like


@dataclass(frozen=True)
class Filters:
    """Each limit is the last value that passes; config_types.py has the defaults and where each comes from."""

    needs_reasoning: bool
    allows_code_blocks: bool
    min_language_share: float  # of the reasoning's words, in the prompt's language
    max_paragraph_characters: int
    max_repeated_ngrams: float  # share of the reasoning's n-grams that stood there before
    ngram: int  # words
    max_repeated_lines: int  # times the same line stands in the reasoning
    max_tokens: int  # of the completion


def reason(completion: str, problem: Problem, *, tokens: int, filters: Filters) -> str | None:
    """Why the completion is dropped, by the first filter that does; None if it passes all."""
    f, thought = filters, reasoning(completion)
    checks = (
        ("too_long", lambda: tokens > f.max_tokens),
        ("empty_reasoning", lambda: f.needs_reasoning and not thought.strip()),
        ("code_block", lambda: not f.allows_code_blocks and CODE_FENCE in thought),
        ("mixed_language", lambda: bool(thought.strip()) and language.reward(completion, problem) < f.min_language_share),
        ("long_paragraph", lambda: longest_paragraph(thought) > f.max_paragraph_characters),
        (
            "repetition",
            lambda: repeated_ngrams(thought, f.ngram) > f.max_repeated_ngrams or most_repeated_line(thought) > f.max_repeated_lines,
        ),
    )
    return next((name for name, drops in checks if drops()), None)


def reasoning(completion: str) -> str:
    """What stands in the think tags; nothing where there are none."""
    before, closed, _ = completion.partition("</think>")
    return before.rpartition("<think>")[2] if closed else ""


def conclusion(completion: str) -> str:
    """What follows the reasoning."""
    return completion.rpartition("</think>")[2].strip()


def with_opened_reasoning(completion: str) -> str:
    """The completion as a conversation holds it: with the `<think>` that R1's generation prompt begins the reasoning with."""
    before, closed, _ = completion.partition("</think>")
    return f"<think>\n{completion.lstrip()}" if closed and "<think>" not in before else completion


def longest_paragraph(text: str) -> int:
    """Characters of the longest stretch without a blank line."""
    return max(len(paragraph.strip()) for paragraph in PARAGRAPH_BREAK.split(text))


def repeated_ngrams(text: str, n: int) -> float:
    """The share of n-grams of words that are not the first of their kind; 0 for a text shorter than n words."""
    units = UNIT.findall(text)
    ngrams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def most_repeated_line(text: str) -> int:
    """How often the line stands there that stands there most often; short lines do not count."""
    lines = Counter(line.strip() for line in text.splitlines() if len(line.strip()) >= LINE_CHARACTERS)
    return max(lines.values(), default=0)
