"""What the API server answers, of which log-probs are nearly all: each token's once, taken a packet at a time and written by msgspec.

Stock vLLM makes two objects of each token's log-prob, repeats the token among its own best ones where none were asked for, and takes
json's encoder: 9 us a token, on a thread that also reads what the engine sends, and 131 bytes; so it is 2.5 us and 75 bytes. That is for
requests with `flat_logprobs`, as tokens_api.py makes them. `install` is called by vllm_serve.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import JSONResponse
from vllm.entrypoints.scale_out.token_in_token_out import serving
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists


def install() -> None:
    """For all answers of this process. A second call does nothing."""
    stock_update = LogprobsProcessor._update_sample_logprobs
    stock_create, stock_render = serving.ServingTokens._create_tokens_logprobs, JSONResponse.render
    if stock_render.__module__ == __name__:
        return

    def update(self: LogprobsProcessor, packet: LogprobsLists) -> None:
        flat = self.logprobs
        if self.num_logprobs != 0 or self.tokenizer is not None or not isinstance(flat, FlatLogprobs):
            stock_update(self, packet)
            return
        logprobs = packet.logprobs[:, 0].tolist()  # the sampled token's, whatever others in the engine's batch asked for
        before, after = len(flat.logprobs), len(flat.logprobs) + len(logprobs)
        flat.start_indices.extend(range(before, after))
        flat.end_indices.extend(range(before + 1, after + 1))
        flat.token_ids.extend(packet.logprob_token_ids[:, 0].tolist())
        flat.logprobs.extend(logprobs)
        flat.ranks.extend(packet.sampled_token_ranks.tolist())
        flat.decoded_tokens.extend([None] * len(logprobs))
        self.cumulative_logprob = sum(logprobs, self.cumulative_logprob)

    def create(self: Any, token_ids: Sequence[int], top_logprobs: Sequence[Any], num_output_top_logprobs: int | None = None) -> Any:
        if num_output_top_logprobs != 0 or not isinstance(top_logprobs, FlatLogprobs):
            return stock_create(self, token_ids, top_logprobs, num_output_top_logprobs)
        assert len(token_ids) == len(top_logprobs.logprobs), f"{len(token_ids)=} {len(top_logprobs.logprobs)=}"
        content = [  # a dict each, for pydantic checks all of them in one call
            {"token_id": token, "logprob": serving._clamp_logprob(logprob), "rank": rank or None}
            for token, logprob, rank in zip(token_ids, top_logprobs.logprobs, top_logprobs.ranks, strict=True)
        ]
        return serving.GenerateLogProbs(content=content)

    def render(self: JSONResponse, content: Any) -> bytes:
        if isinstance(content, dict) and content.get("choices") and not content.get("prompt_logprobs"):
            return msgspec.json.encode(content)
        return stock_render(self, content)  # a prompt's may be NaN, which json refuses and msgspec writes as null

    LogprobsProcessor._update_sample_logprobs = update
    serving.ServingTokens._create_tokens_logprobs, JSONResponse.render = create, render
