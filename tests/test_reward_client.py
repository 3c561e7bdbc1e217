"""The client of a reward model's server: what it asks, what it makes of the answer, and that no failure becomes a score."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1.problem import Problem
from megatron_r1.rewards import helpful, reward_model, safety
from megatron_r1.types import Sample
from megatron_r1.verifying import scoring

PROBLEM = Problem(id=0, prompt="hello?", answer="", source="helpful")
COMPLETION = "<think>hm</think>\nHello! "


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """Answers /classify with `replies` in turn, the last one for ever: a score, scores, or a code; keeps what it was asked."""
    state = SimpleNamespace(replies=[0.5], asked=[], wait=0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/classify"
            state.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(state.wait)
            reply = state.replies.pop(0) if len(state.replies) > 1 else state.replies[0]
            scores = reply if isinstance(reply, list) else [reply]
            body: dict[str, Any] = {"data": [{"index": 0, "probs": scores, "num_classes": len(scores)}]}
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(body if not isinstance(reply, int) else {"error": "why not"}).encode())

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def test_helpfulness_is_of_the_summary_and_safety_of_the_whole_response(server: SimpleNamespace):
    helpful.reward(COMPLETION, PROBLEM, url=server.url)
    safety.reward(COMPLETION, PROBLEM, url=server.url + "/")
    prompt = {"role": "user", "content": "hello?"}
    assert [asked["messages"] for asked in server.asked] == [
        [prompt, {"role": "assistant", "content": "Hello!"}],
        [prompt, {"role": "assistant", "content": COMPLETION}],
    ]
    assert all(asked["use_activation"] is False for asked in server.asked)


@pytest.mark.parametrize("score", [-800.0, -2.0, 0.0, 3.0, 800.0])
def test_a_score_is_squashed_or_left(score: float, server: SimpleNamespace):
    server.replies = [score]
    squashed = reward_model.reward(COMPLETION, PROBLEM, url=server.url)
    assert squashed == pytest.approx(0.5 * (1 + math.tanh(score / 2)))
    assert reward_model.reward(COMPLETION, PROBLEM, url=server.url, transform="none") == score


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("<think>a</think> b ", "b"),
        ("b", "b"),
        ("<think>a</think></think>c", "c"),
        ("<think>a</think>", ""),
        ("<think>a", None),
    ],
)
def test_the_summary_is_what_follows_the_reasoning(completion: str, text: str | None, server: SimpleNamespace):
    score = helpful.reward(completion, PROBLEM, url=server.url)
    if text is None:
        assert score == 0.0
        assert not server.asked
        with pytest.raises(ValueError, match="no summary"):
            helpful.reward(completion, PROBLEM, url=server.url, transform="none")
    else:
        assert server.asked[0]["messages"][1]["content"] == text


def test_an_overloaded_server_is_asked_again(server: SimpleNamespace):
    server.replies = [503, 429, 0.0]
    assert reward_model.reward(COMPLETION, PROBLEM, url=server.url) == 0.5
    assert len(server.asked) == 3


def test_a_refusal_is_not_asked_again(server: SimpleNamespace):
    server.replies = [400]
    with pytest.raises(ValueError, match=r"400 .*why not"):
        reward_model.reward(COMPLETION, PROBLEM, url=server.url)
    assert len(server.asked) == 1


def test_a_classifier_of_several_labels_is_no_reward_model(server: SimpleNamespace):
    server.replies = [[0.1, 0.9]]
    with pytest.raises(ValueError, match="2 labels"):
        reward_model.reward(COMPLETION, PROBLEM, url=server.url)


@pytest.mark.parametrize("fault", ["nobody", "slow", "failing"])
def test_without_an_answer_in_time_it_raises(fault: str, server: SimpleNamespace):
    server.wait = 10.0 if fault == "slow" else 0.0
    server.replies = [500]
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no score within 0\.5 s"):
        reward_model.reward(COMPLETION, PROBLEM, url="http://127.0.0.1:9" if fault == "nobody" else server.url, limit_seconds=0.5)
    assert time.monotonic() - started < 8.0


@pytest.mark.parametrize("options", [{"transform": "tanh"}, {"scope": "all"}])
def test_an_option_that_does_not_exist_is_named(options: dict[str, str], server: SimpleNamespace):
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        reward_model.reward(COMPLETION, PROBLEM, url=server.url, **options)


def test_a_failed_server_is_a_failed_verifier_and_equation_10_adds_up(server: SimpleNamespace):
    sample = Sample(PROBLEM, 0, [1], [2], [0.0], "stop", 0, text="<think>hm</think><answer>Hello!</answer>")
    dead = {"url": "http://127.0.0.1:9", "limit_seconds": 0.3}
    server.replies = [2.0]
    for options, failed in (({"url": server.url}, False), (dead, True)):
        with scoring.Scorer({"helpful": 1.0, "format": 1.0}, options={"helpful": options}) as scorer:
            scorer.collect([sample])
        assert ("helpful" in sample.failures) == failed
        assert math.isnan(sample.reward) == failed
        assert failed or sample.reward == pytest.approx(1.0 + 1 / (1 + math.exp(-2.0)))


def test_a_reward_model_without_a_url_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"rewards\.options\.safety: missing a required argument: 'url'"):
        scoring.check({"safety": 1.0}, {}, by_source={})
