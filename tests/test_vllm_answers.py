"""What the API server answers is stock vLLM's answer, but for what nobody asked for.

vLLM runs in a process of its own, for pytest's never imports it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

LOGPROB = 0.1 + 0.2  # of which a float has all 17 digits
ANSWER = {
    "choices": [{"index": 0, "finish_reason": None, "token_ids": [5], "logprobs": {"content": [{"token_id": 5, "logprob": LOGPROB}]}}]
}


def before_and_after() -> list[dict[str, Any]]:
    """By stock vLLM and then by ours: log-probs for each number of best tokens asked for, and what is written."""
    from starlette.responses import JSONResponse
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.logprobs import Logprob

    from megatron_r1.rollout import vllm_answers

    tokens = [5, 7, 9, 3]
    found = [
        {5: Logprob(-0.5, rank=2), 1: Logprob(-0.1, rank=1)},
        {7: Logprob(-float("inf"), rank=3)},
        {9: Logprob(float("nan"), rank=0)},
        None,
    ]

    def refusal(content: dict[str, Any]) -> str:
        with pytest.raises(ValueError) as error:
            JSONResponse(content)
        return str(error.value)

    def everything() -> dict[str, Any]:
        return {
            "logprobs": {n: ServingTokens._create_tokens_logprobs(None, tokens, found, n).model_dump()["content"] for n in (0, 2, None)},
            "written": [JSONResponse(content).body for content in (ANSWER, {"error": "no"}, [1.5])],
            "refused": refusal(ANSWER | {"prompt_logprobs": [{"5": float("nan")}]}),
        }

    stock = everything()
    vllm_answers.install()
    vllm_answers.install()
    return [stock, everything()]


@pytest.fixture(scope="module")
def answers(in_engine) -> list[dict[str, Any]]:
    return in_engine(before_and_after)


def test_each_sampled_tokens_logprob_is_there_once(answers):
    stock, ours = (answer["logprobs"][0] for answer in answers)
    assert stock[0]["top_logprobs"], "stock vLLM no longer repeats the sampled token: vllm_answers.py is not needed"
    assert ours == [token | {"top_logprobs": []} for token in stock]
    assert [token["logprob"] for token in ours] == [-0.5, -9999.0, -9999.0, -9999.0]


def test_asked_for_others_the_answer_is_stock(answers):
    stock, ours = (answer["logprobs"] for answer in answers)
    assert ours[2] == stock[2] and len(ours[2][0]["top_logprobs"]) == 2
    assert ours[None] == stock[None]


def test_what_is_written_reads_the_same(answers):
    stock, ours = (answer["written"] for answer in answers)
    assert list(map(json.loads, ours)) == list(map(json.loads, stock)) == [ANSWER, {"error": "no"}, [1.5]]


def test_a_prompts_logprob_that_is_no_number_is_refused_as_by_stock_vllm(answers):
    assert answers[0]["refused"] == answers[1]["refused"] != ""
