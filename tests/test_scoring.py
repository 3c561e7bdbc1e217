"""The verifier pool: every verdict arrives in time, and a verifier that fails is counted instead of scoring 0."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_r1.types import Problem, Sample
from megatron_r1.verifying.scoring import Scorer

BAD = """
import os, sys, time
def reward(completion, problem, *, scale=1.0):
    print("a reward may print")
    if completion == "hang":
        time.sleep(1000)
    if completion == "spin":
        9 ** 9 ** 9
    if completion == "hog":
        bytearray(1 << 40)
    if completion == "raise":
        raise KeyError("boom")
    if completion == "exit":
        os._exit(7)
    if completion == "nan":
        return float("nan")
    if completion.startswith("once ") and not os.path.exists(completion[5:]):
        open(completion[5:], "w").close()
        os._exit(9)
    return scale
"""


@pytest.fixture(scope="module")
def bad_reward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dotted name of a reward of somebody else's that misbehaves when told to."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "bad_rewards.py").write_text("")
    (folder / "misbehaving").mkdir()
    (folder / "misbehaving" / "__init__.py").write_text("")
    (folder / "misbehaving" / "bad.py").write_text(BAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield "misbehaving.bad"


@pytest.fixture
def scorer(bad_reward: str) -> Iterator[Callable[..., Scorer]]:
    made: list[Scorer] = []

    def make(weights: dict[str, float] | None = None, **settings: object) -> Scorer:
        made.append(Scorer(weights or {bad_reward: 1.0, "format": 0.5}, **{"timeout_seconds": 10.0, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def sample(text: str, answer: str = "2", *, source: str = "") -> Sample:
    problem = Problem(id=1, prompt="1+1", answer=answer, source=source)
    return Sample(problem, 0, prompt_ids=[1], completion_ids=[2], sampler_logprobs=[0.0], finish_reason="stop", weight_version=0, text=text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hang", "no verdict within 1.5 s"),
        ("spin", "no verdict within 1.5 s|MemoryError"),
        ("hog", "MemoryError"),
        ("raise", "KeyError: 'boom'"),
        ("exit", "died twice, the last time with exit code 7"),
        ("nan", "returned nan"),
    ],
)
def test_a_verifier_that_fails_is_counted_and_the_others_still_score(scorer: Callable[..., Scorer], bad_reward: str, text: str, why: str):
    pool = scorer(timeout_seconds=1.5)
    samples = [sample("fine"), sample(text), sample("<think>a</think><answer>2</answer>")]
    start = time.monotonic()
    pool.collect(samples)
    assert time.monotonic() - start < 30
    assert samples[0].rewards == {bad_reward: 1.0, "format": 0.0}
    assert samples[2].rewards == {bad_reward: 1.0, "format": 1.0}
    assert [samples[0].reward, samples[2].reward] == [1.0, 1.5]
    assert samples[1].rewards == {"format": 0.0}
    assert list(samples[1].failures) == [bad_reward]
    assert any(part in samples[1].failures[bad_reward] for part in why.split("|"))
    assert math.isnan(samples[1].reward)


def test_a_failed_component_of_weight_0_is_counted_but_does_not_cost_the_reward(scorer: Callable[..., Scorer], bad_reward: str):
    one = sample("raise")
    scorer({bad_reward: 0.0, "format": 1.0}).collect([one])
    assert list(one.failures) == [bad_reward]
    assert one.reward == 0.0


def test_a_process_killed_from_outside_costs_no_verdict(scorer: Callable[..., Scorer], tmp_path: Path):
    pool = scorer(workers=2)
    samples = [sample("fine") for _ in range(4)]
    pool.collect(samples)
    for verifier in pool.verifiers:
        os.kill(verifier.process.pid, signal.SIGKILL)
        verifier.process.wait()
    samples += [sample("fine"), sample(f"once {tmp_path / 'marker'}")]
    pool.collect(samples)
    assert not any(s.failures for s in samples)
    assert all(s.reward == 1.0 for s in samples)


def test_a_thousand_completions_are_verified_in_seconds_while_others_arrive(scorer: Callable[..., Scorer]):
    pool = scorer({"accuracy": 1.0, "format": 0.5, "language": 0.1}, workers=2)
    pool.collect([sample("warm up")])
    samples = [sample(f"<think>1+1={i}</think><answer>{i % 4}</answer>") for i in range(1000)]
    start = time.monotonic()
    for one in samples[:500]:
        pool.submit(one)
    pool.collect(samples)
    assert time.monotonic() - start < 30  # 1 s on two idle cores
    assert [s.reward for s in samples] == pytest.approx([(i % 4 == 2) + 0.6 for i in range(1000)])
    assert not pool.pending


def test_options_reach_the_reward(scorer: Callable[..., Scorer], bad_reward: str):
    one = sample("fine")
    scorer({bad_reward: 2.0}, options={bad_reward: {"scale": 3.0}}).collect([one])
    assert (one.rewards, one.reward) == ({bad_reward: 3.0}, 6.0)


def test_a_problems_source_chooses_its_rewards_by_the_first_pattern_that_matches(scorer: Callable[..., Scorer], bad_reward: str):
    by_source = {"math-hard*": {"accuracy": 3.0}, "math*": {"accuracy": 1.0, "format": 1.0}, "logic/[ab]": {"choice": 2.0}}
    pool = scorer({bad_reward: 0.25}, by_source=by_source, options={"format": {"answer_tags": False}})
    text = "<think>a</think>\\boxed{2}"
    samples = [sample(text, source=source) for source in ("math-hard-1", "math", "Math", "logic/c", "")]
    samples.append(sample("<answer>B</answer>", "B", source="logic/a"))
    pool.collect(samples)
    other = {bad_reward: 1.0}
    assert [s.rewards for s in samples] == [{"accuracy": 1.0}, {"accuracy": 1.0, "format": 1.0}, other, other, other, {"choice": 1.0}]
    assert [s.reward for s in samples] == [3.0, 2.0, 0.25, 0.25, 0.25, 2.0]
    assert not any(s.failures for s in samples)


@pytest.mark.parametrize(
    ("by_source", "message"),
    [
        ({"math*": {"acuracy": 1.0}}, "did you mean 'accuracy'"),
        ({"math*": {}}, r"rewards.by_source.'math\*': no rewards"),
        ({"math*": {"json.decoder": 1.0}}, "json.decoder has no function reward"),
    ],
)
def test_a_mistake_in_a_pattern_is_a_one_line_error_before_any_process_starts(by_source: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        Scorer({"format": 1.0}, by_source=by_source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"acuracy": 1.0}, {}, "did you mean 'accuracy'"),
        ({"format": 1.0}, {"format": {"think": True}}, "rewards.options.format: .*'think'"),
        ({"format": 1.0}, {"language": {"language": "en"}}, "rewards.weights has no 'language'"),
        ({"json.decoder": 1.0}, {}, "json.decoder has no function reward"),
    ],
)
def test_an_unknown_reward_or_option_is_a_one_line_error_before_any_process_starts(weights: dict, options: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        Scorer(weights, options=options)
    assert "\n" not in str(error.value)


def test_closing_ends_the_processes_even_while_a_verifier_hangs(scorer: Callable[..., Scorer]):
    pool = scorer()
    pool.collect([sample("fine")])
    start = time.monotonic()
    pool.submit(sample("hang"))
    time.sleep(0.1)
    pool.close()
    assert time.monotonic() - start < 8, "neither waited for the verdict, which may take 10 s"
    assert all(verifier.process.poll() is not None for verifier in pool.verifiers)
