"""Tokens leave vLLM's engine in packets of 32, not one by one, where nobody reads a completion before it is whole.

Stock vLLM packs three arrays a token that has a log-prob and sends them to the API server, which unpacks them and waits for more: for
256 requests 2.3 ms of a step in the engine's process and 2.9 in the other, which wakes up at every step and takes the engine's core.
`install` is called in vLLM's processes, by vllm_plugin.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, is_
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

PACKET_TOKENS = 32  # held, a token takes a hundred times the memory that it takes in a packet
OTHERS = attrgetter(*(name for name in EngineCoreOutput.__struct_fields__ if name not in ("request_id", "new_token_ids", "new_logprobs")))
NO_OTHERS = OTHERS(EngineCoreOutput(request_id="", new_token_ids=[]))


class Held:
    """The outputs that have not left yet, by request: its client's number and the outputs in order."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[int, list[EngineCoreOutput]]] = {}

    def due(self, client: int, outputs: Iterable[EngineCoreOutput], running: Mapping[str, Request]) -> list[EngineCoreOutput]:
        """What leaves now, of one client's outputs of a step and of what was held before; `running` are the requests that go on."""
        leaving = []
        for output in outputs:
            _, parts = self.parts.setdefault(output.request_id, (client, []))
            parts.append(output)
            if len(parts) == PACKET_TOKENS or not (is_plain(output) and is_read_whole(running.get(output.request_id))):
                leaving.append(self.packet(output.request_id))
        return leaving

    def packet(self, request_id: str) -> EngineCoreOutput:
        """All of a request's outputs as one: the last, with the tokens of those before it."""
        _, parts = self.parts.pop(request_id)
        if len(parts) > 1:
            logprobs = [part.new_logprobs[:3] for part in parts if part.new_logprobs is not None]
            parts[-1].new_token_ids = [token for part in parts for token in part.new_token_ids]
            parts[-1].new_logprobs = LogprobsLists(*map(np.concatenate, zip(*logprobs, strict=True))) if logprobs else None
        return parts[-1]

    def rest(self) -> dict[int, list[EngineCoreOutput]]:
        """Everything, by client."""
        leaving: dict[int, list[EngineCoreOutput]] = {}
        for request_id, (client, _) in list(self.parts.items()):
            leaving.setdefault(client, []).append(self.packet(request_id))
        return leaving

    def forget(self, running: Mapping[str, Request]) -> None:
        """Drop what was made for requests that were aborted since."""
        for request_id in self.parts.keys() - running.keys():
            del self.parts[request_id]


def is_plain(output: EngineCoreOutput) -> bool:
    """It has tokens, with or without log-probs, and no more: neither a request's first, which tells of its prompt, nor its last."""
    return all(map(is_, OTHERS(output), NO_OTHERS))


def is_read_whole(request: Request | None) -> bool:
    """Nobody looks at the tokens before the request ends, not even for a stop string."""
    params = request.sampling_params if request else None
    return params is not None and params.output_kind == RequestOutputKind.FINAL_ONLY and not params.detokenize


def is_empty(outputs: EngineCoreOutputs) -> bool:
    """Not worth waking a thread here and a process there, which take the engine's core."""
    return not outputs.outputs and outputs.scheduler_stats is None and not outputs.finished_requests


def held(core: Any) -> Held:
    """What an engine holds."""
    return vars(core).setdefault("_held", Held())


def install() -> None:
    """Hold tokens back in every engine of this process that answers an API server. A second call does nothing."""
    attach_weight_version, set_weight_version = EngineCoreProc._attach_weight_version, EngineCoreProc.set_weight_version
    if attach_weight_version.__module__ == __name__:
        return

    def attach(core: Any, outputs: dict[int, EngineCoreOutputs]) -> None:  # stock vLLM calls it when a step's outputs are complete
        for client, made in outputs.items():
            made.outputs = held(core).due(client, made.outputs, core.scheduler.requests)
        if len(held(core).parts) > len(core.scheduler.requests):
            held(core).forget(core.scheduler.requests)
        attach_weight_version(core, outputs)
        for client in [client for client, made in outputs.items() if is_empty(made)]:
            del outputs[client]

    def set_version(core: Any, version: str) -> None:  # requests may be under way, and what they have is the old weights'
        for client, outputs in held(core).rest().items():
            core.output_queue.put_nowait((client, EngineCoreOutputs(outputs=outputs, weight_version=core._weight_version)))
        set_weight_version(core, version)

    EngineCoreProc._attach_weight_version, EngineCoreProc.set_weight_version = attach, set_version
