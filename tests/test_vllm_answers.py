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
    """By stock vLLM and then by ours: log-probs for each number of best tokens asked for, flat or not, and what is written."""
    import numpy as np
    from starlette.responses import JSONResponse
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.logprobs import create_sample_logprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    from megatron_r1.rollout import vllm_answers

    tokens, best = np.array([[5, 1, 2], [7, 1, 2], [9, 1, 2]]), np.array([-0.1, -0.2])
    sampled = np.array([-0.5, -np.inf, np.nan])
    packet = LogprobsLists(tokens, np.column_stack([sampled, np.tile(best, (3, 1))]), np.array([3, 7, 0]))

    def asked(n: int, *, flat: bool) -> list[dict[str, Any]]:
        processor = LogprobsProcessor(None, create_sample_logprobs(flat), None, 0.0, n, None)
        for _ in range(2):  # a request's tokens come in several packets
            processor._update_sample_logprobs(packet)
        content = ServingTokens._create_tokens_logprobs(None, tokens[:, 0].tolist() * 2, processor.logprobs, n)
        return content.model_dump()["content"]

    def refusal(content: dict[str, Any]) -> str:
        with pytest.raises(ValueError) as error:
            JSONResponse(content)
        return str(error.value)

    def everything() -> dict[str, Any]:
        return {
            "logprobs": {(n, flat): asked(n, flat=flat) for n in (0, 2) for flat in (False, True)},
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
    stock, ours = (answer["logprobs"][0, True] for answer in answers)
    assert stock[0]["top_logprobs"], "stock vLLM no longer repeats the sampled token: vllm_answers.py is not needed"
    assert ours == [token | {"top_logprobs": []} for token in stock]
    assert [(token["token_id"], token["logprob"]) for token in ours] == 2 * [(5, -0.5), (7, -9999.0), (9, -9999.0)]


@pytest.mark.parametrize(("best", "flat"), [(0, False), (2, False), (2, True)], ids=["in objects", "best", "best, flat"])
def test_asked_for_in_another_way_the_answer_is_stock(answers, best, flat):
    stock, ours = (answer["logprobs"][best, flat] for answer in answers)
    assert ours == stock and len(ours) == 6


def test_what_is_written_reads_the_same(answers):
    stock, ours = (answer["written"] for answer in answers)
    assert list(map(json.loads, ours)) == list(map(json.loads, stock)) == [ANSWER, {"error": "no"}, [1.5]]


def test_a_prompts_logprob_that_is_no_number_is_refused_as_by_stock_vllm(answers):
    assert answers[0]["refused"] == answers[1]["refused"] != ""
