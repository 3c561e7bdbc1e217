"""The safetensors format by hand: where each tensor lies in a folder's files, and files whose places are known beforehand.

safetensors' own library writes a file whole, from memory. A conversion fills files from several threads in any order,
and goes on after a kill, so it must know every byte's place before the first tensor is read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron_r1.weights.hf import INDEX, SINGLE, read_index
from megatron_r1.weights.streams import Files, Stored

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8  # the header's length, in front of it
LONGEST_HEADER = 100_000_000  # of safetensors' own reader


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def make_header(tensors: list[Tensor]) -> str:
    """The header of a file that holds these tensors, one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"))
    return text + " " * (-(LENGTH_BYTES + len(text.encode())) % 8)


def parse_header(text: str, where: str) -> list[tuple[Tensor, int]]:
    """(tensor, offset in the file) of a header, in the file's order. Raises ValueError for one that is not whole."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{where}: tensor {twice} is there twice; download it again")
        return dict(pairs)

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        raise ValueError(f"{where}: damaged, its header is not JSON; download it again") from None
    base, found = LENGTH_BYTES + len(text.encode()), []
    for name, entry in entries.items():
        if name != "__metadata__":
            tensor, start = _entry(name, entry, where)
            found.append((tensor, base + start))
    found.sort(key=lambda one: one[1])
    for (before, start), (after, offset) in pairwise(found):
        if offset != start + before.nbytes:
            raise ValueError(f"{where}: tensor {after.name} overlaps {before.name} or leaves a hole; damaged, download it again")
    return found


def _entry(name: str, entry: Any, where: str) -> tuple[Tensor, int]:
    try:
        kind, shape, (start, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}: the header's entry for {name} is not one; damaged, download it again") from None
    if kind not in DTYPES:
        raise ValueError(f"{where}: tensor {name} has dtype {kind}, which is not read here; use one of {', '.join(DTYPES)}")
    tensor = Tensor(name, DTYPES[kind], shape)
    if end - start != tensor.nbytes:
        raise ValueError(f"{where}: tensor {name} has {end - start} bytes, its shape {shape} needs {tensor.nbytes}; damaged")
    return tensor, start


def read_header(file: Path) -> str:
    """The header of a file. Raises ValueError for a file that is missing, truncated or something else."""
    if not file.is_file():
        raise ValueError(f"{file}: missing though {INDEX} names it; download it")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, LONGEST_HEADER):
            raise ValueError(f"{file}: damaged or truncated, it has {size} bytes and no whole header; download it again")
        try:
            return stream.read(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{file}: damaged, its header is not text; download it again") from None


class Folder:
    """The tensors of a Hugging Face folder as streams, by name; every header is read and checked at once.

    `single` is the one file to read of a folder without an index. Raises ValueError, one line with the file and the fix, for
    files that are missing, truncated, or at odds with the
    index.
    """

    def __init__(self, folder: Path, files: Files, *, single: str | None = None) -> None:
        self.folder, self._files = folder, files
        index = _index(folder) if single is None else _names_of(folder / single)
        self.headers = {file.name: read_header(file) for file in dict.fromkeys(index.values())}
        self.places: dict[str, tuple[Tensor, Path, int]] = {}
        for name, text in self.headers.items():
            self._add(folder / name, text, index)
        for name, file in index.items():
            if name not in self.places:
                raise ValueError(f"{file}: tensor {name} is missing though {INDEX} says it is there; download both again")
        self.files = {name: place[1] for name, place in self.places.items()}  # what rules.check_names wants, with `shape`

    def _add(self, file: Path, text: str, index: dict[str, Path]) -> None:
        end = LENGTH_BYTES + len(text.encode())
        for tensor, offset in parse_header(text, str(file)):
            if tensor.name in self.places:
                raise ValueError(f"{file}: tensor {tensor.name} is in {self.places[tensor.name][1].name}, too; download both again")
            if index.get(tensor.name) != file:
                raise ValueError(f"{file}: tensor {tensor.name} is here and not where {INDEX} says; download both again")
            self.places[tensor.name] = (tensor, file, offset)
            end = max(end, offset + tensor.nbytes)
        if file.stat().st_size != end:
            raise ValueError(f"{file}: damaged or truncated, {file.stat().st_size} bytes instead of {end}; download it again")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.places[name][0].shape

    def stream(self, name: str) -> Stored:
        """A tensor as it lies there."""
        tensor, file, offset = self.places[name]
        return Stored(name, tensor.shape, tensor.dtype, self._files, file, offset)

    @property
    def source_files(self) -> list[Path]:
        """Files with tensors."""
        return [self.folder / name for name in self.headers]


def _index(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with config.json and *.safetensors")
    if (folder / INDEX).is_file():
        return read_index(folder / INDEX)
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder}: neither {INDEX} nor {SINGLE} is there; download or convert the weights into it")
    return _names_of(folder / SINGLE)


def _names_of(file: Path) -> dict[str, Path]:
    return {tensor.name: file for tensor, _ in parse_header(read_header(file), str(file))}


def divide(tensors: list[Tensor], limit: int = 5 * 10**9) -> dict[str, list[Tensor]]:
    """Files of at most `limit` bytes, or one tensor, that hold the tensors in this order: name -> tensors."""
    shards: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def make_index(files: dict[str, list[Tensor]]) -> dict[str, Any]:
    """The content of the index of these files."""
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
