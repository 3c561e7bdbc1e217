"""Live Megatron parameters by names that do not depend on the layout, and Hugging Face tensors into them; exporter.py is the way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import megatron_r1.mcore  # noqa: F401  installs the CPU adaptations before the first import of Megatron

# isort: split
from megatron.core import parallel_state

from megatron_r1.weights.hf import Reader
from megatron_r1.weights.names import Place, canonical
from megatron_r1.weights.rules import Rule, check_names, rules


def named_tensors(chunks: Sequence[torch.nn.Module], hf: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, parameter or persistent buffer) of this rank's model chunks, wrapped or not.

    A tensor kept twice, as the embedding for an MTP layer on another stage, comes twice.
    """
    for chunk in chunks:
        while hasattr(chunk, "module"):  # DDP, Float16Module
            chunk = chunk.module
        place = _place(chunk, hf)
        for name, tensor in chunk.state_dict(keep_vars=True).items():
            if not name.endswith("_extra_state"):
                yield canonical(name, place), tensor


def _place(model: torch.nn.Module, hf: dict[str, Any]) -> Place:
    def numbers(block: torch.nn.Module | None) -> dict[int, int]:
        return {i: layer.layer_number - 1 for i, layer in enumerate(block.layers)} if block is not None else {}

    experts = model.config.num_moe_experts or 0
    return Place(
        decoder_layers=numbers(model.decoder),
        mtp_layers=numbers(getattr(model, "mtp", None)),
        first_expert=experts // parallel_state.get_expert_model_parallel_world_size() * parallel_state.get_expert_model_parallel_rank(),
        tied=bool(hf.get("tie_word_embeddings")),
    )


def load(chunks: Sequence[torch.nn.Module], reader: Reader, hf: dict[str, Any]) -> None:
    """Copy tensors of Hugging Face names, as a checkpoint's, into this rank's parameters and buffers; each rank reads only its own part.

    Raises ValueError when the files lack a tensor of `hf` (a config.json), hold one that it has no place for, or one
    of another shape.
    """
    table = {rule.megatron: rule for rule in rules(hf)}
    check_names(reader, hf)
    with torch.no_grad():
        for name, tensor in named_tensors(chunks, hf):
            assert name in table, f"the model has a tensor without a rule: {name=}"
            tensor.copy_(_read_part(table[name], tensor, reader))


def _read_part(rule: Rule, tensor: torch.Tensor, reader: Reader) -> torch.Tensor:
    for source in rule.hf:
        shape, file = reader.shape(source.name), reader.files[source.name]
        if shape != source.shape:
            raise ValueError(f"{file}: {source.name} has shape {shape}, by config.json {source.shape}; use the model's own config.json")
    parts = rule.numel // tensor.numel()
    if rule.expert is None:
        part = parallel_state.get_tensor_model_parallel_rank()
    else:
        part = parallel_state.get_expert_tensor_parallel_rank()
    slices = rule.slices(part, parts)
    pieces = [reader.read(source.name, index) for source, index in zip(rule.hf, slices, strict=True)]
    for name in rule.aliases:
        if name in reader.files and not torch.equal(reader.read(name, slices[0]), pieces[0]):
            raise ValueError(f"{reader.files[name]}: {name} is not {rule.hf[0].name}; set tie_word_embeddings = false in config.json")
    value = rule.to_megatron(pieces)
    assert value.shape == tensor.shape, f"{rule.megatron=} {value.shape=} {tensor.shape=}"
    return value
