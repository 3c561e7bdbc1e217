"""Hugging Face checkpoint folders: read safetensors lazily, write them so that transformers and vLLM load them untouched."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_r1.weights import fp8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # config, tokenizer, chat template, custom code
KEPT_FP32 = ("e_score_correction_bias",)  # a router bias in bf16 changes which experts are chosen


class Reader(Protocol):
    """Where `shard.load` takes tensors of Hugging Face names from."""

    folder: Path
    files: dict[str, Path]  # tensor -> its file, for messages

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor: ...


class SafetensorsReader:
    """The tensors of a Hugging Face folder by name; a file is opened when a tensor of it is first asked for.

    Raises ValueError, with the file and the fix, for a missing folder or file, a damaged file and an index that does
    not match its files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; give one with config.json and *.safetensors")
        self._handles: dict[Path, Any] = {}
        index = self.folder / INDEX
        if index.is_file():
            self.files = read_index(index)
        elif (self.folder / SINGLE).is_file():
            single = self.folder / SINGLE
            self.files = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise ValueError(f"{self.folder}: neither {INDEX} nor {SINGLE} is there; download or convert the weights into it")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """One rectangular part of a tensor; only its bytes are read."""
        return self._slice(name)[index]

    def __getitem__(self, name: str) -> torch.Tensor:
        self._slice(name)
        return self._handles[self.files[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        file = self.files[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError:
            raise ValueError(f"{file}: tensor {name} is missing though {INDEX} says it is there; download both again") from None

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            if not file.is_file():
                raise ValueError(f"{file}: missing though {INDEX} names it; download it")
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file}: damaged or truncated ({error}); download it again") from None
        return self._handles[file]


def read_index(index: Path) -> dict[str, Path]:
    """tensor -> file, of an index. Raises ValueError where it is not one."""
    try:
        files = json.loads(index.read_text())["weight_map"]
        return {name: index.parent / file for name, file in files.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f'{index}: not an index of the form {{"weight_map": {{tensor: file}}}}; download it again') from None


def write(
    folder: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    source_folder: str | Path,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """A Hugging Face checkpoint in `folder` from a stream of (name, tensor); holds at most one shard in memory.

    Configuration, tokenizer, chat template and custom code are copied from `source_folder`, but config.json is `config`
    where that is given and says something else. Floating tensors become `dtype` where it is given; config.json says which
    they are. The folder appears complete or not at all. Raises ValueError when it exists with something in it, unless
    `overwrite`.
    """
    folder, source = check_target(folder, overwrite=overwrite), Path(source_folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = _copy_description(source, partial, config=config)
    nbytes = _write_shards(partial, tensors, dtype=dtype, shard_bytes=shard_bytes)
    if (described := describe(config, nbytes)) != config:
        _write_json(partial / "config.json", described)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def check_target(folder: str | Path, *, overwrite: bool) -> Path:
    """`folder` without links, so that what is written beside it is on its disk and can take its name.

    Raises ValueError where that would destroy something, or cannot be.
    """
    folder = Path(os.path.realpath(folder))
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; name a folder to write the checkpoint to")
    if os.path.ismount(folder):
        raise ValueError(f"{folder}: is a mount point, which cannot be replaced; name a folder in it")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder}: is not empty; name another folder or allow overwriting it")
    return folder


def describe(config: Mapping[str, Any], nbytes: Mapping[torch.dtype, int]) -> dict[str, Any]:
    """The config.json of weights of so many bytes of each dtype: those without FP8 are not quantised, and are what most of them is."""
    if fp8.DTYPE in nbytes:
        return dict(config)
    dtype = max((dtype for dtype in nbytes if dtype.is_floating_point), key=nbytes.get)
    unquantized = {key: value for key, value in config.items() if key != "quantization_config"}
    return unquantized | {"dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")}


def _copy_description(source: Path, target: Path, *, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what config.json says then."""
    config_file = source / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{config_file}: missing; give the folder the model came from")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    original = json.loads(config_file.read_text())
    config = dict(original if config is None else config)
    if config != original:
        _write_json(target / "config.json", config)
    if not (target / "generation_config.json").exists():
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(target / "generation_config.json", {key: config[key] for key in tokens if config.get(key) is not None})
    return config


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, dtype: torch.dtype | None, shard_bytes: int
) -> Counter[torch.dtype]:
    """Returns the bytes of each dtype. Shards get their final names, which count them, once the stream has ended."""
    nbytes: Counter[torch.dtype] = Counter()
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        keep = dtype is None or not tensor.is_floating_point() or name.endswith(KEPT_FP32)
        # a copy: the stream may reuse its memory, and safetensors refuses two names for the same memory
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype if keep else dtype).copy_(tensor)
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        nbytes[tensor.dtype] += tensor.nbytes
        size += tensor.nbytes
    flush()

    if len(shards) == 1:
        (folder / "0.tmp").rename(folder / SINGLE)
        return nbytes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.tmp").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": nbytes.total()}, "weight_map": dict(sorted(weight_map.items()))})
    return nbytes


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
