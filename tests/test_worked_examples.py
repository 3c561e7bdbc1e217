"""Worked examples: what the cold start learns earns every reward."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1 import checks, config, data, worked_examples
from megatron_r1.__main__ import main
from megatron_r1.conversations import Conversations
from megatron_r1.problem import Problem
from megatron_r1.rewards import accuracy, format, language

CONFIG = Path(__file__).resolve().parents[1] / "configs/tiny_sft.toml"


@pytest.mark.parametrize(
    ("prompt", "reasoning"),
    [
        ("25 + 47", "5+7=12 2+4+1=7"),
        ("10 + 20", "0+0=0 1+2=3"),
        ("99+1", "9+1=10 9+0+1=10"),
        ("946 + 905", "6+5=11 4+0+1=5 9+9=18"),
        ("8 + 95", "8+5=13 0+9+1=10"),
    ],
)
def test_columns_are_added_with_their_carry(prompt: str, reasoning: str):
    assert worked_examples.solution(prompt).startswith(f"<think>{reasoning}</think>")


def test_every_worked_example_earns_accuracy_and_format():
    problems = [Problem(0, f"{a} + {b}", str(a + b)) for a in range(0, 120, 7) for b in range(0, 120, 11)]
    for problem, conversation in zip(problems, worked_examples.conversations(problems), strict=True):
        user, assistant = conversation.messages
        assert user == {"role": "user", "content": problem.prompt}
        assert accuracy.reward(assistant["content"], problem) == format.reward(assistant["content"], problem) == 1.0


def test_a_prompt_that_is_not_a_sum_is_a_one_line_error():
    with pytest.raises(ValueError, match=r"prompt '3 \* 4': worked examples are for sums"):
        worked_examples.conversations([Problem(0, "3 * 4", "12")])


def test_a_terse_example_is_the_right_answer_without_reasoning():
    assert worked_examples.solution("25 + 47", reasons=False) == "<think></think><answer>72</answer>"


def test_the_share_of_terse_examples_is_as_asked_and_every_answer_is_right():
    problems = [Problem(i, f"{10 + i % 90} + {10 + i * 7 % 90}", str(10 + i % 90 + 10 + i * 7 % 90)) for i in range(2000)]
    answers = [c.messages[1]["content"] for c in worked_examples.conversations(problems, terse=0.6)]
    assert 0.55 < sum("<think></think>" in answer for answer in answers) / len(problems) < 0.65
    assert all(f"<answer>{p.answer}</answer>" in answer for p, answer in zip(problems, answers, strict=True))


def test_steps_begin_with_words_of_both_languages_and_the_language_reward_sees_the_share():
    problems = [Problem(i, f"{100 + i} + {999 - i}", str(1099)) for i in range(300)]
    answers = [c.messages[1]["content"] for c in worked_examples.conversations(problems, words=worked_examples.ADD)]
    shares = [language.reward(answer, problem) for answer, problem in zip(answers, problems, strict=True)]
    assert 0.4 < sum(shares) / len(shares) < 0.6
    assert {0.0, 1.0} < set(shares), "whole and mixed ones"


def test_the_command_writes_what_the_cold_start_learns_and_not_what_it_is_tested_on(tmp_path):
    written = tmp_path / "new" / "cold_start.jsonl"
    given = [str(CONFIG), f"data.conversations={written}", "data.size=40", "data.held_out=10", "evaluation.problems=0"]
    assert main(["worked-examples", *given]) == 0
    settings = config.load("sft", CONFIG, given[1:])
    checks.check_data(settings)
    _, held_out = data.split_held_out(data.load_problems(**settings.data.problems(), seed=1), 10, seed=1)
    learned = {conversation.messages[0]["content"] for conversation in Conversations(str(written))}
    assert len(learned) == 30
    assert not {problem.prompt for problem in held_out} & learned


def test_the_command_without_a_config_says_what_it_needs(capsys):
    assert main(["worked-examples"]) == 2
    assert "give an SFT config" in capsys.readouterr().err
