"""The rollout engine of every run: a client of one or many `vllm serve` processes. Imports no vLLM.

Requests go one a group of n completions; a server that finishes one takes the next, so that none waits for the slowest.
A server that dies is left out and its requests go to the others. One that was restarted has no weights: it is left out too,
until the next `update_weights` finds it; one that is not back by then is gone, until it answers again. When none is left,
EngineLost names the requests to generate again after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_r1.rollout import canary, openai_api, tokens_api, wire
from megatron_r1.rollout.engine import ALONE, Completion, EngineError, EngineLost, Ranks, Request, SamplingParams, never
from megatron_r1.rollout.servers import NotReady, Refused, ServerDown, Servers
from megatron_r1.rollout.weight_buckets import Buckets
from megatron_r1.rollout.weight_transfer import Meeting, make_sender
from megatron_r1.weights.division import Division

STOP_SECONDS = 1.0  # how often to ask whether to stop
Group = tuple[int, list[Completion]]


class VLLMServers:
    """RolloutEngine over HTTP; see engine.py for what each method promises.

    All of the trainer's `ranks` have one and call `update_weights`. `own_weights` lets servers sample before the first update, with the
    weights they loaded themselves; after `wait_ready` any `vllm serve` will do. `pause` says what becomes of requests that run while an
    update begins: "wait" for them, or "keep" them and go on with the new weights.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        weight_transfer: str = "gloo",
        ranks: Ranks = ALONE,
        max_num_seqs: int = 256,
        request_limit_seconds: float = 600.0,
        start_limit_seconds: float = 300.0,
        pause: Literal["wait", "keep"] = "wait",
        own_weights: bool = False,
        transfer_folder: Path | None = None,
    ) -> None:
        self.servers = Servers(urls, limit_seconds=request_limit_seconds)
        self.ranks, self.rank = ranks, ranks.rank()
        sends = self.rank == 0 or weight_transfer != "file"
        self.sender = make_sender(weight_transfer, self.servers, ranks=ranks, folder=transfer_folder) if sends else None
        self.meeting: Meeting | None = None  # the last one
        self.max_num_seqs, self.start_limit_seconds = max_num_seqs, start_limit_seconds
        self.pause, self.own_weights = pause, own_weights
        self.buckets = Buckets()
        self.version: int | None = None  # what this client last sent
        self.models: dict[str, str] = {}  # servers that have OpenAI's API alone, and what they call their model
        self.lost: list[str] = []  # servers that did not come back in time, as when their node is gone

    def wait_ready(self, limit_seconds: float) -> None:
        self.servers.wait_ready(limit_seconds)
        if self.own_weights:
            self.models = self.servers.submit(self._plain()).result()

    async def _plain(self) -> dict[str, str]:
        """The model's name at each server without the endpoint for tokens, of whose absence its schema tells."""
        names = {}
        for url in self.servers.urls:
            schema = await self.servers.call(url, "/openapi.json", method="GET")
            if tokens_api.PATH not in schema["paths"]:
                names[url] = (await self.servers.call(url, "/v1/models", method="GET"))["data"][0]["id"]
        return names

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
        self.servers.close()

    def generate(self, requests: Sequence[Request], sampling: SamplingParams, *, stop: Callable[[], bool] = never) -> Iterator[Group]:
        """Yield (key, completions) as each request finishes. Closing the iterator early, or `stop`, aborts what still runs."""
        if sampling.n > self.max_num_seqs:
            raise ValueError(f"n = {sampling.n} completions: more than rollout.max_num_seqs = {self.max_num_seqs}; raise it")
        arrived: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        waiting = deque(requests)
        run = self.servers.submit(self._generate(waiting, sampling, arrived.put))
        run.add_done_callback(lambda _: arrived.put(None))
        try:
            while not stop():  # bounded: every call that the loop makes has its limit
                try:
                    group = arrived.get(timeout=STOP_SECONDS)
                except queue.Empty:
                    continue
                if group is None:
                    break
                yield group
            else:
                return
            run.result()
        finally:
            run.cancel()
        if waiting:
            missing = [request.key for request in waiting]
            names = ", ".join(self.servers.urls)
            raise EngineLost(f"{names}: no server with the policy's weights is left; {len(missing)} requests lost", missing=missing)

    async def _generate(self, waiting: deque[Request], sampling: SamplingParams, emit: Callable[[Group], None]) -> None:
        """Empty `waiting` as far as there are servers to do it."""
        start = self.rank % len(self.servers.urls)  # ranks begin at different servers
        up = self.servers.urls[start:] + self.servers.urls[:start]
        fits = self.max_num_seqs // sampling.n
        while waiting and up:
            # what waits at a server keeps it busy; what waits here goes to whichever is free: alone, a server gets everything
            slots = len(waiting) if len(up) == 1 else min(fits + fits // 4 + 1, len(waiting))
            slots = min(slots, max(1, self.servers.most_open // len(up)))
            try:
                async with asyncio.TaskGroup() as tasks:
                    for url in up * slots:
                        tasks.create_task(self._serve(url, waiting, up=up, sampling=sampling, emit=emit))
            except ExceptionGroup as errors:  # not except*: before Python 3.11.4 it wraps what is raised in it
                raise errors.exceptions[0] from None

    async def _serve(
        self, url: str, waiting: deque[Request], *, up: list[str], sampling: SamplingParams, emit: Callable[[Group], None]
    ) -> None:
        """Let one server answer one request after the other, until none waits; takes it out of `up` when it is lost."""
        while waiting and url in up:
            request = waiting.popleft()
            completions = await self._completions(url, request, sampling)
            if completions is not None:
                emit((request.key, completions))
                continue
            waiting.append(request)
            if url in up:
                up.remove(url)

    async def _completions(self, url: str, request: Request, sampling: SamplingParams) -> list[Completion] | None:
        """None if the server died, or was restarted since the last update and samples from no one's weights."""
        try:
            if url in self.models:
                body, read = openai_api.body(request, sampling, model=self.models[url]), openai_api.completion
                reply = await self.servers.call(url, openai_api.PATH, body)
            else:
                body, read = tokens_api.body(request, sampling), tokens_api.completion
                reply = await self.servers.call(url, tokens_api.PATH, body)
        except ServerDown:
            return None
        completions = [read(choice, url) for choice in sorted(reply["choices"], key=lambda choice: choice["index"])]
        assert len(completions) == sampling.n, f"{url=} {request.key=} {len(completions)=}"
        if not self.own_weights and any(c.weight_version == tokens_api.OWN_WEIGHTS for c in completions):
            return None
        return completions

    def update_weights(self, weights: Iterable[wire.Named], version: int, *, division: Division | None = None) -> None:
        """Every rank calls it, for `weights` may be a collective. A failed update leaves the servers paused: none samples from it.

        EngineLost when a server died on the way: what `weights` has left is the caller's to go through, before it calls again.
        """
        division = division or Division(parts=[()], mine=0 if self.rank == 0 else None)
        meeting, failure = None, None
        try:
            if self.rank == 0:
                meeting = self._meet(senders=len(division.parts))
        except EngineError as error:
            failure = error
        self.ranks.together()
        meeting = self.ranks.share(meeting)
        try:
            if meeting is not None and self.sender is not None:
                self.sender.join(meeting, division)
            if meeting is not None and self.rank == 0:
                self.servers.all(f"/pause?mode={self.pause}").result()
                self._start_update()
        except EngineError as error:
            failure = error
        if self.ranks.any_rank(failure is not None):
            raise self._lost_or(failure) from failure
        try:
            self._send(weights, division)
            if self.rank == 0:
                self._finish_update(version)
        except EngineError as error:
            raise self._lost_or(error) from error

    def _lost_or(self, failure: EngineError | None) -> EngineError:
        """What to raise: rank 0 knows whether servers died, and ends the run by what it raises if none did."""
        knows = self.rank == 0 and failure is not None and not isinstance(failure, ServerDown)
        if knows and all(self.servers.submit(self._answering(self.servers.urls)).result()):  # else a dead server's peer may have said it
            return failure
        self.version = None
        return EngineLost(str(failure or "weight transfer: another rank could not send its part; see its log"))

    def _finish_update(self, version: int) -> None:
        self.servers.all("/finish_weight_update", [{"weight_version": str(version)}] * len(self.servers.urls)).result()
        for url, reset in zip(self.servers.urls, self.servers.all("/reset_prefix_cache").result(), strict=True):
            if not reset["success"] and self.pause == "wait":
                raise EngineError(f"{url}: the prefix cache of the old weights could not be dropped; is another client using this server?")
        self.servers.all("/resume").result()
        self.version = version

    def _start_update(self) -> None:
        """On every server, and anew on one that a trainer, or another server to which it was a peer, left in the middle when it died."""

        async def start(url: str) -> None:
            try:
                await self.servers.call(url, "/start_weight_update")
            except Refused:
                await self.servers.call(url, "/finish_weight_update", {"weight_version": str(tokens_api.OWN_WEIGHTS)})
                await self.servers.call(url, "/start_weight_update")

        self._on_each(start)

    def _send(self, weights: Iterable[wire.Named], division: Division) -> None:
        if self.sender is None:  # this rank only takes part in the gathering
            for _ in weights:
                pass
            return
        others = self.buckets.of_others(division) if self.rank == 0 else []
        self.sender.send(self.buckets.of(weights, division), others)

    def _meet(self, *, senders: int) -> Meeting:
        """A new meeting before the first update, and when a server died, was restarted or is back; else the last one."""
        health = self.servers.submit(self._answering(self.lost)).result()
        back = [url for url, answers in zip(self.lost, health, strict=True) if answers]
        self.lost = [url for url in self.lost if url not in back]
        self.servers.urls += back

        async def holds(url: str) -> str | None:
            try:
                return (await self.servers.call(url, "/weight_info", method="GET"))["weight_version"]
            except ServerDown:
                return None

        async def held() -> list[str | None]:
            return await asyncio.gather(*map(holds, self.servers.urls))

        if any(version != str(self.version) for version in self.servers.submit(held()).result()):
            self._wait()
            sizes = [reply["world_size"] for reply in self.servers.all("/get_world_size", method="GET").result()]
            self.meeting = self.sender.meet(sizes, senders=senders)
        return self.meeting

    async def _answering(self, urls: Sequence[str]) -> list[bool]:
        return await asyncio.gather(*map(self.servers.healthy, urls))

    def _wait(self) -> None:
        """For every server; the run goes on without those that are not there in time, as long as one is."""
        try:
            self.servers.wait_ready(self.start_limit_seconds)
        except NotReady as error:
            self.servers.urls = [url for url in self.servers.urls if url not in error.missing]
            if not self.servers.urls:
                raise
            self.lost += error.missing
            print(f"going on with {len(self.servers.urls)} servers: {error}", flush=True)

    def sleep(self) -> None:
        self._wait()
        self._tell("/sleep?level=2")

    def wake(self, tag: str) -> None:
        self._tell(f"/wake_up?tags={tag}")

    def _tell(self, path: str) -> None:
        """Call the servers that are there: one that died has no memory to give or to get, and starts awake."""

        async def tell(url: str) -> None:
            with contextlib.suppress(ServerDown):
                await self.servers.call(url, path)

        self._on_each(tell)

    def _on_each(self, work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """One coroutine for each server, all at once."""

        async def every() -> None:
            await asyncio.gather(*map(work, self.servers.urls))

        self.servers.submit(every()).result()

    def logprobs_of(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Each server's log-probs at temperature 1 of token_ids[1:]."""
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": list(token_ids), "sampling_params": params}
        replies = self.servers.all(tokens_api.PATH, [body] * len(self.servers.urls)).result()
        return [
            [entry[str(token)]["logprob"] for token, entry in zip(token_ids[1:], reply["prompt_logprobs"][1:], strict=True)]
            for reply in replies
        ]

    def canary(self, token_ids: Sequence[int], logprobs: Sequence[float], *, tolerance: float) -> float:
        try:
            found = dict(zip(self.servers.urls, self.logprobs_of(token_ids), strict=True))
        except ServerDown as error:
            self.version = None
            raise EngineLost(str(error)) from error
        return canary.check(token_ids, logprobs, found, version=self.version, tolerance=tolerance)
