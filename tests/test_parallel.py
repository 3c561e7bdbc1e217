"""Layouts that cannot work are refused in one line that names the setting, its value and a way out."""

from __future__ import annotations

import pytest
from families import FAMILIES, config
from mcore_runs import model

from megatron_r1.parallel import Parallel, check

GOOD = [
    (1, {}),
    (2, {"tensor_model_parallel_size": 2}),
    (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    (8, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}),
    (3, {"pipeline_model_parallel_size": 3, "num_hidden_layers": 7}),
    (6, {"context_parallel_size": 3, "pipeline_model_parallel_size": 2}),
    (8, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}),
]
BAD = [
    (3, {"tensor_model_parallel_size": 2}, "parallel.world_size = 3"),
    (6, {"tensor_model_parallel_size": 2, "context_parallel_size": 2}, "= 2 x 2 x 1; use a multiple of 4"),
    (2, {"expert_model_parallel_size": 4}, "parallel.expert_model_parallel_size = 4"),
    (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}, "parallel.expert_model_parallel_size = 4"),
    (2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, "parallel.expert_tensor_parallel_size = 1"),
    (2, {"expert_model_parallel_size": 0}, "parallel.expert_model_parallel_size = 0"),
    (8, {"tensor_model_parallel_size": 8}, "num_attention_heads = 4"),
    (16, {"expert_model_parallel_size": 16}, "n_routed_experts = 8"),
    (3, {"expert_model_parallel_size": 3}, "n_routed_experts = 8"),
    (2, {"tensor_model_parallel_size": 2, "vocab_size": 321}, "vocab_size = 321"),
    (2, {"tensor_model_parallel_size": 2, "q_lora_rank": 63}, "q_lora_rank = 63"),
    (2, {"virtual_pipeline_model_parallel_size": 2}, "parallel.virtual_pipeline_model_parallel_size = 2"),
    (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}, "virtual_pipeline_model_parallel_size = 3"),
    (8, {"pipeline_model_parallel_size": 8}, "pipeline_model_parallel_size = 8"),
    (2, {"expert_model_parallel_size": 2, "n_routed_experts": None}, "no routed experts"),
]
BAD_STUDENTS = [
    ("qwen2", 4, {"tensor_model_parallel_size": 4}, "tensor_model_parallel_size = 4: does not divide num_key_value_heads = 2"),
    ("llama", 3, {"tensor_model_parallel_size": 3}, "tensor_model_parallel_size = 3: does not divide num_attention_heads = 4"),
    ("qwen3", 2, {"expert_model_parallel_size": 2}, "expert_model_parallel_size = 2: this model has no routed experts"),
    ("qwen3_moe", 3, {"expert_model_parallel_size": 3}, "expert_model_parallel_size = 3: does not divide num_experts = 8"),
    ("qwen3_moe", 2, {"tensor_model_parallel_size": 2, "moe_intermediate_size": 31}, "does not divide moe_intermediate_size = 31"),
]


def split(changes: dict[str, int]) -> tuple[Parallel, dict[str, int]]:
    """The sizes of a layout, and a config.json with the other changes."""
    sizes = {name: value for name, value in changes.items() if name.endswith("parallel_size")}
    return Parallel(**sizes), model(**{name: value for name, value in changes.items() if name not in sizes})


@pytest.mark.parametrize(("world_size", "changes"), GOOD)
def test_layouts_that_work_pass(world_size, changes):
    parallel, hf = split(changes)
    check(parallel, world_size, hf)


@pytest.mark.parametrize(("world_size", "changes", "message"), BAD)
def test_layouts_that_cannot_work_say_why_in_one_line(world_size, changes, message):
    parallel, hf = split(changes)
    with pytest.raises(ValueError) as error:
        check(parallel, world_size, hf)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "world_size", "changes", "message"), BAD_STUDENTS)
def test_layouts_that_divide_no_group_or_expert_say_so(family, world_size, changes, message):
    sizes = {name: value for name, value in changes.items() if name.endswith("parallel_size")}
    with pytest.raises(ValueError, match=message):
        check(Parallel(**sizes), world_size, config(family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_of_students_that_work_pass(family):
    check(Parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 8, config(family))


@pytest.mark.parametrize(("layers", "stages", "last"), [(61, 4, 13), (61, 16, 1), (4, 2, 2), (3, 2, 1), (5, 1, 5)])
def test_the_last_stage_gets_the_layers_that_are_left(layers, stages, last):
    parallel = Parallel(pipeline_model_parallel_size=stages)
    assert parallel.layers_on_last_stage(layers) == last
