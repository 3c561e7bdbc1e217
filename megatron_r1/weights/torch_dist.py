"""Megatron's distributed checkpoint format `torch_dist`, tensor by tensor and without the model.

    release/__0_<i>.distcp   tensors, each as torch.save writes it, one after the other
    release/.metadata        which part of which tensor lies where; read by torch.distributed.checkpoint
    release/metadata.json    the format's name and version
    release/common.pt        what is no tensor
    latest_checkpointed_iteration.txt    so that Megatron-LM's --load finds the folder

A key of the format is the tensor's canonical name (names.py), except that

- routed experts are one tensor with a leading dimension of experts, `mlp.experts.experts.linear_fc1.weight`;
- where all of a model's layers are alike (no `moe_layer_freq` list in its configuration), the decoder's layers are one
  tensor with a leading dimension of layers, `decoder.layers.mlp.linear_fc2.weight`;
- Transformer Engine's layers and newer cores spell some names differently. The metadata lists the same bytes under each.

Modules of Megatron also ask for an `_extra_state`, an object that is None unless Transformer Engine trains in FP8.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_r1.models import family
from megatron_r1.weights.rules import Rule
from megatron_r1.weights.streams import Files, row_bytes

RELEASE = "release"
TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
CHECKPOINT_VERSION = 3.0  # Megatron-LM takes linear_qkv apart and rearranges it where this is missing
ALIGNMENT = 64
SPELLINGS = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    (".self_attention.q_layernorm.weight", ".self_attention.linear_q_up_proj.layer_norm_weight"),
    (".self_attention.kv_layernorm.weight", ".self_attention.linear_kv_up_proj.layer_norm_weight"),
    (".transformer_layer.", ".mtp_model_layer."),
)
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Address:
    """Where a Megatron tensor is in the format: index `lead` of the `leading` dimensions of a larger one."""

    keys: tuple[str, ...]  # in every spelling
    lead: tuple[int, ...]
    leading: tuple[int, ...]


class Addresses:
    """The addresses of a model's tensors."""

    def __init__(self, hf: dict[str, Any], table: tuple[Rule, ...]) -> None:
        self._layers = hf["num_hidden_layers"]
        self._experts = 1 + max((rule.expert for rule in table if rule.expert is not None), default=0)
        frequency = family(hf).transformer_arguments(hf).get("moe_layer_freq", 1)
        self.stacked = isinstance(frequency, int) and frequency == 1  # as Megatron decides it

    def __call__(self, rule: Rule, *, stacked: bool | None = None) -> Address:
        """Of one tensor; `stacked` instead of what Megatron does by default for this model."""
        key, lead, leading = rule.megatron, [], []
        if (layer := LAYER.match(key)) and (self.stacked if stacked is None else stacked):
            key = f"decoder.layers.{key[layer.end() :]}"
            lead, leading = [int(layer[1])], [self._layers]
        if rule.expert is not None:
            key = key.replace(f".experts.{rule.expert}.", ".experts.experts.")
            lead, leading = [*lead, rule.expert], [*leading, self._experts]
        return Address(_spellings(key), tuple(lead), tuple(leading))


def _spellings(key: str) -> tuple[str, ...]:
    choices = [pair for pair in SPELLINGS if pair[0] in key]
    found = []
    for chosen in product((False, True), repeat=len(choices)):
        spelled = key
        for (ours, other), change in zip(choices, chosen, strict=True):
            spelled = spelled.replace(ours, other) if change else spelled
        found.append(spelled)
    return tuple(found)


@cache
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the values of a tensor."""
    parts = _Parts()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), parts)
    ends = [position + len(data) for position, data in parts.written]
    last = next(i for i, end in enumerate(ends) if end < parts.written[i + 1][0])
    assert parts.written[last + 1][0] - ends[last] == math.prod(shape) * dtype.itemsize, f"{shape=} {dtype=}"
    return tuple(b"".join(data for _, data in part) for part in (parts.written[: last + 1], parts.written[last + 1 :]))


class _Parts(io.RawIOBase):
    """A file that keeps what is written to it, and not what is left out."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence in (os.SEEK_SET, os.SEEK_CUR), f"{whence=}"
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def write(self, data: Any) -> int:
        self.written.append((self._position, bytes(data)))
        self._position += len(data)
        return len(data)


@dataclass
class Layout:
    """The files of a checkpoint as they will be: `add` gives each piece of a tensor its place."""

    file_bytes: int = 5 * 10**9
    sizes: list[int] = field(default_factory=list)
    frames: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)  # file -> (offset, bytes around the values)
    _tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = field(default_factory=dict)
    _storage: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    _nothing: _StorageInfo | None = None

    def _append(self, length: int) -> tuple[str, int]:
        if not self.sizes or self.sizes[-1] + length > max(self.file_bytes, length):
            self.sizes.append(0)
        name = f"__0_{len(self.sizes) - 1}.distcp"
        start = self.sizes[-1]
        self.sizes[-1] = -(-(start + length) // ALIGNMENT) * ALIGNMENT
        self.frames.setdefault(name, [])
        return name, start

    def add(self, address: Address, shape: tuple[int, ...], *, row: int, rows: int, dtype: torch.dtype) -> tuple[str, int]:
        """(file, offset of the values) of `rows` rows from `row` of the tensor of this shape at `address`."""
        size = (*(1 for _ in address.lead), rows, *shape[1:])
        head, tail = frame(size, dtype)
        values = math.prod(size) * dtype.itemsize
        length = len(head) + values + len(tail)
        file, start = self._append(length)
        self.frames[file] += [(start, head), (start + len(head) + values, tail)]
        offset = torch.Size((*address.lead, row, *(0 for _ in shape[1:])))
        for key in address.keys:
            if key not in self._tensors:
                self._tensors[key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size((*address.leading, *shape)), [])
            self._tensors[key].chunks.append(ChunkStorageMetadata(offset, torch.Size(size)))
            self._storage[MetadataIndex(key, offset)] = _StorageInfo(file, start, length)
            self._add_nothing(key.rpartition(".")[0], address)
        if ".linear_proj." in address.keys[0]:  # a linear layer beside it has no weights and asks too
            for key in address.keys:
                self._add_nothing(key.replace(".linear_proj.weight", ".core_attention"), address)
        return file, start + len(head)

    def _add_nothing(self, module: str, address: Address) -> None:
        """The extra state of a module: all are the same few bytes."""
        if self._nothing is None:
            data = io.BytesIO()
            torch.save([None], data)
            file, start = self._append(len(data.getvalue()))
            self.frames[file].append((start, data.getvalue()))
            self._nothing = _StorageInfo(file, start, len(data.getvalue()))
        lead, leading = address.lead or (0,), address.leading or (1,)
        key = f"{module}._extra_state/shard_{'.'.join(map(str, lead))}_{'.'.join(map(str, leading))}"
        self._tensors[key] = BytesStorageMetadata()
        self._storage[MetadataIndex(key)] = self._nothing

    def small_files(self, *, stacked: bool) -> dict[str, bytes]:
        """Everything but the tensors, under the checkpoint's folder."""
        common = io.BytesIO()
        content = {"non_homogeneous_layers": not stacked}  # how Megatron-LM is to ask for the layers
        torch.save({"checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, "content_metadata": content}, common)
        metadata = Metadata(state_dict_metadata=self._tensors, storage_data=self._storage)
        return {
            f"{RELEASE}/common.pt": common.getvalue(),
            f"{RELEASE}/metadata.json": json.dumps(FORMAT).encode(),
            f"{RELEASE}/.metadata": pickle.dumps(metadata),
            TRACKER: RELEASE.encode(),
        }


class Checkpoint:
    """A checkpoint of this format, by whoever wrote it, as streams of Megatron tensors.

    Raises ValueError for a folder that is not whole. Its metadata are a pickle, as Megatron's own loader reads it: read
    only what you trust.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder / RELEASE if (folder / RELEASE).is_dir() else folder
        self._files = files
        for name in (".metadata", "metadata.json", "common.pt"):
            if not (self.folder / name).is_file():
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
            part = torch.empty((last - first, *piece.size[1:]), dtype=self.dtype)
            row = first - piece.first[0] + piece.number * piece.size[0]
            path = self.folder / piece.info.relative_path
            values_offset = _values_offset(path, piece.info.offset, piece.info.length)
            self.files.read(path, values_offset + row * row_bytes(part), part)
            across = tuple(slice(a, a + n) for a, n in zip(piece.first[1:], piece.size[1:], strict=True))
            values[(slice(first - start, last - start), *across)] = part
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
    try:
        with path.open("rb") as file, FakeTensorMode():
            tensor = torch.load(_create_file_view(file, start, length), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        raise ValueError(f"{path}: damaged or truncated at byte {start}; write or copy the checkpoint again") from None
    if not tensor.is_contiguous():
        raise ValueError(f"{path}: a tensor at byte {start} is stored transposed, which is not read here; save it contiguous")
    return start + tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
