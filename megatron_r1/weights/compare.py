"""Two checkpoints, each a Hugging Face or a Megatron folder, FP8 or not: what is not the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_r1.weights import fp8
from megatron_r1.weights.conversion import runs
from megatron_r1.weights.folders import HFFolder, MegatronFolder, open_model
from megatron_r1.weights.ledger import hasher
from megatron_r1.weights.streams import Stream, tensor_bytes


class Difference(NamedTuple):
    """One tensor: the hash of its values on both sides, and how far they are apart."""

    hashes: tuple[str, str]
    largest: float  # NaN where one side has a NaN and the other not

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        return self.hashes[0] == self.hashes[1]


def compare(a: Path, b: Path, *, tolerance: float | None = None, side: Path | None = None, text: str | None = None) -> int:
    """Print what differs and a summary; 0 where nothing does, 1 otherwise. FP8 weights count as the values they stand for.

    text  compare the logits of this text, by transformers and by Megatron, instead
    """
    if text is not None:
        from megatron_r1.weights.logits import compare_logits

        return compare_logits(a, b, text=text, tolerance=1e-4 if tolerance is None else tolerance)
    one, other = open_model(a, side), open_model(b, side)
    tensors, others = _tensors(one), _tensors(other)
    wrong = 0
    for name in [*tensors, *(name for name in others if name not in tensors)]:
        finding = _finding(name, one=tensors.get(name), other=others.get(name), tolerance=tolerance)
        if finding:
            print(f"{name}: {finding}")
            wrong += 1
    print(f"{len(tensors)} tensors in {a}, {len(others)} in {b}: {wrong} differ")
    return int(wrong > 0)


def _tensors(model: HFFolder | MegatronFolder) -> dict[str, Stream]:
    names = [tensor.name for tensors in model.layout.values() for tensor in tensors]
    weights = set(names)
    return {name: model.values(name) for name in names if name.removesuffix(fp8.SCALE_SUFFIX) not in weights - {name}}


def _finding(name: str, *, one: Stream | None, other: Stream | None, tolerance: float | None) -> str | None:
    """In words, or None where there is nothing to say."""
    if one is None or other is None:
        return f"only in the {'second' if one is None else 'first'}"
    if one.shape != other.shape:
        return f"shapes {one.shape} and {other.shape}"
    if one.dtype != other.dtype and tolerance is None:
        return f"dtypes {one.dtype} and {other.dtype}, largest difference {difference(one, other).largest:.3g}"
    found = difference(one, other)
    if found.equal or (tolerance is not None and found.largest <= tolerance):
        return None
    return f"hashes {found.hashes[0][:12]} and {found.hashes[1][:12]}, largest difference {found.largest:.3g}"


def difference(one: Stream, other: Stream) -> Difference:
    """Of two tensors of one shape, a run of rows at a time."""
    digests, largest = (hasher(), hasher()), 0.0
    wider, narrower = (one, other) if one.dtype.itemsize * one.multiple >= other.dtype.itemsize * other.multiple else (other, one)
    start = 0
    for values in runs(wider):
        others = narrower.rows(start, start + len(values))
        start += len(values)
        pair = (values, others) if wider is one else (others, values)
        for digest, part in zip(digests, pair, strict=True):
            digest.update(tensor_bytes(part))
        if not torch.equal(values, others):
            largest = _larger(largest, (values.double() - others.double()).abs().max().item())
    return Difference((digests[0].hexdigest(), digests[1].hexdigest()), largest)


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
