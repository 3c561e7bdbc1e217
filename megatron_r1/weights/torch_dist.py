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
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_r1.models import family
from megatron_r1.weights.rules import Rule

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


def missing_file(folder: Path) -> str | None:
    """The file without which this is no whole checkpoint. What is no tensor is in common.pt; newer cores keep it in an object."""
    for name in (".metadata", "metadata.json", "common.pt"):
        if not (folder / name).is_file() and (name != "common.pt" or b"common_state" not in (folder / ".metadata").read_bytes()):
            return name
    return None


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
