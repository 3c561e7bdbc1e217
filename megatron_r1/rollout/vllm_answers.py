"""What the API server answers, of which log-probs are nearly all: each token's once, and written by msgspec.

Stock vLLM repeats a sampled token among its own best ones where none were asked for, and takes json's encoder: 15 us a token, on a thread
that also reads what the engine sends, and 131 bytes; so it is 3 us and 75 bytes. `install` is called by vllm_serve.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import JSONResponse
from vllm.entrypoints.scale_out.token_in_token_out import serving


def install() -> None:
    """For all answers of this process. A second call does nothing."""
    stock_create, stock_render = serving.ServingTokens._create_tokens_logprobs, JSONResponse.render
    if stock_render.__module__ == __name__:
        return

    def create(self: Any, token_ids: Sequence[int], top_logprobs: Sequence[Any], num_output_top_logprobs: int | None = None) -> Any:
        if num_output_top_logprobs != 0:
            return stock_create(self, token_ids, top_logprobs, num_output_top_logprobs)
        return serving.GenerateLogProbs(content=[content(token, found) for token, found in zip(token_ids, top_logprobs, strict=True)])

    def content(token: int, found: dict[int, Any] | None) -> serving.GenerateLogProbsContent:
        logprob = found and found.get(token)
        if not logprob:
            return serving.GenerateLogProbsContent(token_id=token, logprob=-9999.0)  # as stock vLLM
        return serving.GenerateLogProbsContent(token_id=token, logprob=serving._clamp_logprob(logprob.logprob), rank=logprob.rank or None)

    def render(self: JSONResponse, content: Any) -> bytes:
        if isinstance(content, dict) and content.get("choices") and not content.get("prompt_logprobs"):
            return msgspec.json.encode(content)
        return stock_render(self, content)  # a prompt's may be NaN, which json refuses and msgspec writes as null

    serving.ServingTokens._create_tokens_logprobs, JSONResponse.render = create, render
