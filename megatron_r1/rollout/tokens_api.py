"""What this project's servers are asked for completions, and what they answer: token ids, log-probs, weight versions."""

from __future__ import annotations

from typing import Any

from megatron_r1.rollout.engine import Completion, EngineError, Request, SamplingParams

PATH = "/inference/v1/generate"
OWN_WEIGHTS = -1  # a server's, before any update


def body(request: Request, sampling: SamplingParams) -> dict[str, Any]:
    """The JSON of POST to PATH."""
    params = {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # config.json's own is no stop unless it is among these
        "seed": request.seed,
        "logprobs": 0,  # of the sampled token alone
        "flat_logprobs": True,  # held as lists of numbers; vllm_answers.py
        "detokenize": False,
    }
    return {"token_ids": list(request.token_ids), "sampling_params": params}


def completion(choice: dict[str, Any], url: str) -> Completion:
    """One choice of the answer."""
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineError(f"{url}: a completion ended with {choice['finish_reason']!r}; is another client pausing this server?")
    versions = [OWN_WEIGHTS if span["version"] == "default" else int(span["version"]) for span in choice["weight_versions"]]
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Completion(choice["token_ids"], logprobs, choice["finish_reason"], min(versions))
