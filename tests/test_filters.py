"""Each filter drops what it is for, at its limit and not before, and reads the reasoning alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.config_types import Filters as Settings
from megatron_r1.problem import Problem
from megatron_r1.rejection import filters

DEFAULTS = filters.Filters(**Settings().model_dump())
ENGLISH = Problem(0, "How many apples are left in the basket?", "3")
CHINESE = Problem(0, "\u8fd8\u5269\u51e0\u4e2a\u82f9\u679c", "3")
GOOD = "First there were five apples and then two were eaten, so three of them are left."


def reason(thought: str, problem: Problem = ENGLISH, *, answer: str = "3", tokens: int = 10, **limits: object) -> str | None:
    return filters.reason(f"<think>\n{thought}\n</think>\n\n{answer}", problem, tokens=tokens, filters=replace(DEFAULTS, **limits))


def test_good_reasoning_passes_whatever_its_answer_holds():
    assert reason(GOOD) is None
    assert reason(GOOD, answer="```python\nprint(3)\n```\n" + "\u82f9\u679c" * 3000) is None


def test_a_completion_over_its_tokens_is_too_long():
    assert reason(GOOD, tokens=100, max_tokens=100) is None
    assert reason(GOOD, tokens=101, max_tokens=100) == "too_long"


@pytest.mark.parametrize("completion", ["3", "<think></think>3", "<think>\n \n</think>\n\n3", "<think> still thinking"])
def test_reasoning_that_is_not_there_is_empty_unless_none_is_needed(completion: str):
    assert filters.reason(completion, ENGLISH, tokens=1, filters=DEFAULTS) == "empty_reasoning"
    assert filters.reason(completion, ENGLISH, tokens=1, filters=replace(DEFAULTS, needs_reasoning=False)) is None


def test_code_in_the_reasoning_is_dropped_unless_allowed():
    assert reason(GOOD + "\n```python\n5 - 2\n```") == "code_block"
    assert reason(GOOD + "\n```python\n5 - 2\n```", allows_code_blocks=True) is None


def test_reasoning_in_two_languages_or_in_the_wrong_one_is_mixed():
    nine, one = " ".join(["apple"] * 9), "\u679c"
    loose = {"max_repeated_ngrams": 1.0}
    assert reason(f"{nine} {one}", min_language_share=0.9, **loose) is None
    assert reason(f"{nine} {one}{one}", min_language_share=0.9, **loose) == "mixed_language"
    assert reason(GOOD, CHINESE) == "mixed_language"
    assert reason("\u8fd8\u5269\u4e09\u4e2a\u82f9\u679c", CHINESE) is None
    assert reason("5 - 2 = 3", CHINESE) is None  # a formula has no language


def test_a_paragraph_ends_at_a_blank_line():
    lines = "\n".join(f"line {i}" for i in range(10))
    assert filters.longest_paragraph(f"{lines}\n \n{lines}\n\n") == len(lines)
    assert reason(lines, max_paragraph_characters=len(lines)) is None
    assert reason(f"{lines}.", max_paragraph_characters=len(lines)) == "long_paragraph"


def test_repeated_ngrams_are_counted_by_hand():
    assert filters.repeated_ngrams("a b c d", 2) == 0.0
    assert filters.repeated_ngrams("a b a b a", 2) == 0.5  # ab ba ab ba
    assert filters.repeated_ngrams("\u597d\u597d\u597d", 1) == pytest.approx(2 / 3)  # characters are words
    assert filters.repeated_ngrams("a b", 3) == 0.0
    words = " ".join(f"word{i}" for i in range(10))
    assert reason(f"{words} {words}", ngram=5, max_repeated_ngrams=0.375) is None  # 6 of 16
    assert reason(f"{words} {words}", ngram=5, max_repeated_ngrams=0.37) == "repetition"


def test_a_line_that_comes_again_and_again_is_repetition_and_a_bracket_is_not():
    line, loose = "Wait, let me compute that again.", {"max_repeated_ngrams": 1.0}
    text = [f"{line}\nNow it is {i}.\n\\[\n\\]\n" for i in range(9)]
    assert reason("\n".join(text[:8]), **loose) is None
    assert reason("\n".join(text), **loose) == "repetition"


def test_the_part_of_the_reasoning_that_the_prompt_opened_is_restored():
    assert filters.with_opened_reasoning("hm\n</think>\n\n3") == "<think>\nhm\n</think>\n\n3"
    for whole in ("<think>hm</think>3", "3", "<think>hm"):
        assert filters.with_opened_reasoning(whole) == whole
    assert filters.reasoning("<think>\nhm\n</think>\n\n3").strip() == "hm"
    assert filters.conclusion("<think>\nhm\n</think>\n\n3\n") == "3"
    assert filters.conclusion("3") == "3"
