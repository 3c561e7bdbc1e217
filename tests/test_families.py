"""Every family with grouped-query attention is the model that transformers runs, and its weights return unchanged from every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, LLAMA3, config, random_config, write_model
from mcore_runs import Run
from ranks import run_ranks
from safetensors.torch import load_file
from test_parity import packed_logits
from test_policy import Result, assert_same
from test_weights import there_and_back

from megatron_r1.parallel import Parallel
from megatron_r1.weights.rules import GroupedQKV, rules

LENGTHS = (37, 1, 64, 12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, seed, tmp_path):
    from transformers import AutoModelForCausalLM

    hf = random_config(family, seed)
    folder = write_model(hf, tmp_path)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(hf["vocab_size"], (n,), generator=generator) for n in LENGTHS]
    [found] = run_ranks(1, packed_logits, folder, ids)

    reference, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        expected = torch.cat([reference(i[None]).logits[0] for i in ids])
    scale = expected.abs().max()
    assert scale > 1
    difference = (found - expected).abs().max()
    assert difference <= 1e-5 * scale, f"{difference=} {scale=} {hf=}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_that_transformers_saves(family, seed, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(random_config(family, seed)))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path / "saved")
    saved = {name: tuple(t.shape) for name, t in load_file(tmp_path / "saved/model.safetensors").items()}
    for folder in (tmp_path, tmp_path / "saved"):  # transformers writes another config.json than it read
        hf = json.loads((folder / "config.json").read_text())
        assert {t.name: t.shape for rule in rules(hf) for t in rule.hf} == saved


def test_a_tensor_parallel_rank_holds_whole_groups_of_query_heads_each_with_its_key_and_value():
    rule = next(r for r in rules(config("qwen3")) if r.megatron == "decoder.layers.0.self_attention.linear_qkv.weight")
    assert rule.operation == GroupedQKV(head_dim=32, queries=2)
    query, key, value = (torch.arange(t.shape[0] // 32).repeat_interleave(32)[:, None] + start for t, start in zip(rule.hf, (0, 100, 200)))
    for rank, expected in ((0, [0, 1, 100, 200]), (1, [2, 3, 101, 201])):
        rows = rule.to_megatron([t[i[:1]] for t, i in zip((query, key, value), rule.slices(rank, 2), strict=True)])
        assert rows[::32, 0].tolist() == expected


LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2 x EP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}
CASES = [(family, layout) for family in FAMILIES for layout in LAYOUTS if "EP" not in layout or family == "qwen3_moe"]
VARIANTS = {  # what the plain config of each leaves out
    "llama": {"attention_bias": True, "rope_scaling": LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 16}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "attention_bias": True},
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": False},
}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_weights_return_bit_equal_from_every_layout(family, layout, tmp_path):
    ranks, sizes = LAYOUTS[layout]
    hf = config(family, **VARIANTS[family])
    orders = run_ranks(ranks, there_and_back, hf, sizes, write_model(hf, tmp_path))
    assert all(order == orders[0] for order in orders)


def grpo_steps(hf: dict[str, Any], sizes: dict[str, int], chunk_tokens: int, recompute: str = "none") -> Result:
    """On a rank: three optimizer steps; the metrics, and the weights afterwards."""
    with Run(Parallel(**sizes), hf=hf, recompute=recompute) as run:
        run.policy.refresh_reference()
        return [run.grpo_step(number, chunk_tokens=chunk_tokens) for number in range(3)], run.weights()


@pytest.fixture(scope="module")
def alone() -> Callable[[str], Result]:
    """What one rank makes of a family."""
    return cache(lambda family: run_ranks(1, grpo_steps, config(family, vocab_size=320, **VARIANTS[family]), {}, 128)[0])


@pytest.mark.parametrize(("family", "layout"), [*CASES, *((family, "DP2") for family in FAMILIES)])
def test_three_steps_of_grpo_are_those_of_one_rank(family, layout, alone):
    ranks, sizes = LAYOUTS.get(layout, (2, {}))
    results = run_ranks(ranks, grpo_steps, config(family, vocab_size=320, **VARIANTS[family]), sizes, 128)
    assert_same(results[0], alone(family))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_recomputed_activations_change_nothing(family, recompute, alone):
    [result] = run_ranks(1, grpo_steps, config(family, vocab_size=320, **VARIANTS[family]), {}, 128, recompute)
    assert_same(result, alone(family))
