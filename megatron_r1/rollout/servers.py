"""HTTP to the vLLM servers: an event loop in a thread of its own, a limit on every call, and one-line errors."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import msgspec

from megatron_r1.rollout.engine import EngineError

CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 10.0
POLL_SECONDS = 0.1
FILES = 65_535  # often a shell allows 1,024, and a benchmark has more problems
# A process that dies closes its sockets and is noticed at once; a machine that vanishes, by these probes (10 + 3 x 5 s).
KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
T = TypeVar("T")


def open_files() -> int:
    """How many files and connections this process may have, after the limit was raised as far as vLLM raises its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return FILES if soft == resource.RLIM_INFINITY else soft


class ServerDown(EngineError):
    """A server does not answer any more, or answers that its engine is dead."""


class Refused(EngineError):
    """A live server answered with an HTTP status that is not 200."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotReady(EngineError):
    """Servers that did not answer in time."""

    def __init__(self, message: str, *, missing: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = list(missing)


class Servers:
    """Calls to one or all of `urls`. `call` is for coroutines run by `submit`, `all` for ordinary code."""

    def __init__(self, urls: Sequence[str], *, limit_seconds: float, headers: Mapping[str, str] | None = None) -> None:
        if not urls:
            raise ValueError("rollout.urls = []: no server to talk to; start one or name one")
        self.urls = [url.rstrip("/") for url in urls]
        self.limit_seconds = limit_seconds
        # No connection is kept: a server closes idle ones, and a request sent into that moment looks like a dead server.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(limits=limits, socket_options=KEEP_ALIVE, trust_env=False),
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            headers=headers,
            trust_env=False,  # a proxy has no business between trainer and server
        )
        self.most_open = open_files() // 2  # connections at a time; the rest is for the process's other files
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="rollout-http", daemon=True)
        self.thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def call(self, url: str, path: str, body: Any = None, *, method: str = "POST", limit: float | None = None) -> dict[str, Any]:
        """The JSON answer of one server. ServerDown if it is gone, Refused for a status but 200, EngineError after `limit` seconds."""
        limit = limit or self.limit_seconds
        try:
            async with asyncio.timeout(limit):
                reply = await self.client.request(method, url + path, json=body)
        except TimeoutError as error:
            hint = "raise rollout.request_timeout_seconds or look at the server's log"
            raise EngineError(f"{url}{path}: no answer within {limit:g} s; {hint}") from error
        except httpx.TransportError as error:
            raise ServerDown(f"{url}: the server is gone ({type(error).__name__} at {path}); see its log") from error
        if reply.status_code >= 500 and path != "/health" and not await self.healthy(url):
            raise ServerDown(f"{url}: the engine is dead (HTTP {reply.status_code} at {path}); see the server's log")
        if reply.status_code != 200:
            raise Refused(f"{url}{path}: HTTP {reply.status_code}: {reason(reply)}", status=reply.status_code)
        return msgspec.json.decode(reply.content) if reply.content else {}  # 4 times as fast as json's

    async def healthy(self, url: str) -> bool:
        try:
            await self.call(url, "/health", method="GET", limit=HEALTH_SECONDS)
        except EngineError:
            return False
        return True

    def all(self, path: str, bodies: Sequence[Any] | None = None, *, method: str = "POST") -> Future[list[dict[str, Any]]]:
        """Call every server at once, each with its own body; the answers in the order of `urls`, or the first failure."""

        async def calls() -> list[dict[str, Any]]:
            each = bodies or [None] * len(self.urls)
            return await asyncio.gather(*(self.call(url, path, body, method=method) for url, body in zip(self.urls, each, strict=True)))

        return self.submit(calls())

    def wait_ready(self, limit_seconds: float, urls: Sequence[str] | None = None) -> None:
        """Block until all (or these) servers answer /health; NotReady names those that do not within the limit."""
        missing = list(self.urls if urls is None else urls)

        async def poll() -> None:
            while missing:
                answers = await asyncio.gather(*map(self.healthy, missing))
                missing[:] = [url for url, answer in zip(missing, answers, strict=True) if not answer]
                await asyncio.sleep(POLL_SECONDS if missing else 0.0)

        async def bounded() -> None:
            async with asyncio.timeout(limit_seconds):
                await poll()

        try:
            self.submit(bounded()).result()
        except TimeoutError as error:
            hint = "raise rollout.start_timeout_seconds or look at the server's log"
            raise NotReady(f"{', '.join(missing)}: not ready after {limit_seconds:g} s; {hint}", missing=missing) from error

    def close(self) -> None:
        """End the thread and what it still waits for."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self.client.aclose()

        if self.thread.is_alive():
            self.submit(end()).result(HEALTH_SECONDS)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(HEALTH_SECONDS)


def reason(reply: httpx.Response) -> str:
    """What a server says is wrong, on one line."""
    try:
        body = json.loads(reply.content)
    except ValueError:
        body = reply.text
    if isinstance(body, dict):
        error = body.get("error", body.get("detail", body))
        body = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(body).split())[:500]
