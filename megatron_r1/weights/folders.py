"""A model's folder, in either format, as values by Hugging Face name.

A converted Megatron folder keeps, in `hf/`, all of the Hugging Face folder that Megatron has no place for: configuration,
tokenizer, chat template; the headers of its weight files; FP8 scales, and buffers that old checkpoints hold. So it is the
whole model, and going back gives the same files, byte for byte, as long as nobody changed the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.models import family
from megatron_r1.weights import fp8
from megatron_r1.weights.rules import ConcatRows, Rename, Rule, rules
from megatron_r1.weights.safetensors_files import Folder, Tensor, divide, parse_header
from megatron_r1.weights.streams import Computed, Dequantized, Files, Rows, Stream, whole
from megatron_r1.weights.torch_dist import RELEASE, Addresses
from megatron_r1.weights.torch_dist_reader import Checkpoint

SIDE = "hf"  # the subfolder of a Megatron folder
HEADERS, KEPT = "headers.json", "kept.safetensors"

Layout = dict[str, list[Tensor]]  # file -> its tensors, in their order


@dataclass
class HFFolder:
    """A Hugging Face folder as values: what is FP8 is dequantised."""

    source: Path

    def __post_init__(self) -> None:
        self.files, self.side = Files(), self.source
        self.folder = Folder(self.source, self.files)
        self.headers, self.source_files = self.folder.headers, self.folder.source_files
        self.layout: Layout = {name: [tensor for tensor, _ in parse_header(text, name)] for name, text in self.headers.items()}
        model_config(self.source)

    def values(self, name: str) -> Stream:
        """A tensor by name."""
        return stored_values(self.folder, name)

    def scale(self, name: str) -> Stream | None:
        """The scales that a weight has."""
        name += fp8.SCALE_SUFFIX
        return self.folder.stream(name) if name in self.folder.places else None


class MegatronFolder:
    """A Megatron checkpoint as values by Hugging Face name."""

    def __init__(self, source: Path, side: Path | None) -> None:
        self.source, self.side = source, side or source / SIDE
        if not (self.side / "config.json").is_file():
            raise ValueError(f"{self.side / 'config.json'}: missing; give the Hugging Face folder the model came from with --hf")
        self.files = Files()
        self._checkpoint = Checkpoint(source, self.files)
        self.source_files = self._checkpoint.source_files
        hf = model_config(self.side)
        family(hf).check(hf)
        table = rules(hf)
        self._addresses = Addresses(hf, table)
        self._rules = {name: rule for rule in table for name in all_names(rule)}
        self._kept = Folder(self.side, self.files, single=KEPT) if (self.side / KEPT).is_file() else None
        headers = self.side / HEADERS
        self.headers: dict[str, str] = json.loads(headers.read_text()) if headers.is_file() else {}
        self.layout = self._layout(table)

    def _layout(self, table: tuple[Rule, ...]) -> Layout:
        if not self.headers:
            written = [name for rule in table for name in (*(tensor.name for tensor in rule.hf), *rule.copies)]
            return divide([Tensor(name, self.values(name).dtype, self.values(name).shape) for name in written])
        kept = set(self._kept.places) if self._kept else set()
        found = {}
        for file, text in self.headers.items():
            found[file] = [tensor for tensor, _ in parse_header(text, file) if tensor.name in self._rules or tensor.name in kept]
        return {file: tensors for file, tensors in found.items() if tensors}

    def values(self, name: str) -> Stream:
        """A tensor by name."""
        if name not in self._rules:
            return self._kept.stream(name)
        rule = self._rules[name]
        source = self._checkpoint.stream(rule, self._addresses)
        index = next((i for i, tensor in enumerate(rule.hf) if tensor.name == name), 0)
        shape = rule.hf[index].shape
        if isinstance(rule.operation, Rename):
            return Rows(name, source, 0, shape)
        if isinstance(rule.operation, ConcatRows):
            return Rows(name, source, index * shape[0], shape)
        return Computed(name, shape, source.dtype, lambda: rule.operation.split(whole(source), len(rule.hf))[index].contiguous())

    def scale(self, name: str) -> Stream | None:
        """The scales that a weight had when it was FP8."""
        name += fp8.SCALE_SUFFIX
        return self._kept.stream(name) if self._kept and name in self._kept.places else None


def open_model(source: Path, side: Path | None = None) -> HFFolder | MegatronFolder:
    """A checkpoint of either format."""
    is_megatron = any((folder / ".metadata").is_file() for folder in (source, source / RELEASE))
    return MegatronFolder(source, side) if is_megatron else HFFolder(source)


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of the model whatever its weights' format. Raises ValueError for a file or a format that is not read here."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing; give the folder the model came from")
    try:
        hf = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file}: damaged, not JSON; download it again") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{file}: not a configuration but a {type(hf).__name__}; download it again")
    quantization = hf.pop("quantization_config", None)
    if quantization is not None:
        for key in ("quant_method", "weight_block_size"):
            if quantization.get(key) != fp8.QUANTIZATION[key]:
                raise ValueError(
                    f"{file}: quantization_config.{key} = {quantization.get(key)!r} is not read; only block FP8 of 128 x 128 is"
                )
    return hf


def stored_values(folder: Folder, name: str) -> Stream:
    """A tensor of a Hugging Face folder; FP8 is dequantised."""
    stream = folder.stream(name)
    if stream.dtype != fp8.DTYPE:
        return stream
    if name + fp8.SCALE_SUFFIX not in folder.places:
        raise ValueError(f"{stream.path}: tensor {name} is FP8 and {name + fp8.SCALE_SUFFIX} is missing; download it again")
    return Dequantized(stream, folder.stream(name + fp8.SCALE_SUFFIX))


def all_names(rule: Rule) -> list[str]:
    """Every Hugging Face name of the tensors of a rule."""
    return [*(tensor.name for tensor in rule.hf), *rule.copies, *rule.aliases]
