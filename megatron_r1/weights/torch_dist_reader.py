"""Checkpoints of Megatron's format `torch_dist` (torch_dist.py), whoever wrote them and however they were divided, as streams."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_r1.weights.rules import Rule
from megatron_r1.weights.streams import Files, row_bytes
from megatron_r1.weights.torch_dist import RELEASE, Address, Addresses, missing_file


class Checkpoint:
    """A checkpoint of this format, by whoever wrote it, as streams of Megatron tensors.

    Raises ValueError for a folder that is not whole. Its metadata are a pickle, as Megatron's own loader reads it: read
    only what you trust.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder / RELEASE if (folder / RELEASE).is_dir() else folder
        self._files = files
        if name := missing_file(self.folder):
            raise ValueError(f"{self.folder}: not a whole torch_dist checkpoint, {name} is missing; write or copy it again")
        try:
            self._metadata: Metadata = pickle.loads((self.folder / ".metadata").read_bytes())
        except (pickle.UnpicklingError, EOFError, AttributeError):
            raise ValueError(f"{self.folder / '.metadata'}: damaged; write or copy the checkpoint again") from None
        self._storage = {(index.fqn, tuple(index.offset or ())): info for index, info in self._metadata.storage_data.items()}
        for file in self.source_files:
            if not file.is_file():
                raise ValueError(f"{file}: missing though .metadata names it; write or copy the checkpoint again")

    @property
    def source_files(self) -> list[Path]:
        """Files with tensors."""
        return [self.folder / name for name in dict.fromkeys(info.relative_path for info in self._storage.values())]

    def stream(self, rule: Rule, addresses: Addresses) -> Pieces:
        """The Megatron tensor of a rule. Raises ValueError where it is not there, or of another shape."""
        rows = [tensor.shape for tensor in rule.hf]
        shape = (sum(shape[0] for shape in rows), *rows[0][1:])
        for address in (addresses(rule, stacked=stacked) for stacked in (addresses.stacked, not addresses.stacked)):
            for key in address.keys:
                entry = self._metadata.state_dict_metadata.get(key)
                if entry is not None:
                    return self._pieces(key, entry, address, shape=shape)
        raise ValueError(f"{self.folder}: tensor {addresses(rule).keys[0]} of shape {shape} is missing; is config.json this model's?")

    def _pieces(self, key: str, entry: TensorStorageMetadata, address: Address, *, shape: tuple[int, ...]) -> Pieces:
        stored = tuple(entry.size)[len(address.lead) :]
        # Megatron may have more rows than the vocabulary, for tensor parallelism to divide
        fits = stored == shape or (stored[1:] == shape[1:] and stored[0] > shape[0] and "layers" not in key)
        if tuple(entry.size)[: len(address.lead)] != address.leading or not fits:
            wanted = (*address.leading, *shape)
            raise ValueError(f"{self.folder}: {key} has shape {tuple(entry.size)}, by config.json {wanted}; is that this model's?")
        found, lead = [], address.lead
        for chunk in entry.chunks:
            first, size = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = [at - start for at, start in zip(lead, first[: len(lead)], strict=True)]
            if all(0 <= i < n for i, n in zip(inside, size[: len(lead)], strict=True)):
                number = 0
                for i, n in zip(inside, size[: len(lead)], strict=True):
                    number = number * n + i
                found.append(Piece(self._storage[key, first], first[len(lead) :], size[len(lead) :], number))
        return Pieces(key, shape, entry.properties.dtype, self._files, self.folder, found)


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor: number `number` of those that lie together."""

    info: _StorageInfo
    first: tuple[int, ...]
    size: tuple[int, ...]
    number: int


@dataclass
class Pieces:
    """A stream put together of what ranks wrote of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    files: Files
    folder: Path
    pieces: list[Piece]
    multiple: int = 1

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read from every file that has some of it. Raises ValueError where nobody wrote a part."""
        values, filled = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype), 0
        for piece, first, last in self._overlapping(start, stop):
            rectangle = (
                slice(first - start, last - start),
                *(slice(a, a + n) for a, n in zip(piece.first[1:], piece.size[1:], strict=True)),
            )
            target = values[rectangle]
            part = target if target.is_contiguous() else torch.empty(target.shape, dtype=self.dtype)
            row = first - piece.first[0] + piece.number * piece.size[0]
            path = self.folder / piece.info.relative_path
            values_offset = _values_offset(path, piece.info.offset, piece.info.length)
            self.files.read(path, values_offset + row * row_bytes(part), part)
            if part is not target:
                target.copy_(part)
            filled += part.numel()
        if filled != values.numel():
            raise ValueError(f"{self.folder}: tensor {self.name} has parts that no file holds; write or copy the checkpoint again")
        return values

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        for piece in self.pieces:
            first, last = max(start, piece.first[0]), min(stop, piece.first[0] + piece.size[0])
            if first < last:
                yield piece, first, last


@cache
def _values_offset(path: Path, start: int, length: int) -> int:
    """Where the values begin in what torch.save wrote there. Raises ValueError for what is not a tensor's bytes in order."""
    without_data = FakeTensorMode()
    without_data.cache_enabled = False  # it keeps a little of each call, in the heap's gaps, where then no run of rows fits again
    try:
        with path.open("rb") as file, without_data:
            tensor = torch.load(_create_file_view(file, start, length), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        raise ValueError(f"{path}: damaged or truncated at byte {start}; write or copy the checkpoint again") from None
    if not tensor.is_contiguous():
        raise ValueError(f"{path}: a tensor at byte {start} is stored transposed, which is not read here; save it contiguous")
    return start + tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
