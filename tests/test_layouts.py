"""The columns of AIME, MATH-500 and GPQA become problems, from data set folders made here."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from megatron_r1 import data
from megatron_r1.layouts import BOXED, LETTER
from megatron_r1.rewards.accuracy import reward

GPQA = {
    "Record ID": "rec0",
    "Question": "Which of these is a prime?",
    "Correct Answer": "7\n",
    "Incorrect Answer 1": "8",
    "Incorrect Answer 2": "9",
    "Incorrect Answer 3": "10",
    "Subdomain": "numbers",
}


def folder(path: Path, *rows: dict) -> str:
    datasets.Dataset.from_list(list(rows)).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"id": 60, "problem": "Find x.", "solution": "...", "answer": "204", "url": "u", "year": "2024"},
        {"ID": "2024-I-1", "Problem": "Find x.", "Solution": "...", "Answer": 204},
        {"question": "Find x.", "answer": "204"},
        {"problem_idx": 1, "problem": "Find x.", "answer": 204, "problem_type": ["Algebra"]},
    ],
)
def test_aime_in_each_spelling_of_its_columns(tmp_path: Path, row: dict):
    name = folder(tmp_path / "aime", row)
    [problem] = data.load_problems(huggingface=name, layout="aime")
    assert (problem.id, problem.prompt, problem.answer, problem.source) == (0, f"Find x.\n\n{BOXED}", "204", name)


def test_a_leading_zero_of_aime_s_answers_is_none_to_the_verifier(tmp_path: Path):
    [problem] = data.load_problems(huggingface=folder(tmp_path / "aime", {"problem": "p", "answer": "025"}), layout="aime")
    assert (reward("</think>\\boxed{25}", problem), reward("</think>\\boxed{250}", problem)) == (1.0, 0.0)


def test_math_500_keeps_its_latex(tmp_path: Path):
    row = {"problem": "Convert.", "solution": "s", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus", "level": 2}
    [problem] = data.load_problems(
        huggingface=folder(tmp_path / "math", row | {"unique_id": "test/precalculus/807.json"}), layout="math500"
    )
    assert (problem.prompt, problem.answer) == (f"Convert.\n\n{BOXED}", "\\left( 3, \\frac{\\pi}{2} \\right)")
    assert reward("</think>\\boxed{(3, \\pi/2)}", problem) == 1.0


def options(prompt: str) -> dict[str, str]:
    return dict(line.split(") ") for line in prompt.splitlines() if line[1:2] == ")")


def test_gpqa_shuffles_its_options_and_the_answer_is_the_letter_of_the_right_one(tmp_path: Path):
    rows = [GPQA | {"Question": f"Question {i}?"} for i in range(40)]
    name = folder(tmp_path / "gpqa", *rows)
    problems = data.load_problems(huggingface=name, layout="gpqa", seed=1)
    for i, problem in enumerate(problems):
        assert problem.prompt.startswith(f"Question {i}?\n\nA) ")
        assert problem.prompt.endswith(LETTER)
        assert sorted(options(problem.prompt).values()) == ["10", "7", "8", "9"]
        assert options(problem.prompt)[problem.answer] == "7"
    counts = [[p.answer for p in problems].count(letter) for letter in "ABCD"]
    assert min(counts) >= 3, f"no letter is the answer too seldom: {counts}"
    assert problems == data.load_problems(huggingface=name, layout="gpqa", seed=1)
    assert [p.answer for p in problems] != [p.answer for p in data.load_problems(huggingface=name, layout="gpqa", seed=2)]


def test_gpqa_is_read_from_its_csv_and_its_letter_is_judged(tmp_path: Path):
    (tmp_path / "gpqa").mkdir()
    datasets.Dataset.from_list([GPQA]).to_csv(str(tmp_path / "gpqa" / "gpqa_diamond.csv"))
    [problem] = data.load_problems(huggingface=str(tmp_path / "gpqa"), layout="gpqa")
    assert options(problem.prompt)[problem.answer] == "7"
    for text, score in ((problem.answer, 1.0), (f"\\text{{{problem.answer}}}", 1.0), ("E", 0.0)):
        assert reward(f"</think>\\boxed{{{text}}}", problem) == score, text


def test_a_gpqa_question_has_the_same_options_whatever_stands_before_it(tmp_path: Path):
    alone = data.load_problems(huggingface=folder(tmp_path / "one", GPQA), layout="gpqa", seed=3)
    after = data.load_problems(huggingface=folder(tmp_path / "two", GPQA | {"Question": "Another?"}, GPQA), layout="gpqa", seed=3)
    assert alone[0].prompt == after[1].prompt


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("aime", {"task": "x", "answer": "1"}, r"\[0\]: no text in a column 'problem' or 'question' among 'task', 'answer'"),
        ("math500", {"problem": "x", "answer": " "}, "no text in a column 'answer'"),
        ("gpqa", {"Question": "q", "Correct Answer": "1"}, "no text in a column 'incorrect answer 1' or 'incorrect_answer_1'"),
        ("gpqa", GPQA | {"Incorrect Answer 2": "7"}, "two options are the same text"),
    ],
)
def test_a_row_of_another_layout_is_a_one_line_error(tmp_path: Path, layout: str, row: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        data.load_problems(huggingface=folder(tmp_path / "other", row), layout=layout)
    assert "\n" not in str(error.value)
