"""The figures of a rollout, by hand."""

from __future__ import annotations

import math

import pytest

from megatron_r1.config_types import Evaluation
from megatron_r1.summary import completion_rows, completions_page, reward_record, rollout_record
from megatron_r1.types import Problem, Sample

JUDGES = Evaluation().judges


def sample(problem: int, index: int, *, accuracy: float | None, length: int = 4, finish: str = "stop") -> Sample:
    s = Sample(Problem(problem, f"p{problem}", "1"), index, [1, 2], [3] * length, [-1.0] * length, finish, weight_version=6, text="x")
    if accuracy is None:
        s.failures, s.reward = {"accuracy": "timed out"}, math.nan
    else:
        s.rewards, s.reward = {"accuracy": accuracy}, accuracy
    return s


SAMPLES = [
    sample(0, 0, accuracy=1.0, length=2),
    sample(0, 1, accuracy=0.0, length=4),
    sample(1, 0, accuracy=0.0, length=6),
    sample(1, 1, accuracy=0.0, length=8, finish="length"),
    sample(2, 0, accuracy=1.0, length=2),
    sample(2, 1, accuracy=None, length=2),
]


def test_rewards_count_what_was_verified_and_name_what_was_not():
    r = reward_record(SAMPLES, judges=JUDGES)
    assert r["reward/mean"] == pytest.approx(2 / 5)
    assert r["reward/accuracy"] == pytest.approx(2 / 5)
    assert r["reward/verifier_failures"] == 1.0


def test_groups_without_a_gradient_are_counted():
    r = reward_record(SAMPLES, judges=JUDGES)
    assert r["reward/all_0_groups"] == pytest.approx(1 / 3)
    assert r["reward/equal_groups"] == pytest.approx(2 / 3), "all wrong, and one verified sample alone"


def test_each_source_has_its_mean_where_there_are_several():
    assert not [name for name in reward_record(SAMPLES, judges=JUDGES) if name.startswith("reward/source/")]
    other = sample(3, 0, accuracy=1.0)
    other.problem = Problem(3, "p3", "1", source="logic")
    r = reward_record([*SAMPLES, other], judges=JUDGES)
    assert r["reward/source/logic"] == 1.0
    assert r["reward/source/"] == pytest.approx(2 / 5)


@pytest.mark.parametrize("name", ["accuracy", "code", "bugfix", "choice", "short_answer"])
def test_solved_is_whatever_judges_the_answer_of_its_source(name: str):
    one, other = sample(0, 0, accuracy=0.0), sample(0, 1, accuracy=0.0)
    one.rewards, other.rewards = {name: 1.0, "format": 0.0}, {name: 0.0, "format": 1.0}
    assert reward_record([one, other], judges=JUDGES)["reward/solved"] == 0.5


def test_what_nobody_judges_is_neither_solved_nor_wrong():
    general = [sample(3, i, accuracy=None, length=100) for i in range(2)]
    for one in general:
        one.failures, one.rewards = {}, {"helpful": 0.9}
    with_general = reward_record([*SAMPLES, *general], judges=JUDGES)
    for name in ("solved", "all_0_groups", "all_1_groups"):
        assert with_general[f"reward/{name}"] == reward_record(SAMPLES, judges=JUDGES)[f"reward/{name}"]
    assert with_general["reward/solved"] == pytest.approx(2 / 5)
    assert "reward/solved" not in reward_record(general, judges=JUDGES)
    assert reward_record(general, judges=["helpful"])["reward/solved"] == 0.0, "a judge of the user's own"
    assert rollout_record([*SAMPLES, *general], version=8, judges=JUDGES)["rollout/length_wrong"] == 6.0


def test_lengths_truncation_and_staleness():
    r = rollout_record(SAMPLES, version=8, judges=JUDGES)
    assert (r["rollout/length_mean"], r["rollout/length_max"], r["rollout/staleness_max"]) == (4.0, 8.0, 2.0)
    assert r["rollout/truncated"] == pytest.approx(1 / 6)
    assert r["rollout/length_correct"] == 2.0
    assert r["rollout/length_wrong"] == 6.0, "the one without a verdict is not among them"


def test_a_page_of_completions_shows_failures():
    assert "accuracy FAILED: timed out" in completions_page(SAMPLES, 6)


def test_reflective_words_are_whole_words_in_any_case_counted_a_completion():
    texts = ["Wait, that is wrong. wait: let me CHECK.", "Waiter, checked, butter", "However"]
    for s, text in zip(SAMPLES, texts * 2):
        s.text = text
    r = rollout_record(SAMPLES, version=8, judges=JUDGES)
    assert r["rollout/reflective_words"] == pytest.approx((4 + 0 + 1) / 3)
    assert r["rollout/reflective_wait"] == pytest.approx(2 / 3)


def test_completions_as_data_keep_a_long_text_s_ends():
    SAMPLES[0].text = "a" * 5000 + "b" * 5000
    first, *_, last = completion_rows(SAMPLES, 6)
    assert (first["completion"][0], first["completion"][-1]) == ("a", "b")
    assert "4,000 characters left out" in first["completion"]
    assert (last["failures"], last["rewards"], last["finish_reason"]) == ({"accuracy": "timed out"}, {}, "stop")
    assert len(completion_rows(SAMPLES, 2)) == 2
