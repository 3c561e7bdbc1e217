"""Options and short answers: what a completion chose, however it wrote it, and no credit for naming them all."""

from __future__ import annotations

import pytest

from megatron_r1.problem import Problem
from megatron_r1.rewards import choice, short_answer


def problem(answer: str) -> Problem:
    return Problem(id=0, prompt="", answer=answer)


@pytest.mark.parametrize(
    ("conclusion", "letter"),
    [
        ("So it is \\boxed{C}.", "C"),
        ("\\boxed{\\text{C}}", "C"),
        ("\\boxed{(c)}", "C"),
        ("\\boxed{\\mathbf{C}. 42\\,J}", "C"),
        ("<answer>C</answer>", "C"),
        ("<answer>(C) 42 J</answer>", "C"),
        ("<answer> C. 42 J\n</answer>", "C"),
        ("<answer>The answer is C</answer>", "C"),
        ("<answer>Option H</answer>", "H"),
        ("A is tempting. **Answer: C**", "C"),
        ("Answer: (C) 42 J", "C"),
        ("The correct answer is C, since option A is too small.", "C"),
        ("the answer is: **C**", "C"),
        ("The best choice is D.", "D"),
        ("Answer: B. No, wait. Answer: C", "C"),
        ("Therefore (C).", "C"),
        ("(C) and, once more, (C)", "C"),
        ("C", "C"),
        ("**C.**", "C"),
        ("B) because it is so", "B"),
        ("\\boxed{A} or rather \\boxed{C}", "C"),
        ("<answer>\\(C\\)</answer>", "C"),
        ("The correct answer is \\(C\\).", "C"),
        ("\\boxed{\\left(\\textit{C}\\right)}", "C"),
        ("\\boxed{\\boldsymbol{C}}", "C"),
        ("\\boxed{\\text{C} \\text{: } 42}", "C"),
        ("\\boxed{C \\text{ (42 J)}}", "C"),
        ("The answer must be C.", "C"),
        ("C is the correct answer, and A is not.", "C"),
        ("\u7b54\u6848\u662f C", "C"),  # "the answer is C"
        ("\u7b54\u6848\uff1a**C**\u3002", "C"),
        ("\u6b63\u786e\u9009\u9879\u662f C\u3002", "C"),
        ("\u6545\u9009C", "C"),  # "so choose C"
        ("<answer>\u7b54\u6848\u662fC</answer>", "C"),
        ("\\boxed{\\text{\u9009\u9879 C}}", "C"),
        # not a choice
        ("(A), (B), (C) or (D)", None),
        ("\\boxed{A, B, C, D}", None),
        ("<answer>A or C</answer>", None),
        ("A cat would say so.", None),
        ("The answer is a cat.", None),
        ("The answer is Hydrogen", None),
        ("I", None),
        ("\\boxed{I}", None),
        ("\\boxed{42}", None),
        ("", None),
    ],
)
def test_the_choice_is_what_the_conclusion_settles_on(conclusion: str, letter: str | None):
    assert choice.chosen(f"<think>Answer: E, no (F), \\boxed{{G}}</think>{conclusion}") == letter
    assert choice.chosen(conclusion) == letter
    for answer in "CD":
        assert choice.reward(conclusion, problem(answer)) == float(letter == answer)


def test_reasoning_that_does_not_end_chooses_nothing():
    assert choice.chosen("<think>Answer: C \\boxed{C}") is None


@pytest.mark.parametrize("answer", ["(C)", "c", "C.", "\\boxed{C}"])
def test_the_reference_may_be_written_as_an_option_too(answer: str):
    reference = answer.removeprefix("\\boxed").strip()
    assert choice.reward("Answer: C", problem(reference)) == 1.0


@pytest.mark.parametrize("answer", ["42", "I", "AB", "", "cat"])
def test_a_reference_that_is_no_letter_is_an_error_and_not_a_0(answer: str):
    with pytest.raises(ValueError, match="is not a letter from A to H"):
        choice.reward("Answer: C", problem(answer))


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("<think>x</think><answer>the red house</answer>", "The Red House", 1.0),
        ('\\boxed{\\text{red, "blue" ,green}}', "Red,blue, green.", 1.0),
        ("<answer> **NORTH**\n</answer>", "north", 1.0),
        ("\\boxed{Zoey\\ is\\ a\\ \\textit{knight}}", "Zoey is a knight", 1.0),
        ("<answer>\u7ea2\u3001\u84dd\u3002</answer>", "\u7ea2, \u84dd", 1.0),  # "red, blue."
        ("<answer>\uff21\uff22</answer>", "ab", 1.0),
        ("<answer>'knave'!</answer>", "knave", 1.0),
        ("<answer>O'Brien</answer>", "O'Brien", 1.0),
        ("<answer>red house</answer>", "the red house", 0.0),
        ("<answer>blue, red</answer>", "red, blue", 0.0),
        ("<answer>knight or knave</answer>", "knave", 0.0),
        ("knave", "knave", 0.0),
        ("<think><answer>knave</answer>", "knave", 0.0),
        ("<answer></answer>", "knave", 0.0),
    ],
)
def test_a_short_answer_has_the_references_words_and_no_others(completion: str, answer: str, score: float):
    assert short_answer.reward(completion, problem(answer)) == score


def test_a_reference_without_words_is_an_error():
    with pytest.raises(ValueError, match="has no words"):
        short_answer.reward("<answer></answer>", problem(" . "))
