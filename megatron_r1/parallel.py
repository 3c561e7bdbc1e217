"""Parallel sizes and their check against a model and a number of ranks; imports neither torch nor Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parallel:
    """Parallel sizes as Megatron spells them; data parallel is what is left of the world size."""

    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1  # ranks that share the tokens of each sequence
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None  # model chunks a pipeline rank; None: one
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # None: as tensor_model_parallel_size

    @property
    def sequence_parallel(self) -> bool:
        """Megatron's mixture of experts trains with tensor parallelism only when sequence parallelism is on."""
        return self.tensor_model_parallel_size > 1

    @property
    def expert_tensor_size(self) -> int:
        """`expert_tensor_parallel_size` with its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that train on different data."""
        return world_size // (self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size)

    def layers_on_last_stage(self, num_layers: int) -> int:
        """Decoder layers of the last pipeline stage; the other stages share the rest equally.

        The last stage, which has the output layer and MTP as well, gets the smaller part: 61 layers on 4 stages are
        16, 16, 16 and 13.
        """
        stages = self.pipeline_model_parallel_size
        return num_layers - -(-num_layers // stages) * (stages - 1)


def check(parallel: Parallel, world_size: int, hf: dict[str, Any]) -> None:
    """Raise ValueError with one line for the first size that cannot work with `hf` (a config.json) or `world_size`."""
    for name, value in vars(parallel).items():
        if value is not None and value < 1:
            raise ValueError(f"parallel.{name} = {value}: must be at least 1")
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"):
        if not isinstance(hf.get(name), int):
            raise ValueError(f"config.json: {name} = {hf.get(name)!r}: must be an integer; take it from the model's own config.json")
    _check_world(parallel, world_size)
    _check_stages(parallel, hf)
    _check_shapes(parallel, hf)


def _check_world(parallel: Parallel, world_size: int) -> None:
    tensor, context, stages = parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.pipeline_model_parallel_size
    expert, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    if world_size % (tensor * context * stages):
        raise ValueError(
            f"parallel.world_size = {world_size}: not a multiple of tensor_model_parallel_size x context_parallel_size x"
            f" pipeline_model_parallel_size = {tensor} x {context} x {stages}; use a multiple of {tensor * context * stages}"
        )
    if world_size % (expert * expert_tensor * stages):
        raise ValueError(
            f"parallel.expert_model_parallel_size = {expert}: with expert_tensor_parallel_size = {expert_tensor} and"
            f" pipeline_model_parallel_size = {stages} it needs parallel.world_size to be a multiple of"
            f" {expert * expert_tensor * stages}, not {world_size}; lower one of them"
        )
    if expert == 1 and expert_tensor != tensor:
        raise ValueError(
            f"parallel.expert_tensor_parallel_size = {expert_tensor}: without expert parallelism Megatron reduces the gradients of"
            f" experts like those of other layers; use tensor_model_parallel_size = {tensor} or raise expert_model_parallel_size"
        )


def _check_stages(parallel: Parallel, hf: dict[str, Any]) -> None:
    layers, stages = hf["num_hidden_layers"], parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and stages == 1:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size = {chunks}: needs pipeline_model_parallel_size above 1;"
            " leave it out or raise that"
        )
    if chunks is not None and layers % (stages * chunks):
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size = {chunks}: num_hidden_layers = {layers} is not a multiple of"
            f" {stages} x {chunks}; leave it out or choose sizes that divide"
        )
    if parallel.layers_on_last_stage(layers) < 1:
        raise ValueError(
            f"parallel.pipeline_model_parallel_size = {stages}: leaves no layer of num_hidden_layers = {layers} for the last"
            " stage; lower it"
        )


def _check_shapes(parallel: Parallel, hf: dict[str, Any]) -> None:
    # families call it differently
    experts_field = next((name for name in ("n_routed_experts", "num_experts", "num_local_experts") if hf.get(name)), None)
    experts = hf[experts_field] if experts_field else None
    if experts is None and parallel.expert_model_parallel_size > 1:
        raise ValueError(
            f"parallel.expert_model_parallel_size = {parallel.expert_model_parallel_size}: this model has no routed experts; set it to 1"
        )
    shared = (hf.get("n_shared_experts") or 0) * hf.get("moe_intermediate_size", 0)
    compressed = hf["kv_lora_rank"] + hf["qk_rope_head_dim"] if "kv_lora_rank" in hf else None
    divided = [
        ("tensor_model_parallel_size", parallel.tensor_model_parallel_size, shape, size)
        for shape, size in (
            ("num_attention_heads", hf["num_attention_heads"]),
            ("num_key_value_heads", hf.get("num_key_value_heads")),
            ("hidden_size", hf["hidden_size"]),
            ("intermediate_size", hf["intermediate_size"]),
            ("vocab_size", hf["vocab_size"]),
            ("n_shared_experts x moe_intermediate_size", shared),
            ("q_lora_rank", hf.get("q_lora_rank")),
            ("kv_lora_rank + qk_rope_head_dim", compressed),
        )
    ]
    if experts is not None:
        divided.append(("expert_model_parallel_size", parallel.expert_model_parallel_size, experts_field, experts))
        divided.append(("expert_tensor_parallel_size", parallel.expert_tensor_size, "moe_intermediate_size", hf["moe_intermediate_size"]))
    for setting, parts, shape, size in divided:
        if size is not None and size % parts:
            raise ValueError(f"parallel.{setting} = {parts}: does not divide {shape} = {size} of config.json; choose one that does")
