"""What a server with OpenAI's completions alone (a plain `vllm serve`) is asked, and what it answers: token ids both ways.

It samples from its own weights, and its log-probs are not those after temperature and top_p: nothing can be trained on them.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_r1.rollout.engine import Completion, EngineError, Request, SamplingParams

PATH = "/v1/completions"
OWN_WEIGHTS = -1  # a version no trainer sends


def body(request: Request, sampling: SamplingParams, *, model: str) -> dict[str, Any]:
    """The JSON of POST /v1/completions; what it does not say, a server takes from the model's generation_config.json."""
    return {
        "model": model,
        "prompt": list(request.token_ids),
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,  # off
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "seed": request.seed,
        "return_token_ids": True,
    }


def completion(choice: dict[str, Any], url: str) -> Completion:
    """One choice of the answer; its log-probs are NaN."""
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineError(f"{url}: a completion ended with {choice['finish_reason']!r}; is another client using this server?")
    ids = choice.get("token_ids")
    if ids is None:
        raise EngineError(f"{url}: it answers without token ids, so lengths cannot be counted; use vLLM 0.10.2 or newer")
    return Completion(ids, [math.nan] * len(ids), choice["finish_reason"], OWN_WEIGHTS)
