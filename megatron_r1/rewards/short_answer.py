"""1.0 if the final answer has the reference's words: for logic puzzles whose answer is a name, a word or a list of them.

The final answer is the last box or `<answer>` (completion.py). Case, white space, the width of characters, quotation marks,
emphasis and punctuation at the ends of the text do not count.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_r1.problem import Problem
from megatron_r1.verifying.completion import final_answer, without_marks

QUOTES = re.compile("[\"\u201c\u201d]")
COMMA = re.compile("\\s*[,\u3001]\\s*")  # and the one that Chinese has in lists
ENDS = " .,;:!?'\u2018\u2019\u3002"


def reward(completion: str, problem: Problem) -> float:
    """1.0 or 0.0. Raises ValueError for a reference of which nothing is left."""
    expected = normalised(problem.answer)
    if not expected:
        raise ValueError(f"short answer: the reference answer {problem.answer!r:.80} has no words")
    found = final_answer(completion)
    return float(found is not None and normalised(found) == expected)


def normalised(text: str) -> str:
    """What two texts that are the same answer have in common."""
    text = QUOTES.sub("", without_marks(unicodedata.normalize("NFKC", text)))
    return COMMA.sub(", ", " ".join(text.split())).casefold().strip(ENDS)
