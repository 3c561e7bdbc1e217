"""The conversions: what each tensor of the target is made of, and where it will lie."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_r1.models import family
from megatron_r1.weights import fp8, torch_dist
from megatron_r1.weights.conversion import Output, Plan, Task
from megatron_r1.weights.folders import HEADERS, KEPT, SIDE, HFFolder, Layout, MegatronFolder, all_names, model_config, stored_values
from megatron_r1.weights.hf import COPIED, INDEX, KEPT_FP32, SINGLE, describe
from megatron_r1.weights.rules import IGNORED, ConcatRows, Rename, Rule, check_names, rules
from megatron_r1.weights.safetensors_files import LENGTH_BYTES, Folder, Tensor, make_header, make_index, parse_header
from megatron_r1.weights.streams import Cast, Files, Quantized, Stream, height, joined

To = Literal["same", "bf16", "fp8"]


def hf_to_megatron(source: Path) -> Plan:
    """A Hugging Face folder as a Megatron checkpoint: FP8 becomes bf16, all else keeps its dtype."""
    files = Files()
    folder = Folder(source, files)
    hf = model_config(source)
    family(hf).check(hf)
    check_names(_WithoutScales(folder), hf)
    table = rules(hf)
    layout, addresses = torch_dist.Layout(), torch_dist.Addresses(hf, table)
    kept = [folder.places[name][0] for name in folder.places if _belongs_to_fp8(name, folder) or name.endswith(IGNORED)]
    known = {name for rule in table for name in all_names(rule)} | {tensor.name for tensor in kept}
    tasks = []
    for rule in table:
        _check_shapes(rule, folder)
        values = [stored_values(folder, tensor.name) for tensor in rule.hf]
        outputs = _pieces(rule, values, addresses(rule), layout=layout)
        copies = [(values[0], stored_values(folder, name)) for name in (*rule.copies, *rule.aliases) if name in folder.places]
        tasks.append(Task(outputs, copies))
    sizes = {f"{torch_dist.RELEASE}/__0_{i}.distcp": size for i, size in enumerate(layout.sizes)}
    frames = {f"{torch_dist.RELEASE}/{file}": data for file, data in layout.frames.items()}
    side = {f"{SIDE}/{file.name}": file.read_bytes() for file in _description(source)}
    side[f"{SIDE}/{HEADERS}"] = json.dumps(folder.headers).encode()
    small = {**layout.small_files(stacked=addresses.stacked), **side}
    plan = Plan("hf-to-megatron", folder.source_files, sizes, frames, tasks, small, files)
    if kept:
        places = _add_file(plan, f"{SIDE}/{KEPT}", make_header(kept))
        plan.tasks += [Task([place.output(folder.stream(name))]) for name, place in places.items()]
    dropped = [name for name in folder.places if name not in known]
    if dropped:
        plan.notes.append(f"left out: {len(dropped)} tensors that config.json says are not part of the model, such as {dropped[0]}")
    return plan


def megatron_to_hf(source: Path, *, to: To = "same", side: Path | None = None) -> Plan:
    """A Megatron checkpoint as a Hugging Face folder.

    side  the folder with config.json and tokenizer, for a checkpoint that was not converted here
    to    `same` is what the Hugging Face folder had, tensor by tensor, or, without one, what Megatron has
    """
    model = MegatronFolder(source, side)
    return _to_hf("megatron-to-hf", model, to=to)


def fp8_cast(source: Path, *, to: To) -> Plan:
    """A Hugging Face folder of any family in bf16 or in block FP8."""
    return _to_hf("fp8-cast", HFFolder(source), to=to)


def _to_hf(what: str, model: HFFolder | MegatronFolder, *, to: To) -> Plan:
    layout = {file: tensors for file, before in model.layout.items() if (tensors := _retype(before, to))}
    same = {file for file, text in model.headers.items() if [tensor for tensor, _ in parse_header(text, file)] == layout.get(file)}
    plan = Plan(what, model.source_files, {}, {}, [], {}, model.files)
    places: dict[str, Place] = {}
    for file, tensors in layout.items():
        places |= _add_file(plan, file, model.headers[file] if file in same else make_header(tensors))
    for name, place in places.items():
        weight = places.get(name.removesuffix(fp8.SCALE_SUFFIX))
        if weight is not place and weight is not None and weight.tensor.dtype == fp8.DTYPE:
            continue  # written with its weight: it is known when that was read
        stream = _encode(model, place.tensor)
        outputs = [place.output(stream)]
        if isinstance(stream, Quantized):
            outputs.append(places[name + fp8.SCALE_SUFFIX].output(stream.scale))
        plan.tasks.append(Task(outputs))
    plan.small = _describe(model.side, layout, to=to, same=len(same) == len(model.headers) > 0)
    return plan


@dataclass(frozen=True)
class Place:
    """Where a tensor of a Hugging Face file will lie."""

    tensor: Tensor
    file: str
    offset: int

    def output(self, stream: Stream) -> Output:
        """What is written there."""
        assert (stream.shape, stream.dtype) == (self.tensor.shape, self.tensor.dtype), f"{self.tensor=} {stream=}"
        return Output(self.tensor.name, self.file, self.offset, stream)


def _add_file(plan: Plan, file: str, header: str) -> dict[str, Place]:
    data = header.encode()
    found = {tensor.name: Place(tensor, file, offset) for tensor, offset in parse_header(header, file)}
    plan.frames[file] = [(0, len(data).to_bytes(LENGTH_BYTES, "little") + data)]
    plan.sizes[file] = LENGTH_BYTES + len(data) + sum(place.tensor.nbytes for place in found.values())
    return found


def _retype(tensors: list[Tensor], to: To) -> list[Tensor]:
    """The tensors of a file as they are to be written."""
    found: list[Tensor] = []
    for tensor in tensors:
        name, dtype = tensor.name, tensor.dtype
        if to == "fp8" and fp8.QUANTIZED.search(name) and len(tensor.shape) == 2 and dtype != fp8.DTYPE:
            found += [replace(tensor, dtype=fp8.DTYPE), Tensor(name + fp8.SCALE_SUFFIX, torch.float32, fp8.scale_shape(tensor.shape))]
        elif to != "bf16" or not dtype.is_floating_point or name.endswith(KEPT_FP32):
            found.append(tensor)
        elif not name.endswith(fp8.SCALE_SUFFIX):
            found.append(replace(tensor, dtype=torch.bfloat16))
    return found


def _encode(model: HFFolder | MegatronFolder, tensor: Tensor) -> Stream:
    """The values of a tensor in the dtype it is to have."""
    stream = model.values(tensor.name)
    if tensor.dtype == stream.dtype:
        return stream
    if tensor.dtype != fp8.DTYPE:
        return Cast(stream, tensor.dtype)
    kept = model.scale(tensor.name)
    # scales explain bf16 values, which is what a weight of FP8 was when training began
    return Quantized(Cast(stream, torch.bfloat16) if kept else stream, kept)


def _describe(side: Path, layout: Layout, *, to: To, same: bool) -> dict[str, bytes]:
    """Configuration, tokenizer and the like; `same` files keep their index."""
    small = {file.name: file.read_bytes() for file in _description(side) if same or file.name != INDEX}
    if not same and set(layout) != {SINGLE}:
        small[INDEX] = _json(make_index(layout))
    if same and to == "same":
        return small
    before = json.loads(small["config.json"])
    tensors = [tensor for file in layout.values() for tensor in file]
    nbytes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        nbytes[tensor.dtype] += tensor.nbytes
    config = describe(before, nbytes)
    if fp8.DTYPE in nbytes and "quantization_config" not in config:
        full = [
            t.name.removesuffix(".weight") for t in tensors if len(t.shape) == 2 and t.dtype.itemsize > 1 and t.name.endswith(".weight")
        ]
        config["quantization_config"] = fp8.QUANTIZATION | {"modules_to_not_convert": full}
    if config != before:
        small["config.json"] = _json(config)
    return small


def _description(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in COPIED and file.name != HEADERS]


def _pieces(rule: Rule, values: list[Stream], address: torch_dist.Address, *, layout: torch_dist.Layout) -> list[Output]:
    """A Megatron tensor's places; rows that are joined stay pieces of their own, which needs no tensor in memory."""
    if not isinstance(rule.operation, Rename | ConcatRows):
        values = [joined(rule.megatron, rule.operation.join, values)]
    shape = (sum(height(stream.shape) for stream in values), *values[0].shape[1:])
    if len({stream.dtype for stream in values}) > 1:
        raise ValueError(f"tensors {' and '.join(stream.name for stream in values)}: not of one dtype; cast the checkpoint first")
    row, outputs = 0, []
    for stream in values:
        rows = height(stream.shape)
        file, offset = layout.add(address, shape, row=row, rows=rows, dtype=stream.dtype)
        name = rule.megatron if len(values) == 1 else f"{rule.megatron} rows {row}"
        outputs.append(Output(name, f"{torch_dist.RELEASE}/{file}", offset, stream))
        row += rows
    return outputs


def _check_shapes(rule: Rule, folder: Folder) -> None:
    for tensor in rule.hf:
        tensor_file, shape = folder.files[tensor.name], folder.shape(tensor.name)
        if shape != tensor.shape:
            raise ValueError(
                f"{tensor_file}: {tensor.name} has shape {shape}, by config.json {tensor.shape}; use the model's own config.json"
            )


class _WithoutScales:
    """A folder as `check_names` is to see it: scales are no tensors of the model."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.shape = folder.folder, folder.shape
        self.files = {name: file for name, file in folder.files.items() if not _belongs_to_fp8(name, folder)}


def _belongs_to_fp8(name: str, folder: Folder) -> bool:
    weight = folder.places.get(name.removesuffix(fp8.SCALE_SUFFIX))
    return name.endswith(fp8.SCALE_SUFFIX) and weight is not None and weight[0].dtype == fp8.DTYPE


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
