"""Rewards: what counts as the final answer, the format, the language."""

from __future__ import annotations

import subprocess
import sys
import time

import math_verify
import pytest

from megatron_r1.problem import Problem
from megatron_r1.rewards import accuracy, choice, format, language, short_answer
from megatron_r1.verifying.completion import code_blocks

RIGHT = [
    ("<think>1+1</think><answer>2</answer>", "2"),
    ("<think>first \\boxed{3}</think> The answer is \\boxed{2}.", "2"),
    ("<think>a</think><answer>1</answer> no, wait <answer>2</answer>", "2"),
    ("<think>a</think><answer>it is \\boxed{\\frac{1}{2}}</answer>", "0.5"),
    ("\\boxed{1} or rather \\boxed{2}", "2"),
    ("<answer> 02.0 </answer>", "2"),
    ("<answer>$\\dfrac{1}{2}$</answer>", "\\frac12"),
    ("<answer>1+x^2</answer>", "x^2+1"),
    ("<answer>(1, 2)</answer>", "(1,2)"),
    ("<answer>3,000</answer>", "3000"),
    ("<answer>Paris</answer>", "Paris"),
    ("<answer>204.</answer>", "204"),
    ("<answer>$204$.</answer>", "204"),
    ("<answer>**204**</answer>", "204"),
    ("<answer> 204, </answer>", "204"),
    ("<answer>18 dollars.</answer>", "18 dollars"),
    ("<answer>$18</answer>", "18"),
    ("<answer>.5</answer>", "0.5"),
    ("<answer>Paris.</answer>", "Paris"),
    ("\\boxed{42\\,}", "42"),
    ("\\boxed{x^2\\;}", "x^2"),
    ("\\boxed{42}", "42\\,"),
    ("<answer>$5\\,$</answer>", "5"),
    ("<answer>The answer is 5.</answer>", "5"),
    ("<answer>She makes $18 every day.</answer>", "18"),
    ("<answer>The answer is $5$.</answer>", "5"),
    ("\\boxed{\\text{east}}", "\\text{East}"),
    ("\\boxed{204}", "204."),
    ("\\boxed{\\text{\u7532}}", "\u7532\u3002"),
    ("\\boxed{2} and then an open \\boxed{3", "2"),
]
WRONG = [
    ("<think>1+1</think><answer>3</answer>", "2"),
    ("<think>the answer is \\boxed{2}", "2"),
    ("<think>\\boxed{2}</think> I do not know.", "2"),
    ("<think>a</think><answer>2</answer> no, wait <answer>1</answer>", "2"),
    ("2", "2"),
    ("", "2"),
    ("<answer></answer>", "2"),
    ("<answer>2</answer", "2"),
    ("<answer>\\frac{</answer>", "2"),
    ("<answer>12</answer>", "1,2"),
    ("<answer>London</answer>", "Paris"),
    ("<answer>x^2</answer>", "x^2+1"),
    ("<answer>2.5</answer>", "25"),
    (f"\\boxed{{{'9' * 5000}}}", "204"),
    ("\\boxed{\\text{AB}}", "\\text{BA}"),
    ("\\boxed{\\text{stop}}", "\\text{pots}"),
    ("\\boxed{\\text{Peter and Mary}}", "\\text{Mary and Peter}"),
]


def problem(answer: str = "", prompt: str = "") -> Problem:
    return Problem(id=0, prompt=prompt, answer=answer)


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_a_right_final_answer_scores_1(completion: str, answer: str):
    assert accuracy.reward(completion, problem(answer)) == 1.0


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_a_wrong_missing_or_unfinished_answer_scores_0(completion: str, answer: str):
    assert accuracy.reward(completion, problem(answer)) == 0.0


def test_a_reference_that_cannot_be_judged_is_an_error_and_not_a_0(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math_verify, "verify", lambda *_, **__: False)
    with pytest.raises(ValueError, match="cannot judge the reference answer 'x'"):
        accuracy.reward("<answer>y</answer>", problem("x"))


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\n\nb\n</think>\n<answer>b</answer>\n", 1.0),
        ("<think>a</think>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b</answer> bye", 0.0),
        ("so <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think>a<answer></think>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_format_is_each_tag_once_in_order_and_nothing_outside(completion: str, score: float):
    assert format.reward(completion, problem()) == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>\na\n</think>\n\nIt is \\boxed{2}.", 1.0),
        ("<think>a</think><answer>2</answer>", 1.0),
        ("<think>a</think> \n", 0.0),
        ("<think>a", 0.0),
        ("so <think>a</think>2", 0.0),
        ("<think>a</think>2</think>3", 0.0),
        ("2", 0.0),
    ],
)
def test_without_answer_tags_format_is_reasoning_in_its_tags_and_an_answer_of_any_form(completion: str, score: float):
    assert format.reward(completion, problem(), answer_tags=False) == score


CHINESE = "\u6211\u4eec\u5148\u7b97\u4e00\u4e0b"  # six characters


@pytest.mark.parametrize(
    ("reasoning", "prompt", "options", "share"),
    [
        ("we add the two numbers", "What is 1+1?", {}, 1.0),
        (CHINESE, "What is 1+1?", {}, 0.0),
        (CHINESE, CHINESE, {}, 1.0),
        ("we add " + CHINESE, "What is 1+1?", {}, 0.25),
        ("we add " + CHINESE, "What is 1+1?", {"language": "zh"}, 0.75),
        ("\u043f\u0440\u0438\u0432\u0435\u0442 world", "Hi", {}, 0.5),
        ("3 + 4x = \\frac{1}{2} y", "", {}, 1.0),
        ("3+4=7", CHINESE, {}, 1.0),
        (CHINESE + " $\\triangle ABC$ \\(AB \\perp dx\\) \\begin{cases} 1 \\end{cases}", CHINESE, {}, 1.0),
        (CHINESE + " $$\\text{maximum of}\n x$$", CHINESE, {}, 6 / 7),
        (f"we add ${CHINESE}$", "What is 1+1?", {}, 0.25),
        ("", "What is 1+1?", {}, 0.0),
    ],
)
def test_language_is_the_share_of_the_reasonings_words(reasoning: str, prompt: str, options: dict, share: float):
    answer = "<answer>\u043e\u0442\u0432\u0435\u0442</answer>"  # what is outside the reasoning does not count
    assert language.reward(f"<think>{reasoning}</think>{answer}", problem(prompt=prompt), **options) == pytest.approx(share)
    assert language.reward(f"<think>{reasoning}", problem(prompt=prompt), **options) == pytest.approx(share)


@pytest.mark.parametrize("text", ["\\(", "\\[", "$", "\\boxed{", "$*", "{", " ", "\u7b54\u6848 ", "(A", "\\,", "\n```", "<think>"])
def test_a_text_without_sense_or_end_is_judged_at_once(text: str):
    nonsense = f"<think>a</think>\u7b54\u6848{text * (100_000 // len(text))}"
    started = time.process_time()
    for one in (nonsense, f"<think>{nonsense}", f"{nonsense}</answer>", f"\\boxed{{{nonsense}}}"):
        accuracy.reward(one, problem("1"))
        choice.reward(one, problem("A"))
        short_answer.reward(one, problem("a"))
        language.reward(one, problem())
        format.reward(one, problem())
        code_blocks(one)
    assert time.process_time() - started < 8.0, "a verification may take 10 s; a search that starts anew at every character takes minutes"


def test_a_verifiers_process_does_not_import_torch():
    code = "import sys, megatron_r1.verifying.grading\n"
    code += "from megatron_r1.rewards import accuracy, format, language\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
