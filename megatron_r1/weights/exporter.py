"""Live Megatron parameters to whole Hugging Face tensors, under any TP, PP, VPP, EP and ETP layout; shard.py is the other way.

A collective stream, for checkpoints and for the weight sync of every step. Small tensors cost collectives, not bytes, so it moves
buckets: the bytes of many parameters in one buffer, one all-gather among the ranks that divide them a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

import megatron_r1.mcore  # noqa: F401  installs the CPU adaptations before the first import of Megatron

# isort: split
from megatron.core import parallel_state

from megatron_r1.weights.division import Division, TensorInfo
from megatron_r1.weights.hf import check_target, write
from megatron_r1.weights.rules import Rule, rules
from megatron_r1.weights.shard import named_tensors

ALIGNMENT = 16  # bytes: a parameter of any dtype may begin here
Scope = Literal["all", "stages", "experts"]


@dataclass(frozen=True)
class Slot:
    """One parameter as it lies on every rank of the group that divides it.

    A routed expert's slot stands for one expert an expert-parallel rank, those with the same index there, unless each sends its own.
    """

    rules: tuple[Rule, ...]  # one, or one an expert-parallel rank
    stage: int  # the pipeline stage it is sent from
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one rank's part

    @property
    def is_expert(self) -> bool:
        return self.rules[0].expert is not None

    @property
    def parts(self) -> int:
        """Ranks that tensor parallelism, or expert tensor parallelism, divides it among."""
        return self.rules[0].numel // math.prod(self.shape)

    @property
    def group(self) -> str:
        """Which group holds the parts: a key of `Exporter._groups`."""
        if self.is_expert:
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

    def describe(self) -> list[TensorInfo]:
        """The whole tensors that come of it."""
        parts = [torch.empty(self.shape, device="meta")] * self.parts
        return [TensorInfo(name, self.dtype, tuple(t.shape)) for rule in self.rules for name, t in rule.to_hf(parts)]


class Exporter:
    """All weights as (Hugging Face name, whole tensor); iterate as often as you like.

    Making one and iterating it are collective: every rank must do both, and go through to the end. The tensors are snapshots in
    memory of their own. `scope` says which ranks get them. "all": every rank gets every tensor. "stages": the first rank of each
    pipeline stage gets the stage's. "experts": besides, of each stage the first rank of every expert-parallel rank gets its own
    experts, which nobody gathers then; the other tensors go to the stage's first. The order on a rank is that of the checkpoint,
    except that expert parallelism interleaves a layer's experts; it never changes for a layout. At most `bucket_bytes` of weights, or
    one tensor where that is larger, are gathered at a time.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], hf: dict[str, Any], *, scope: Scope = "all", bucket_bytes: int = 2**29) -> None:
        self._chunks, self._hf, self._scope = chunks, hf, scope
        gathered = parallel_state.get_expert_tensor_and_model_parallel_group
        self._groups = {
            "none": None,
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "expert": parallel_state.get_expert_tensor_parallel_group() if scope == "experts" else gathered(),
        }
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._stage = parallel_state.get_pipeline_model_parallel_rank()
        self._expert_rank = parallel_state.get_expert_model_parallel_rank()
        self._expert_parts = parallel_state.get_expert_tensor_parallel_world_size()
        self._slots = self._plan()
        self._buckets = _buckets(self._taken_part_in(), bucket_bytes)

    @cached_property
    def division(self) -> Division:
        """Who gets what; with scope "all" rank 0 alone is a sender."""
        parts = [[info for slot in self._sent_by(*sender) for info in slot.describe()] for sender in self._senders]
        mine = (self._stage, self._expert_rank)
        leads = parallel_state.get_expert_data_parallel_rank() == parallel_state.get_expert_tensor_parallel_rank() == 0
        return Division(parts, self._senders.index(mine) if leads and mine in self._senders else None)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        local = dict(named_tensors(self._chunks, self._hf))
        gets = self._scope == "all" or self.division.mine is not None
        for bucket in self._buckets:
            regions = self._gather(bucket, local)
            if gets:
                yield from self._tensors(bucket, regions)

    @property
    def _senders(self) -> list[tuple[int, int]]:
        """(pipeline stage, expert-parallel rank) of each."""
        stages = 1 if self._scope == "all" else self._pipeline.size()
        experts = parallel_state.get_expert_model_parallel_world_size() if self._scope == "experts" else 1
        return [(stage, expert) for stage in range(stages) for expert in range(experts)]

    def _sent_by(self, stage: int, expert_rank: int) -> Iterator[Slot]:
        for slot in self._slots:
            if self._scope == "all":
                yield slot
            elif slot.stage == stage and self._scope == "experts" and slot.is_expert:
                yield replace(slot, rules=(slot.rules[expert_rank % len(slot.rules)],))
            elif slot.stage == stage and expert_rank == 0:
                yield slot

    def _taken_part_in(self) -> list[Slot]:
        """The slots that this rank helps to gather, in its order; those of a group have the same ones but for their experts' numbers."""
        if self._scope == "experts":
            own = [replace(slot, rules=(self._mine(slot.rules),)) for slot in self._slots]
            return [slot for slot in own if slot.stage == self._stage]
        return [slot for slot in self._slots if self._scope == "all" or slot.stage == self._stage]

    def _mine(self, group: Sequence[Rule]) -> Rule:
        """This rank's among the rules of a slot."""
        return group[self._expert_rank if len(group) > 1 else 0]

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
            name = self._mine(group).megatron
            stage = next((s for s, names in enumerate(stages) if name in names), None)
            assert stage is not None, f"no pipeline stage has {name=}"
            plan.append(Slot(tuple(group), stage, *stages[stage][name]))
        return plan

    def _gather(self, bucket: list[Slot], local: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The bytes of one bucket, for each group [rank of the group, that rank's parts]."""
        members = {key: [slot for slot in bucket if slot.group == key] for key in self._groups}
        ranks = {key: group.size() if group is not None else 1 for key, group in self._groups.items()}
        row = {key: sum(slot.stride for slot in slots) for key, slots in members.items()}
        device = next(iter(local.values())).device
        buffer = torch.empty(sum(ranks[key] * row[key] for key in ranks), dtype=torch.uint8, device=device)
        regions = dict(zip(ranks, buffer.split([ranks[key] * row[key] for key in ranks]), strict=True))
        if bucket[0].stage == self._stage:
            for key, slots in members.items():
                _all_gather(regions[key], [(slot, local[self._mine(slot.rules).megatron]) for slot in slots], self._groups[key])
        if self._scope == "all" and self._pipeline.size() > 1:
            dist.broadcast(buffer, group=self._pipeline, group_src=bucket[0].stage)
        return {key: region.view(ranks[key], -1) for key, region in regions.items()}

    def _tensors(self, bucket: list[Slot], regions: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole tensors of one bucket that are this rank's to have."""
        offsets = dict.fromkeys(regions, 0)
        for slot in bucket:
            start = offsets[slot.group]
            offsets[slot.group] += slot.stride
            if self._scope == "experts" and self._expert_rank > 0 and not slot.is_expert:
                continue
            parts = [one[start : start + slot.nbytes].view(slot.dtype).view(slot.shape) for one in regions[slot.group]]
            for i, rule in enumerate(slot.rules):
                first = i * self._expert_parts  # expert tensor parallel ranks are neighbours in the expert group
                yield from rule.to_hf(parts[first : first + slot.parts])


def _all_gather(region: torch.Tensor, pieces: list[tuple[Slot, torch.Tensor]], group: dist.ProcessGroup | None) -> None:
    """Fill a region with the pieces of all ranks of the group that divides them."""
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
    tensors = iter(Exporter(chunks, hf))
    if dist.get_rank() == 0:
        write(folder, tensors, source_folder=source_folder, config=hf, dtype=dtype, overwrite=overwrite)
    for _ in tensors:  # the other ranks only take part
        pass
    dist.barrier()
