"""What the training loop asks of a rollout engine, and the plain data both sides share. Imports no engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_r1.weights.division import Division


class EngineError(ValueError):
    """A server failed, or a limit ran out. One line: what happened, where, the limit, what to do."""


class EngineLost(EngineError):
    """Servers came back without weights. Call `update_weights` again, then generate the requests named in `missing`."""

    def __init__(self, message: str, *, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = list(missing)  # keys of the requests that got no answer


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; the log-probs that come back are of the distribution after temperature and top_p."""

    max_tokens: int  # of one completion
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    n: int = 1  # completions a request
    stop_token_ids: tuple[int, ...] = ()  # the completion ends with the first of these, and keeps it

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens = {self.max_tokens}: must be at least 1")
        if self.n < 1 or (self.temperature == 0.0 and self.n > 1):
            raise ValueError(f"n = {self.n} completions at temperature {self.temperature}: use n >= 1, and n = 1 for greedy sampling")
        if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.temperature = {self.temperature}, top_p = {self.top_p}: need temperature >= 0 and 0 < top_p <= 1")


def never() -> bool:
    """Nobody asks to stop."""
    return False


def request_seed(*parts: int) -> int:
    """A seed of its own for a request, the same on every layout and after a resume; 62 bits leave room for + completion."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


@dataclass(frozen=True)
class Request:
    """One prompt. Completion i of n samples with seed + i: the same tokens whatever server, batch or moment it runs in."""

    key: int  # the caller's name for it; comes back with its completions
    token_ids: Sequence[int]
    seed: int | None = None  # None: not reproducible


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: list[int]  # includes the stop token when finish_reason == "stop"
    logprobs: list[float]  # the sampler's, one a token
    finish_reason: Literal["stop", "length"]
    weight_version: int  # of the weights that sampled it; the oldest where an update fell into it; -1 = never updated


class Ranks(Protocol):
    """A trainer's ranks and what they tell each other about an update, in collective calls; mcore/distributed.py."""

    def rank(self) -> int:
        """This one among them."""

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank says so."""

    def together(self) -> None:
        """Wait for every rank, however long one waits for servers."""


class Alone:
    """A rank without others."""

    def rank(self) -> int:
        return 0

    def share(self, value: Any) -> Any:
        return value

    def any_rank(self, flag: bool) -> bool:
        return flag

    def together(self) -> None:
        pass


ALONE = Alone()


class RolloutEngine(Protocol):
    """Samples completions with the policy's weights. All methods block, each within a limit; failures raise EngineError."""

    def wait_ready(self, limit_seconds: float) -> None:
        """Return once every server answers."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, stop: Callable[[], bool] = never
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (key, its n completions) as each request finishes, in any order; EngineLost at the end if some never can.

        `stop` is asked every second; once it says so the rest is aborted.
        """

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int, *, division: Division | None = None) -> None:
        """Give every server new weights, by their Hugging Face names, and drop caches of the old ones.

        `weights` are those that this rank sends, by the `division`; without one rank 0 sends them all.
        """

    def canary(self, token_ids: Sequence[int], logprobs: Sequence[float], *, tolerance: float) -> float:
        """Compare every server's log-probs of fixed tokens with the trainer's; returns the largest gap, raises beyond `tolerance`.

        `logprobs[i]` is the trainer's log-prob of `token_ids[i + 1]` at temperature 1.
        """

    def sleep(self) -> None:
        """Make every server give back the GPU's memory; weights and caches are gone."""

    def wake(self, tag: str) -> None:
        """Give every server back the memory of its "weights", empty, or of its "kv_cache"; it samples once it has both."""

    def close(self) -> None:
        """Let go of connections; the servers go on."""
