"""What is sent at once: buckets of weights, as the servers hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from megatron_r1.rollout import wire
from megatron_r1.weights import fp8
from megatron_r1.weights.division import Division

BUCKET_BYTES = 256 << 20  # that a worker gets at a time, of all senders together


class Buckets:
    """Cuts weights into buckets, and says beforehand what the other senders' will be, for that follows from names, dtypes and shapes."""

    def __init__(self) -> None:
        self.quantization: Literal["none", "fp8"] = "none"  # of the servers' model; for "fp8" weights are quantised as they are sent
        self.bucket_bytes = BUCKET_BYTES
        self._told: tuple[Division | None, list[list[wire.Described]]] = None, []

    def of(self, weights: Iterable[wire.Named], division: Division) -> Iterator[list[wire.Named]]:
        """One sender's, each of at most its share of `bucket_bytes` or one tensor."""
        served = fp8.stream(weights) if self.quantization == "fp8" else weights
        return wire.buckets(served, self.bucket_bytes // len(division.parts))

    def of_others(self, division: Division) -> list[list[wire.Described]]:
        """What wire.describe says of every bucket of each sender but the first."""
        if self._told[0] is not division:
            described = [[wire.describe(bucket) for bucket in self.of(wire.shapes_only(part), division)] for part in division.parts[1:]]
            self._told = division, described
        return self._told[1]
