"""The score of a reward model behind a vLLM server, squashed to 0 .. 1; helpful.py and safety.py are R1's two.

    python -m megatron_r1 serve reward-model helpful.toml rollout.port=9000      what the stage has trained by that config

The server renders prompt and answer with the reward model's own chat template and tokenizes them, as the training did. A
server that cannot be reached, refuses or takes too long raises: the verifier has failed, which is no score of 0.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from typing import Any, Literal

from megatron_r1.problem import Problem

FIRST_PAUSE_SECONDS = 0.1  # before the second try; doubled each time
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business between verifier and server


def reward(
    completion: str,
    problem: Problem,
    *,
    url: str,
    scope: Literal["summary", "response"] = "response",
    transform: Literal["sigmoid", "none"] = "sigmoid",
    limit_seconds: float = 8.0,
) -> float:
    """The score of the completion as the answer to the problem's prompt.

    url            of the server, as http://host:port
    scope          "summary": what follows </think>; "response": all of it
    transform      the paper gives no scale: a sigmoid makes it 0 .. 1, beside rule rewards of 0 and 1
    limit_seconds  for all tries together; below rewards.timeout_seconds, at which the verifier's process is killed

    Without a summary to score it is 0.0, the lowest of a sigmoid; without a transform there is no lowest, and it raises.
    """
    if transform not in ("sigmoid", "none"):
        raise ValueError(f'transform = {transform!r}: use "sigmoid" or "none"')
    text = scored_text(completion, scope=scope)
    if text is None and transform == "none":
        raise ValueError("the completion has no summary, and without a transform there is no lowest score")
    if text is None:
        return 0.0
    messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": text}]
    score = ask(url, messages, limit_seconds=limit_seconds)
    return sigmoid(score) if transform == "sigmoid" else score


def scored_text(completion: str, *, scope: Literal["summary", "response"]) -> str | None:
    """The part of a completion that is scored; None where there is no summary because the reasoning never ends."""
    if scope == "response":
        return completion
    if scope != "summary":
        raise ValueError(f'scope = {scope!r}: use "summary" or "response"')
    _, closed, conclusion = completion.rpartition("</think>")
    return None if "<think>" in completion and not closed else conclusion.strip()


def ask(url: str, messages: list[dict[str, str]], *, limit_seconds: float) -> float:
    """The raw score of a conversation. What may pass (no connection, an overloaded server) is tried again within the limit.

    Raises TimeoutError when the limit has passed, ValueError when the server refuses the request or does not score.
    """
    body = json.dumps({"messages": messages, "use_activation": False}).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/classify", body, {"Content-Type": "application/json"})
    end, pause = time.monotonic() + limit_seconds, FIRST_PAUSE_SECONDS
    while True:
        try:
            with DIRECT.open(request, timeout=max(0.01, end - time.monotonic())) as reply:
                return _score(url, json.load(reply))
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.read(300).decode(errors='replace')}"
            if error.code < 500 and error.code != 429:
                raise ValueError(f"{url}: the reward model's server answers {why}") from None
        except OSError as error:  # urllib's URLError is one
            why = str(error)
        if time.monotonic() + pause >= end:
            raise TimeoutError(f"{url}: no score within {limit_seconds:g} s: {why}")
        time.sleep(pause)
        pause *= 2


def _score(url: str, reply: dict[str, Any]) -> float:
    scores = reply["data"][0]["probs"]
    if len(scores) != 1:
        raise ValueError(f"{url}: a classifier of {len(scores)} labels, not a reward model of one; serve the folder of `reward-model`")
    return float(scores[0])


def sigmoid(score: float) -> float:
    """1 / (1 + exp(-score)), without overflow."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
