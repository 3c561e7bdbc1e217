"""pass@1, cons@k, pass@k and their intervals against numbers counted by hand; equality of answers by the real verifiers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megatron_r1 import evaluation
from megatron_r1.evaluation import Attempt, Estimate, classes, consensus, estimate, pass_at_k, record, scores, table
from megatron_r1.sample_file import SampleFile
from megatron_r1.types import Problem, Sample
from megatron_r1.verifying.scoring import Scorer


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer({"accuracy": 1.0}, timeout_seconds=20.0) as pool:
        yield pool


def never(judge: str, found: str, reference: str) -> bool | None:
    raise AssertionError(f"asked whether {found!r} equals {reference!r}, which the texts say themselves")


def group(problem: int, reference: str, *answers: str | None, source: str = "", unjudged: int = 0) -> list[Attempt]:
    """An attempt an answer, correct where it is the reference's text; None = no final answer; then some that no verifier judged."""
    asked = Problem(problem, f"p{problem}", reference, source)
    length = 10 * (problem + 1)
    judged = [
        Attempt(asked, "accuracy", a == reference, a, length, truncated=a is None, rewards={"accuracy": float(a == reference)})
        for a in answers
    ]
    failed = [Attempt(asked, "accuracy", None, None, length, truncated=False, failures={"accuracy": "timed out"})] * unjudged
    return judged + failed


# Four problems of four samples, counted by hand:
#   0  7 7 5 3      pass@1 2/4; votes 7:2 5:1 3:1         -> the most is 7, correct       cons 1
#   1  7 5 5 3      pass@1 1/4; votes 7:1 5:2 3:1         -> the most is 5, wrong         cons 0
#   2  7 7 5 5      pass@1 2/4; votes 7:2 5:2             -> drawn between two, one right cons 1/2
#   3  5 - - -      pass@1 0/4; votes 5:1                 -> wrong                        cons 0
# pass@1 = (2 + 1 + 2 + 0) / 16 = 5/16;  cons@4 = (1 + 0 + 1/2 + 0) / 4 = 3/8
# pass@2: 1 - C(2,2)/C(4,2) = 5/6;  1 - C(3,2)/6 = 1/2;  5/6;  0  -> mean 13/24
HAND = [
    group(0, "7", "7", "7", "5", "3", source="a"),
    group(1, "7", "7", "5", "5", "3", source="a"),
    group(2, "7", "7", "7", "5", "5", source="b"),
    group(3, "7", "5", None, None, None, source="b"),
]
ATTEMPTS = [one for some in HAND for one in some]


def test_pass_1_cons_k_and_pass_k_are_what_a_hand_counts():
    [every, a, b] = scores(ATTEMPTS, k=4, pass_at=[2, 4], equal=never)
    assert (every.problems, every.samples) == (4, 16)
    assert every.pass_1.mean == pytest.approx(5 / 16)
    assert every.cons.mean == pytest.approx(3 / 8)
    assert every.pass_k[2].mean == pytest.approx(13 / 24)
    assert every.pass_k[4].mean == pytest.approx(3 / 4), "any of all four samples: every problem but the last"
    assert (a.source, a.problems, a.samples) == ("a", 2, 8)
    assert (a.pass_1.mean, a.cons.mean) == (pytest.approx(3 / 8), pytest.approx(1 / 2))
    assert (b.source, b.pass_1.mean, b.cons.mean) == ("b", pytest.approx(2 / 8), pytest.approx(1 / 4))
    assert (every.truncated, every.length_mean, every.length_p95) == (3 / 16, 25.0, 40.0)


def test_the_order_in_which_samples_arrive_changes_nothing():
    assert scores(ATTEMPTS[::-1], k=4, pass_at=[2], equal=never) == scores(ATTEMPTS, k=4, pass_at=[2], equal=never)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (("7", "5", "3"), 1 / 3),  # three answers drawn from
        (("7", "7", "7", "5", "5"), 1.0),
        (("7", "5", "5", "3", "3"), 0.0),
        (("7", "7", "5", "5", "3", "3", "1"), 1 / 3),
        (("5", "5"), 0.0),
        ((None, None), 0.0),  # no vote, so nothing is chosen
        (("7", None, None), 1.0),  # and no answer is not an answer
    ],
)
def test_ties_count_what_drawing_one_of_the_tied_answers_would_give(answers: tuple[str | None, ...], expected: float):
    assert consensus(group(0, "7", *answers), never) == (pytest.approx(expected), 0)


def test_equal_answers_in_different_clothes_are_one_answer(scorer: Scorer):
    halves = ["\\frac{1}{2}", "1/2", "0.5", "$0.50$", " 1 / 2 ", "\\dfrac12", "\\frac{2}{4}"]
    assert classes(halves, lambda found, first: scorer.equal("accuracy", found, first)) == ([7], 0)
    mixed = ["1/2", "x+1", "0.5", "2", "1+x", "\\frac{1}{2}", "3"]
    assert classes(mixed, lambda found, first: scorer.equal("accuracy", found, first)) == ([3, 2, 1, 1], 0)


def test_wrong_answers_that_are_equal_win_the_vote_together(scorer: Scorer):
    """Three right of seven; of the wrong, four are one half: apart they would lose 3 to 2, together they win 4 to 3."""
    some = group(0, "3", "3", "3", "3", "1/2", "0.5", "\\frac{1}{2}", "\\frac12")
    assert consensus(some, scorer.equal) == (0.0, 0)
    assert consensus(some, lambda *_: False)[0] == 1.0


def test_plain_numbers_are_compared_without_a_verifier():
    def refuse(found: str, first: str) -> bool:
        raise AssertionError(f"{found} {first}")

    assert classes(["10", "0.5", "1/2", "+10.0", "-3", "007", "7", "0.50"], refuse) == ([2, 3, 1, 2], 0)
    long = "9" * 5000  # longer than int() reads
    assert classes([long, long], refuse) == ([2], 0)


def test_answers_the_verifier_cannot_compare_are_counted_and_stay_apart(scorer: Scorer):
    sizes, undecided = classes(["}{", "{}{", "}{"], lambda found, first: scorer.equal("accuracy", found, first))
    assert (sizes, undecided) == ([2, 1], 1)


def test_a_failed_verifier_is_neither_right_nor_wrong_and_is_counted():
    rows = scores([*group(0, "7", "7", "5", unjudged=2), *group(1, "7", unjudged=4)], k=4, equal=never)
    assert (rows[0].pass_1, rows[0].cons) == (Estimate(0.5, None, 1), Estimate(0.5, None, 1)), "the second problem has no verdict at all"
    assert (rows[0].problems, rows[0].samples, rows[0].unjudged, rows[0].failures) == (2, 8, 6, 6)
    figures = record(rows)
    assert (figures["eval/unjudged"], figures["eval/verifier_failures"], figures["eval/accuracy"]) == (6.0, 6.0, 0.5)
    nobody = scores(group(0, "7", unjudged=4), k=4, equal=never)
    assert nobody[0].pass_1 is None
    assert "eval/pass@1" not in record(nobody), "not 0"


def test_the_interval_is_the_normal_one_over_problems():
    """Of 1, 0.5, 0, 0.5, 1: mean 0.6, sample variance 0.7 / 4 = 0.175, standard error sqrt(0.175 / 5) = 0.187083."""
    found = estimate([1.0, 0.5, 0.0, 0.5, 1.0])
    assert (found.mean, found.stderr, found.count) == (pytest.approx(0.6), pytest.approx(0.187083, abs=1e-6), 5)
    assert found.interval == (pytest.approx(0.233325, abs=1e-5), pytest.approx(0.966675, abs=1e-5))
    assert estimate([1.0, 0.0]).interval == (0.0, 1.0), "cut to what a share can be"
    assert estimate([1.0]).interval is None
    assert estimate([]) is None


def test_the_interval_does_not_shrink_with_samples_of_the_same_problem():
    few = scores([*group(0, "7", "7"), *group(1, "7", "5")], k=1, equal=never)
    many = scores([*group(0, "7", *["7"] * 50), *group(1, "7", *["5"] * 50)], k=50, equal=never)
    assert few[0].pass_1 == many[0].pass_1 == Estimate(0.5, pytest.approx(0.5), 2)
    assert few[0].cons is None, "one sample is no vote"


def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample():
    assert [pass_at_k(4, 1, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert (pass_at_k(5, 0, 3), pass_at_k(5, 2, 3)) == (0.0, 0.9)
    assert pass_at_k(3, 2, 2) == 1.0


def sample(text: str, *, rewards: dict[str, float], failures: dict[str, str] | None = None, finish: str = "stop") -> Sample:
    one = Sample(Problem(3, "2+2?", "4", "sums"), 1, [1], [5, 6, 7], [-1.0] * 3, finish, weight_version=0, text=text)
    one.rewards, one.failures = rewards, failures or {}
    return one


def test_an_attempt_is_judged_by_the_first_judge_that_looked_at_it():
    right = sample("<think>a</think>\\boxed{4}", rewards={"accuracy": 1.0, "format": 0.0})
    assert evaluation.attempt(right, judges=["code", "accuracy"]) == Attempt(
        right.problem, "accuracy", True, "4", 3, truncated=False, rewards={"accuracy": 1.0, "format": 0.0}
    )
    failed = sample("\\boxed{4}", rewards={"format": 1.0}, failures={"accuracy": "no verdict"}, finish="length")
    found = evaluation.attempt(failed, judges=["accuracy"])
    assert (found.judge, found.correct, found.answer, found.truncated) == ("accuracy", None, None, True)
    stranger = evaluation.attempt(right, judges=["language"])
    assert (stranger.judge, stranger.correct) == ("", None)


def test_a_reward_without_final_answers_has_no_vote():
    code = [Attempt(Problem(0, "p", ""), "format", i == 0, None, 5, truncated=False) for i in range(4)]
    [row] = scores(code, k=4, equal=never)
    assert (row.cons, row.pass_1.mean) == (None, 0.25)


def test_the_answer_is_what_the_reward_s_own_module_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "letters.py").write_text("final_answer = str.lower\n\n\ndef chosen(completion):\n    return completion[-1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert evaluation.final_answer("own.letters", "It is C") == "C"
    assert evaluation.final_answer("accuracy", "It is \\boxed{C}") == "C"
    assert evaluation.final_answer("format", "It is \\boxed{C}") is None


def test_the_table_has_a_row_for_all_and_for_each_source():
    console = Console(width=140, record=True)
    console.print(table(scores(ATTEMPTS, k=4, pass_at=[2], equal=never), title="tiny"))
    lines = console.export_text().splitlines()
    [every] = [line for line in lines if "all" in line]
    assert "4 x 4" in every
    assert "0.312 [0.078, 0.547]" in every  # the problems' 1/2, 1/4, 1/2, 0 have standard error 0.11968
    assert "0.375" in every
    assert "18.8%" in every
    assert [line.split()[1] for line in lines if "2 x 4" in line] == ["a", "b"]


def test_metrics_name_k_and_the_source():
    figures = record(scores(ATTEMPTS, k=4, pass_at=[2], equal=never))
    assert figures["eval/cons@4"] == pytest.approx(3 / 8)
    assert figures["eval/pass@2"] == pytest.approx(13 / 24)
    assert figures["eval/a/pass@1"] == pytest.approx(3 / 8)
    assert figures["eval/b/samples"] == 8.0
    assert all(isinstance(value, float) for value in figures.values())
    assert not any(name.startswith("eval/a/") for name in record(scores(ATTEMPTS[:8], k=4, equal=never))), "one source needs no row"


def test_a_line_a_sample_and_no_file_before_the_last(tmp_path: Path):
    path = tmp_path / "eval" / "samples.jsonl"
    failed = sample("\\boxed{5}", rewards={}, failures={"accuracy": "no verdict"})
    with SampleFile(path) as file:
        for one in (sample("\\boxed{4}", rewards={"accuracy": 1.0}), failed):
            file.write(one, evaluation.attempt(one, judges=["accuracy"]))
        assert not path.exists()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["problem"], r["source"], r["completion"], r["answer"], r["correct"], r["length"]) for r in rows] == [
        (3, "sums", "\\boxed{4}", "4", True, 3),
        (3, "sums", "\\boxed{5}", None, None, 3),
    ]
    assert rows[1]["failures"] == {"accuracy": "no verdict"}
    with pytest.raises(KeyboardInterrupt), SampleFile(tmp_path / "other.jsonl"):
        raise KeyboardInterrupt
    assert not (tmp_path / "other.jsonl").exists()
