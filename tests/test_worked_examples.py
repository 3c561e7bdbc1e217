"""Worked examples: what the cold start learns earns every reward."""

from __future__ import annotations

import pytest

from megatron_r1 import worked_examples
from megatron_r1.problem import Problem
from megatron_r1.rewards import accuracy, format


@pytest.mark.parametrize(
    ("prompt", "reasoning"),
    [("25 + 47", "5+7=12 2+4+1=7"), ("10 + 20", "0+0=0 1+2=3"), ("99+1", "9+1=10 9+0+1=10"), ("8 + 95", "8+5=13 0+9+1=10")],
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


def test_a_slip_is_carried_through_to_the_answer():
    assert worked_examples.solution("25 + 47", slip=(0, 1)) == "<think>5+7=13 2+4+1=7</think><answer>73</answer>"
    assert worked_examples.solution("25 + 47", slip=(1, -1)) == "<think>5+7=12 2+4+1=6</think><answer>62</answer>"


def test_the_share_of_wrong_answers_is_the_share_of_slips():
    problems = [Problem(i, f"{10 + i % 90} + {10 + i * 7 % 90}", str(10 + i % 90 + 10 + i * 7 % 90)) for i in range(2000)]
    made = worked_examples.conversations(problems, slips=0.6)
    wrong = sum(f"<answer>{p.answer}</answer>" not in c.messages[1]["content"] for p, c in zip(problems, made))
    assert 0.55 < wrong / len(problems) < 0.65
