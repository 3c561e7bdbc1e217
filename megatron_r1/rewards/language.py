"""The share of the reasoning's words that are in the target language (R1's language consistency reward, Nature 645 equation 7).

The paper does not say how it finds words. Here the script decides: a run of Latin letters is an English word, each Han
character a Chinese one, a run of other letters a word of neither. Formulas have no language: digits and symbols, LaTeX
commands and environments, single Latin letters (variables) and, where dollars or brackets mark a formula, names of up to four
(ABC, max, dx) are not words. French therefore counts as English; Japanese kana do not count
as Chinese.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from megatron_r1.problem import Problem

# an opening bracket ends the search for the one before it, or a text of nothing else would take minutes
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]", re.DOTALL)
NAME = re.compile(r"(?<![a-zA-Z])[a-zA-Z]{1,4}(?![a-zA-Z])")
LATEX_COMMAND = re.compile(r"\\(?:begin|end)\{[a-zA-Z]+\*?\}|\\[a-zA-Z]+")
TAG = re.compile(r"</?(think|answer)>")
WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\d_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")


def reward(completion: str, problem: Problem, *, language: Literal["auto", "en", "zh"] = "auto") -> float:
    """Words in the target language over words, of the reasoning; "auto" takes the language most of the prompt is in.

    1.0 for reasoning without words (bare formulas mix no languages), 0.0 without any reasoning.
    """
    reasoning = completion.partition("</think>")[0].rpartition("<think>")[2]
    if not reasoning.strip():
        return 0.0
    target = language_of(problem.prompt) if language == "auto" else language
    found = languages(reasoning)
    return found.count(target) / len(found) if found else 1.0


def language_of(text: str) -> str:
    """"zh" if most words are Chinese, else "en"."""
    found = languages(text)
    return "zh" if 2 * found.count("zh") > len(found) else "en"


def languages(text: str) -> list[str]:
    """The language of each word: "en", "zh" or "other"."""
    text = FORMULA.sub(lambda formula: NAME.sub(" ", LATEX_COMMAND.sub(" ", formula[0])), TAG.sub(" ", text))
    words = WORD.findall(LATEX_COMMAND.sub(" ", text))
    return [language for word in words if (language := _language(word))]


def _language(word: str) -> str:
    name = unicodedata.name(word[0], "")
    if name.startswith("CJK"):
        return "zh"
    if name.startswith("LATIN"):
        return "en" if len(word) > 1 or word in "aAI" else ""
    return "other"
