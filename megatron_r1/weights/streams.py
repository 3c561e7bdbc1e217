"""Tensors that are read a run of rows at a time, so that a conversion needs memory for rows and not for tensors.

A stream has a shape, a dtype and `rows(start, stop)`. A file's tensor is one; the others change what they read from
another: cast, dequantise, take a part. Only what must see the whole (`Joined`, `Split`) holds a tensor, and lets it go
after its last row. `start` is a multiple of `multiple`, and so is `stop` unless it is the last row.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.weights import fp8

# bits of an infinite float, without its sign: what is not below is infinite or NaN
INFINITE = {torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00), torch.float32: (torch.int32, 0x7F800000)}


class Stream(Protocol):
    """See the module."""

    name: str  # for messages
    shape: tuple[int, ...]
    dtype: torch.dtype
    multiple: int

    def rows(self, start: int, stop: int) -> torch.Tensor: ...


def height(shape: tuple[int, ...]) -> int:
    """Rows of a tensor; a number has one."""
    return shape[0] if shape else 1


def row_bytes(stream: Stream | torch.Tensor) -> int:
    """Bytes of one row."""
    return math.prod(stream.shape[1:]) * stream.dtype.itemsize


def whole(stream: Stream) -> torch.Tensor:
    """All rows, in the tensor's own shape."""
    return stream.rows(0, height(stream.shape)).view(stream.shape)


def is_finite(values: torch.Tensor) -> bool:
    """Whether there is neither a NaN nor an infinity; integers have none."""
    if not values.numel():
        return True
    if values.dtype == fp8.DTYPE:
        return not fp8.has_nan(values)
    if values.dtype not in INFINITE:
        return True
    bits, infinite = INFINITE[values.dtype]
    return bool(((values.view(bits) & torch.iinfo(bits).max).max() < infinite).item())


class Files:
    """Open files, read and written by position from any thread. What was read does not stay in the page cache."""

    def __init__(self) -> None:
        self._descriptors: dict[tuple[Path, int], int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path, flags: int = os.O_RDONLY) -> int:
        """Of a file that stays open until `close`."""
        with self._lock:
            if (path, flags) not in self._descriptors:
                self._descriptors[path, flags] = os.open(path, flags)
            return self._descriptors[path, flags]

    def read(self, path: Path, offset: int, data: torch.Tensor) -> None:
        """Fill `data` with the file's bytes from `offset`. Raises ValueError where the file ends before."""
        descriptor, view, done = self.descriptor(path), memoryview(data.view(-1).view(torch.uint8).numpy()), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{path}: damaged or truncated, it ends at byte {offset + done}; download or convert it again")
            done += count
        os.posix_fadvise(descriptor, offset, done, os.POSIX_FADV_DONTNEED)

    def write(self, path: Path, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`."""
        descriptor, view, done = self.descriptor(path, os.O_WRONLY), memoryview(data), 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)

    def settle(self, path: Path) -> None:
        """Return when what was written is on the disk; it leaves the page cache."""
        descriptor = self.descriptor(path, os.O_WRONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])


def tensor_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor, in its order."""
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())


@dataclass
class Stored:
    """A tensor that lies in a file as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    files: Files
    path: Path
    offset: int
    multiple: int = 1

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read from the file."""
        values = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        self.files.read(self.path, self.offset + start * row_bytes(self), values)
        return values


@dataclass
class Rows:
    """`shape[0]` rows of another stream from row `first`."""

    name: str
    source: Stream
    first: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.dtype, self.multiple = self.source.dtype, self.source.multiple

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Those of the other stream."""
        return self.source.rows(self.first + start, self.first + stop)


@dataclass
class Cast:
    """Another stream in another dtype."""

    source: Stream
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.name, self.shape, self.multiple = self.source.name, self.source.shape, self.source.multiple

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rounded once."""
        return self.source.rows(start, stop).to(self.dtype)


@dataclass
class Dequantized:
    """Block FP8 as bf16. Raises ValueError for scales that `fp8.quantize` could not undo."""

    codes: Stream
    scale: Stream
    dtype: torch.dtype = torch.bfloat16
    multiple: int = fp8.BLOCK

    def __post_init__(self) -> None:
        self.name, self.shape = self.codes.name, self.codes.shape
        if len(self.shape) != 2 or self.scale.shape != fp8.scale_shape(self.shape):
            raise ValueError(f"tensor {self.scale.name}: shape {self.scale.shape} is not one number a 128 x 128 block of {self.shape}")

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """`fp8.dequantize`."""
        scale = self.scale.rows(start // fp8.BLOCK, -(-stop // fp8.BLOCK))
        codes = self.codes.rows(start, stop)
        fp8.check(self.name, codes, scale)
        return fp8.dequantize(codes, scale, self.dtype)


@dataclass
class Quantized:
    """Another stream as block FP8; `scale` is the stream of its scales, whole once all rows were read."""

    source: Stream
    kept: Stream | None
    dtype: torch.dtype = fp8.DTYPE
    multiple: int = fp8.BLOCK

    def __post_init__(self) -> None:
        self.name, self.shape = self.source.name, self.source.shape
        dtype = self.kept.dtype if self.kept else torch.float32
        self.scale = InMemory(self.name + fp8.SCALE_SUFFIX, torch.zeros(fp8.scale_shape(self.shape), dtype=dtype))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """`fp8.quantize`."""
        where = slice(start // fp8.BLOCK, -(-stop // fp8.BLOCK))
        kept = self.kept.rows(where.start, where.stop) if self.kept else None
        codes, self.scale.values[where] = fp8.quantize(self.source.rows(start, stop), kept)
        return codes


@dataclass
class InMemory:
    """A tensor that is there."""

    name: str
    values: torch.Tensor
    multiple: int = 1

    def __post_init__(self) -> None:
        self.shape, self.dtype = tuple(self.values.shape), self.values.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A view."""
        return self.values.view(-1)[start:stop] if not self.shape else self.values[start:stop]


@dataclass
class Computed:
    """A tensor made of whole other ones when its first row is asked for, and let go after its last."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    multiple: int = 1
    _values: torch.Tensor | None = field(default=None, repr=False)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Of the computed tensor."""
        if self._values is None:
            self._values = self.make()
            assert self._values.shape == self.shape, f"{self.name=} {self._values.shape=} {self.shape=}"
        values = self._values[start:stop]
        if stop == self.shape[0]:
            self._values = None
        return values


def joined(name: str, operation: Callable[[Sequence[torch.Tensor]], torch.Tensor], sources: Sequence[Stream]) -> Computed:
    """`operation` of all of some streams of one height each, which adds up their rows."""
    shape = (sum(height(source.shape) for source in sources), *sources[0].shape[1:])
    return Computed(name, shape, sources[0].dtype, lambda: operation([whole(source) for source in sources]))
