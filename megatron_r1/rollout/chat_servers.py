"""Chats with OpenAI-compatible servers, text in and text out: `vllm serve` of any model, or a hosted one. Imports no vLLM.

The same request, with its seed, goes to whichever server is least busy. One that is gone or overloaded is asked again or
another is, until `retry_seconds` are over: a server that this machine's launcher restarts is back by then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_r1.rollout.engine import EngineError, SamplingParams
from megatron_r1.rollout.servers import HEALTH_SECONDS, NotReady, Refused, ServerDown, Servers

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
OVERLOADED = (408, 429)  # and every 5xx
UNAUTHORIZED = (401, 403)
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 30.0
T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """One completion of a chat."""

    text: str  # without special tokens; with the reasoning in its tags also where the server parts them
    tokens: int  # of the completion
    finish_reason: str  # "stop", or "length" for one that was cut off


class ChatServers:
    """Servers of one and the same model. `ask` from any thread; `submit` runs a coroutine on the clients' own."""

    def __init__(
        self, urls: Sequence[str], *, model: str = "", api_key: str = "", in_flight: int = 256, limit_seconds: float, retry_seconds: float
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
        bare = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.servers = Servers(bare, limit_seconds=limit_seconds, headers=headers)
        self.busy = dict.fromkeys(self.servers.urls, 0)  # requests under way
        self.model = model
        self.retry_seconds = retry_seconds
        self.slots = asyncio.Semaphore(in_flight)

    def wait_ready(self, limit_seconds: float) -> str:
        """Block until every server answers; what they call their model, a vLLM by the folder or hub name it loaded.

        Raises ValueError for servers of several models, or without the model that is asked for.
        """

        async def all_names() -> list[tuple[str, str]]:
            until = time.monotonic() + limit_seconds
            return await asyncio.gather(*(self._model_of(url, until) for url in self.servers.urls))

        found = set(self.servers.submit(all_names()).result())
        if len(found) > 1:
            names = ", ".join(sorted(origin for _, origin in found))
            raise ValueError(f"{', '.join(self.servers.urls)}: serve different models ({names}); name servers of one model")
        [(self.model, origin)] = found
        return origin

    async def _model_of(self, url: str, until: float) -> tuple[str, str]:
        """(what to call the model in a request, what it is)."""
        while True:
            try:
                models = (await self.servers.call(url, MODELS, method="GET", limit=HEALTH_SECONDS))["data"]
                break
            except EngineError as error:
                if isinstance(error, Refused) and error.status in UNAUTHORIZED:
                    raise
                if time.monotonic() > until:
                    raise NotReady(f"{url}{MODELS}: no answer in time; look at the server's log ({error})", missing=[url]) from error
            await asyncio.sleep(FIRST_PAUSE_SECONDS)
        named = [entry for entry in models if self.model in ("", entry["id"])]
        if len(named) != 1:
            wanted = f"no model {self.model!r}" if self.model else "not one model"
            raise ValueError(f"{url}: serves {wanted} but {', '.join(entry['id'] for entry in models) or 'none'}; name one of them")
        return named[0]["id"], named[0].get("root") or named[0]["id"]

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the clients' loop."""
        return self.servers.submit(work)

    async def ask(self, text: str, sampling: SamplingParams, *, seed: int) -> Reply:
        """The reply to one user's message, awaited on any loop. Refused for a request that the server will never take, as one too long."""
        return await asyncio.wrap_future(self.submit(self._ask(text, sampling, seed)))

    async def _ask(self, text: str, sampling: SamplingParams, seed: int) -> Reply:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
        }
        pause, until = FIRST_PAUSE_SECONDS, time.monotonic() + self.retry_seconds
        failed = dict.fromkeys(self.busy, 0)  # of this request, so that it goes elsewhere next
        async with self.slots:
            while True:
                url = min(self.busy, key=lambda url: (failed[url], self.busy[url]))
                self.busy[url] += 1
                try:
                    return reply(await self.servers.call(url, CHAT, body), url)
                except (ServerDown, Refused) as error:
                    is_final = isinstance(error, Refused) and error.status < 500 and error.status not in OVERLOADED
                    if is_final or time.monotonic() > until:
                        raise
                    failed[url] += 1
                finally:
                    self.busy[url] -= 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def close(self) -> None:
        self.servers.close()


def reply(answer: dict[str, Any], url: str) -> Reply:
    """The first choice of a chat completion."""
    try:
        choice, tokens = answer["choices"][0], answer["usage"]["completion_tokens"]
        message, finish_reason = choice["message"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError) as error:
        raise EngineError(f"{url}{CHAT}: its answer has no {error}; is this an OpenAI-compatible server?") from None
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    text = message.get("content") or ""
    return Reply(f"<think>\n{reasoning.strip()}\n</think>\n\n{text}" if reasoning else text, tokens, finish_reason)
