"""Every family with grouped-query attention is the model that transformers runs, and its weights return unchanged from every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, KIMI_K2, LLAMA3, MOONLIGHT, config, random_config, weights, write_model
from mcore_runs import Run
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_checkpoint import resumed, unbroken
from test_parity import packed_logits
from test_parity import write_model as write_v3
from test_policy import Result, assert_same
from test_weights import loaded_model, loaded_without_result, there_and_back

from megatron_r1.models import family
from megatron_r1.parallel import Parallel
from megatron_r1.weights.rules import GroupedQKV, rules

LENGTHS = (37, 1, 64, 12)


@pytest.mark.parametrize("seed", range(6))
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
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context_parallel_size": 2}),
}
MOVED = [(family, layout) for family in FAMILIES for layout in ("TP2", "PP2", "TP2 x PP2")] + [("qwen3_moe", "EP2")]
TRAINED = [(family, layout) for family in FAMILIES for layout in ("TP2", "PP2", "DP2")] + [
    ("llama", "CP2"),
    ("qwen3_moe", "EP2"),
]
VARIANTS = {  # what the plain config of each leaves out
    "llama": {"attention_bias": True, "rope_scaling": LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 16}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "attention_bias": True},
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": False},
}


@pytest.mark.parametrize(("family", "layout"), MOVED)
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


@pytest.mark.parametrize(("family", "layout"), TRAINED)
def test_three_steps_of_grpo_are_those_of_one_rank(family, layout, alone):
    ranks, sizes = LAYOUTS[layout]
    results = run_ranks(ranks, grpo_steps, config(family, vocab_size=320, **VARIANTS[family]), sizes, 128)
    assert_same(results[0], alone(family), padding=0.2 if layout == "CP2" else 0.05)


@pytest.mark.parametrize(("family", "recompute"), [("llama", "selective"), ("qwen3_moe", "full")])
def test_recomputed_activations_change_nothing(family, recompute, alone):
    [result] = run_ranks(1, grpo_steps, config(family, vocab_size=320, **VARIANTS[family]), {}, 128, recompute)
    assert_same(result, alone(family))


BAD_CONFIGS = [
    ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("qwen3", {"head_dim": None}, "head_dim is missing"),
    ("qwen3_moe", {"num_experts": None}, "num_experts is missing"),
    ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob is missing"),
    ("llama", {"vocab_size": None}, "vocab_size is missing"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
    ("llama", {"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads = 7"),
    ("llama", {"head_dim": 15}, "head_dim = 15"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_parameters.low_freq_factor is missing"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "norm_topk_prob = True"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers"),
]


@pytest.mark.parametrize(("family_name", "changes", "message"), BAD_CONFIGS)
def test_configs_that_are_not_built_say_so_in_one_line(family_name, changes, message):
    hf = {name: value for name, value in config(family_name, **changes).items() if value is not None}
    with pytest.raises(ValueError) as error:
        family(hf).check(hf)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def load_error(hf: dict[str, Any], folder: str) -> str:
    """On a rank: the ValueError of a load."""
    with pytest.raises(ValueError) as error, loaded_model(hf, {}, folder):
        pass
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.1.self_attn.k_proj.bias": None},
            "k_proj.bias of shape (32,), which megatron_r1/models/qwen2.py asks for, is missing",
        ),
        (
            {"model.layers.4.mlp.up_proj.weight": torch.ones(2)},
            "no place for tensor model.layers.4.mlp.up_proj.weight of shape (2,) in megatron",
        ),
        ({"lm_head.weight": torch.ones(128, 64)}, "lm_head.weight is not model.embed_tokens.weight; set tie_word_embeddings = false"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_tensor_and_the_familys_file(changes, message, tmp_path):
    hf = config("qwen2", tie_word_embeddings=True)
    tensors = {name: tensor for name, tensor in (weights(hf) | changes).items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    [error] = run_ranks(1, load_error, hf, str(tmp_path))
    assert message in error


def test_names_that_change_nothing_are_passed_over(tmp_path):
    hf = config("qwen2", tie_word_embeddings=True)
    tensors = weights(hf)
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    run_ranks(1, loaded_without_result, hf, {}, str(tmp_path))


@pytest.mark.parametrize("hf", [KIMI_K2, MOONLIGHT], ids=["Kimi-K2", "Moonlight"])
def test_models_of_v3s_shape_under_other_names_are_v3(hf, tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    write_v3(hf, tmp_path)
    ids = [torch.randint(hf["vocab_size"], (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    [found] = run_ranks(1, packed_logits, str(tmp_path), ids)
    settings = {name: value for name, value in hf.items() if name not in ("model_type", "auto_map")}
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path, config=DeepseekV3Config(**settings), dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([reference(i[None]).logits[0] for i in ids])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("family", "layout"), [("qwen2", "PP2"), ("qwen3_moe", "EP2")])
def test_a_run_goes_on_from_a_checkpoint_of_another_layout(family, layout, tmp_path):
    hf = config(family, vocab_size=320, **VARIANTS[family])
    expected = run_ranks(2, unbroken, Parallel(**LAYOUTS["TP2"][1]), str(tmp_path), hf)[0]
    found = run_ranks(2, resumed, Parallel(**LAYOUTS[layout][1]), str(tmp_path), hf)[0]
    assert_same((found["metrics"], found["weights"]), (expected["metrics"], expected["weights"]))
