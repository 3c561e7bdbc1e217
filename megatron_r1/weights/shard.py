"""Live Megatron parameters <-> whole Hugging Face tensors, under any TP, PP, VPP, EP and ETP layout.

`load` gives every rank its part of the files. `Exporter` is the way back: a collective stream of whole tensors, for
checkpoints and for the weight sync of every step. Small tensors cost collectives, not bytes, so it moves buckets: the
bytes of many parameters in one buffer, one all-gather among the ranks that divide them and one broadcast to the other
pipeline stages a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import megatron_r1.mcore  # noqa: F401  installs the CPU adaptations before the first import of Megatron

# isort: split
from megatron.core import parallel_state

from megatron_r1.weights.hf import Reader, check_target, write
from megatron_r1.weights.names import Place, canonical
from megatron_r1.weights.rules import Rule, check_names, rules

ALIGNMENT = 16  # bytes: a parameter of any dtype may begin here


class TensorInfo(NamedTuple):
    """What a receiver must know of a tensor before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


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


@dataclass(frozen=True)
class Slot:
    """One parameter as it lies on every rank of the group that divides it.

    A routed expert's slot stands for one expert an expert-parallel rank: those with the same index there.
    """

    rules: tuple[Rule, ...]  # one, or one an expert-parallel rank
    stage: int  # the pipeline stage it is sent from
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one rank's part

    @property
    def parts(self) -> int:
        """Ranks that tensor parallelism, or expert tensor parallelism, divides it among."""
        return self.rules[0].numel // math.prod(self.shape)

    @property
    def group(self) -> str:
        """Which group holds the parts: a key of `Exporter._groups`."""
        if self.rules[0].expert is not None:
            return "expert"
        return "tensor" if self.parts > 1 else "none"

    @property
    def nbytes(self) -> int:
        """Bytes of one rank's part."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes of one rank's part in a bucket."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


class Exporter:
    """All weights as (Hugging Face name, whole tensor), on every rank; iterate as often as you like.

    Making one and iterating it are collective: every rank must do both, and go through to the end. The tensors are
    snapshots in memory of their own. The order is that of the checkpoint, except that expert parallelism interleaves
    a layer's experts; it never changes for a layout. At most `bucket_bytes` of weights, or one tensor where that is
    larger, are gathered at a time.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], hf: dict[str, Any], *, bucket_bytes: int = 2**29) -> None:
        self._chunks, self._hf = chunks, hf
        self._groups = {
            "none": None,
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "expert": parallel_state.get_expert_tensor_and_model_parallel_group(),
        }
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._stage = parallel_state.get_pipeline_model_parallel_rank()
        self._expert_parts = parallel_state.get_expert_tensor_parallel_world_size()
        self._slots = self._plan()
        self._buckets = _buckets(self._slots, bucket_bytes)

    def metadata(self) -> list[TensorInfo]:
        """Name, dtype and shape of what iteration yields, in its order."""
        found = []
        for slot in self._slots:
            part = torch.empty(slot.shape, device="meta")
            for rule in slot.rules:
                found += [TensorInfo(name, slot.dtype, tuple(tensor.shape)) for name, tensor in rule.to_hf([part] * slot.parts)]
        return found

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        local = dict(named_tensors(self._chunks, self._hf))
        for bucket in self._buckets:
            yield from self._export(bucket, local)

    @staticmethod
    def _mine(group: Sequence[Rule]) -> str:
        """The canonical name of this rank's parameter among the rules of a slot."""
        return group[parallel_state.get_expert_model_parallel_rank() if len(group) > 1 else 0].megatron

    def _plan(self) -> list[Slot]:
        """Every slot in order; where each is, its dtype and how it is divided is what the stages tell each other."""
        table = rules(self._hf)
        mine = {name: (t.dtype, tuple(t.shape)) for name, t in named_tensors(self._chunks, self._hf)}
        stages: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}] * self._pipeline.size()
        dist.all_gather_object(stages, mine, group=self._pipeline)

        experts = 1 + max((rule.expert for rule in table if rule.expert is not None), default=0)
        experts_a_rank = experts // parallel_state.get_expert_model_parallel_world_size()
        slots: dict[str, list[Rule]] = {}
        for rule in table:
            key = rule.megatron
            if rule.expert is not None:
                key = key.replace(f".experts.{rule.expert}.", f".experts.{rule.expert % experts_a_rank}.")
            slots.setdefault(key, []).append(rule)
        plan = []
        for group in slots.values():
            name = self._mine(group)
            stage = next((s for s, names in enumerate(stages) if name in names), None)
            assert stage is not None, f"no pipeline stage has {name=}"
            plan.append(Slot(tuple(group), stage, *stages[stage][name]))
        return plan

    def _export(self, bucket: list[Slot], local: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather one bucket. Its buffer is, for each group, [rank of the group, bytes of that rank's parts]."""
        members = {key: [slot for slot in bucket if slot.group == key] for key in self._groups}
        ranks = {key: group.size() if group is not None else 1 for key, group in self._groups.items()}
        row = {key: sum(slot.stride for slot in slots) for key, slots in members.items()}
        device = next(iter(local.values())).device
        buffer = torch.empty(sum(ranks[key] * row[key] for key in ranks), dtype=torch.uint8, device=device)
        regions = dict(zip(ranks, buffer.split([ranks[key] * row[key] for key in ranks]), strict=True))

        if bucket[0].stage == self._stage:
            for key, slots in members.items():
                self._gather(regions[key], [(slot, local[self._mine(slot.rules)]) for slot in slots], self._groups[key])
        if self._pipeline.size() > 1:
            dist.broadcast(buffer, group=self._pipeline, group_src=bucket[0].stage)

        offsets = dict.fromkeys(ranks, 0)
        for slot in bucket:
            rows = regions[slot.group].view(ranks[slot.group], -1)
            start = offsets[slot.group]
            offsets[slot.group] += slot.stride
            parts = [one[start : start + slot.nbytes].view(slot.dtype).view(slot.shape) for one in rows]
            for i, rule in enumerate(slot.rules):
                first = i * self._expert_parts  # expert tensor parallel ranks are neighbours in the expert group
                yield from rule.to_hf(parts[first : first + slot.parts])

    @staticmethod
    def _gather(region: torch.Tensor, pieces: list[tuple[Slot, torch.Tensor]], group: dist.ProcessGroup | None) -> None:
        if not pieces:
            return
        gathers = group is not None and group.size() > 1
        row = torch.empty(sum(slot.stride for slot, _ in pieces), dtype=torch.uint8, device=region.device) if gathers else region
        start = 0
        for slot, tensor in pieces:
            row[start : start + slot.nbytes].view(slot.dtype).view(tensor.shape).copy_(tensor.detach())
            start += slot.stride
        if gathers:
            dist.all_gather_into_tensor(region, row, group=group)


def _buckets(slots: list[Slot], limit: int) -> list[list[Slot]]:
    """Runs of slots of one pipeline stage, of at most `limit` bytes of weights or one slot."""
    buckets: list[list[Slot]] = []
    size = 0
    for slot in slots:
        whole = len(slot.rules) * slot.parts * slot.nbytes
        if buckets and buckets[-1][0].stage == slot.stage and size + whole <= limit:
            buckets[-1].append(slot)
            size += whole
        else:
            buckets.append([slot])
            size = whole
    return buckets


def export(chunks: Sequence[torch.nn.Module], hf: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """One pass over `Exporter(chunks, hf)`; keep an Exporter where weights are exported again and again."""
    return iter(Exporter(chunks, hf))


def save(
    chunks: Sequence[torch.nn.Module],
    hf: dict[str, Any],
    *,
    folder: str | Path,
    source_folder: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model as a Hugging Face folder: collective, rank 0 writes. Raises ValueError as `hf.write` does."""
    check_target(folder, overwrite=overwrite)  # on every rank: one that raised alone would leave the others waiting
    tensors = export(chunks, hf)
    if dist.get_rank() == 0:
        write(folder, tensors, source_folder=source_folder, config=hf, dtype=dtype, overwrite=overwrite)
    for _ in tensors:  # the other ranks only take part
        pass
    dist.barrier()
