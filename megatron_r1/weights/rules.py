"""What a model family's table is made of: which Hugging Face tensors make which Megatron tensor, and how Megatron divides it.

The table is `rules(hf)` of the family's file in models/, and the only knowledge of names and layouts: Hugging Face ->
Megatron, Megatron -> Hugging Face and the live weight sync all read it. Tensor parallelism divides the Hugging Face
tensors, before they are joined: rank r of n holds `rule.to_megatron([slice r of n of every Hugging Face tensor])`. So a
joined tensor such as linear_fc1 is [gate_r; up_r] on each rank, and no operation needs to know about tensor parallelism.

Megatron names are the global ones of `names.canonical`: global layer and expert indices, unfused layer norms. Nothing
here imports torch before tensors are at hand, for the families' files are read before a process starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_r1.models import family, is_reward_model

if TYPE_CHECKING:
    import torch

    from megatron_r1.weights.hf import Reader

IGNORED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints hold and transformers passes over, too


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    import torch

    return torch.cat(list(tensors), dim=dim)


class Operation(Protocol):
    """How the tensors of a rule become one, and its inverse: `split(join(tensors), len(tensors)) == tensors`."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def split(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]: ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        assert len(tensors) == 1, f"{len(tensors)=}"
        return tensors[0]

    def split(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        assert count == 1, f"{count=}"
        return (tensor,)


@dataclass(frozen=True)
class ConcatRows:
    """Tensors of equal height, one below the other: gate_proj over up_proj is linear_fc1."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return _cat(tensors)

    def split(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        assert tensor.shape[0] % count == 0, f"{tensor.shape=} {count=}"
        return tensor.chunk(count)


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value of grouped-query attention, or their biases, as linear_qkv.

    Its rows are, for one key head after another: its query heads, the key head, the value head. A rank of tensor
    parallelism holds whole groups.
    """

    head_dim: int
    queries: int  # query heads a key head

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        assert len(tensors) == 3, f"{len(tensors)=}"
        groups = tensors[1].shape[0] // self.head_dim
        return _cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def split(self, tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        assert count == 3, f"{count=}"
        grouped = tensor.unflatten(0, (-1, (self.queries + 2) * self.head_dim))
        return [part.flatten(0, 1) for part in grouped.split([self.queries * self.head_dim, self.head_dim, self.head_dim], dim=1)]


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str  # canonical global name
    hf: tuple[HFTensor, ...]
    divide: int | None = None  # dimension of every HF tensor that (expert) tensor parallelism divides; None: replicated
    operation: Operation = Rename()
    expert: int | None = None  # routed expert: on one expert-parallel rank only, divided by expert tensor parallelism
    copies: tuple[str, ...] = ()  # further HF names of the same tensor, written but not read
    aliases: tuple[str, ...] = ()  # names that some checkpoints have for it as well, neither written nor read

    @property
    def numel(self) -> int:
        """Elements of the whole Megatron tensor."""
        return sum(math.prod(t.shape) for t in self.hf)

    def slices(self, part: int, parts: int) -> list[tuple[slice, ...]]:
        """What part `part` of `parts` holds of each HF tensor, as an index into it."""
        index = []
        for tensor in self.hf:
            where = [slice(0, size) for size in tensor.shape]
            if parts > 1:
                assert self.divide is not None, f"{self=} {parts=}"
                size, rest = divmod(tensor.shape[self.divide], parts)
                assert rest == 0, f"{self=} {parts=}"
                where[self.divide] = slice(part * size, (part + 1) * size)
            index.append(tuple(where))
        return index

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """HF tensors, whole or the same part of each, in the order of `hf` -> the Megatron tensor or its part."""
        return self.operation.join(tensors)

    def to_hf(self, parts: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """All parts of the Megatron tensor in rank order -> (name, whole HF tensor) in the order of `hf`, then copies."""
        split = [self.operation.split(part, len(self.hf)) for part in parts]
        whole = [pieces[0] if len(parts) == 1 else _cat(pieces, self.divide) for pieces in zip(*split, strict=True)]
        named = [(t.name, tensor) for t, tensor in zip(self.hf, whole, strict=True)]
        return named + [(copy, whole[0]) for copy in self.copies]


def rules(hf: dict[str, Any]) -> tuple[Rule, ...]:
    """The table of the family that `hf` (a config.json) names, in the order of the Hugging Face checkpoint.

    A reward model has its scalar head in the place of the output layer. Raises ValueError for a family that is not built.
    """
    table = family(hf).rules(hf)
    if not is_reward_model(hf):
        return table
    return (*(entry for entry in table if entry.megatron != "output_layer.weight"), rule("output_layer", "score", (1, hf["hidden_size"])))


def rule(target: str, source: str, shape: tuple[int, ...], **fields: Any) -> Rule:
    """The weight of one module, under another name: `target` and `source` are the module's names on the two sides."""
    return Rule(f"{target}.weight", (HFTensor(f"{source}.weight", shape),), **fields)


def swiglu(source: str, target: str, shape: tuple[int, int], *, expert: int | None = None) -> list[Rule]:
    """Gated MLP; `shape` is that of gate_proj: (intermediate, hidden)."""
    gate, up = (HFTensor(f"{source}{name}.weight", shape) for name in ("gate_proj", "up_proj"))
    return [
        Rule(f"{target}linear_fc1.weight", (gate, up), divide=0, operation=ConcatRows(), expert=expert),
        rule(f"{target}linear_fc2", f"{source}down_proj", shape[::-1], divide=1, expert=expert),
    ]


def check_names(reader: Reader, hf: dict[str, Any]) -> None:
    """Raise ValueError for the first tensor of the table of `hf` that the checkpoint lacks, or of the checkpoint that the table lacks."""
    table, file = rules(hf), f"megatron_r1/models/{hf['model_type']}.py"
    wanted = {source.name: source.shape for entry in table for source in entry.hf}
    known = wanted.keys() | {name for entry in table for name in (*entry.copies, *entry.aliases)}
    for name, shape in wanted.items():
        if name not in reader.files:
            fix = "set num_nextn_predict_layers = 0 in config.json" if _is_mtp(name, hf) else "download or convert the model again"
            raise ValueError(f"{reader.folder}: tensor {name} of shape {shape}, which {file} asks for, is missing; {fix}")
    drops_mtp = hf.get("num_nextn_predict_layers", 1) in (0, None)  # transformers passes over these layers, too
    for name in reader.files:
        if name not in known and not name.endswith(IGNORED) and not (drops_mtp and _is_mtp(name, hf)):
            fix = "convert FP8 weights to bf16 first" if name.endswith("_scale_inv") else "config.json describes another model"
            raise ValueError(f"{reader.files[name]}: no place for tensor {name} of shape {reader.shape(name)} in {file}; {fix}")


def _is_mtp(name: str, hf: dict[str, Any]) -> bool:
    """Whether a tensor is of a multi-token prediction layer: these come after the decoder's."""
    layer = name.removeprefix("model.layers.").split(".")[0]
    return layer.isdigit() and int(layer) >= hf["num_hidden_layers"]
