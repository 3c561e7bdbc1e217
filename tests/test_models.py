"""The model of a config.json trains alike under every layout; a config.json that is not built says so in one line."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from mcore_runs import model
from ranks import run_ranks
from safetensors.torch import save_file

from megatron_r1.packing import TokenSequence, pack
from megatron_r1.types import Microbatch
from megatron_r1.weights.rules import rules

LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 x EP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "EP2 x ETP2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "PP2 x EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "PP2 x TP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
COUNT = 4  # microbatches in all


def write_weights(hf: dict[str, Any], folder: Path) -> str:
    """Weights that spread attention, gates and logits; the same in every layout."""
    torch.manual_seed(0)
    tensors = {}
    for rule in rules(hf):
        for source in rule.hf:
            vector = len(source.shape) == 1
            tensors[source.name] = torch.randn(source.shape) * (0.2 if vector else source.shape[-1] ** -0.5) + ("norm" in source.name)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def microbatches(vocab: int) -> list[Microbatch]:
    """Packs of three sequences, all of one length, so that pipeline stages need not exchange shapes."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(COUNT):
        ids = [torch.randint(vocab, (n,), generator=generator).tolist() for n in (5, 12, 7)]
        sequences = [TokenSequence(ids=i, learned=[0, 0] + [1] * (len(i) - 2)) for i in ids]
        made += pack(sequences, [[0, 1, 2]], multiple=4)
    return made


def step_gradients(hf: dict[str, Any], layout: dict[str, int], folder: str, options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """On a rank: the loss, and the gradient of every Hugging Face tensor, averaged over the tokens of all ranks.

    They come out by way of the weight export: each parameter is overwritten with its gradient.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_r1.mcore import distributed
    from megatron_r1.mcore.logprobs import token_logprobs
    from megatron_r1.models.build import build
    from megatron_r1.parallel import Parallel
    from megatron_r1.weights import shard
    from megatron_r1.weights.exporter import Exporter
    from megatron_r1.weights.hf import SafetensorsReader

    distributed.init(Parallel(**layout), seed=1)
    try:
        chunks = build(hf, Parallel(**layout), **options)
        shard.load(chunks, SafetensorsReader(folder), hf)
        config = chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk) for chunk in chunks]
        mine = microbatches(hf["vocab_size"])[distributed.dp_rank() :: distributed.dp_size()]
        losses = []

        def forward_step(batches: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            longest = int(batch.cu_seqlens.diff().max())
            packed = PackedSeqParams("thd", batch.cu_seqlens, batch.cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
            inputs = (batch.tokens_T[None], batch.positions_T[None], None)
            targets = {"labels": batch.labels_T[None], "loss_mask": batch.loss_mask_T[None]} if options.get("train_mtp", True) else {}
            logits = chunk(*inputs, packed_seq_params=packed, **targets)

            def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
                logprobs_T, _ = token_logprobs(logits, batch.labels_T, mask_T=batch.loss_mask_T, temperature=1.0)
                losses.append(float(logprobs_T.sum()))
                return -logprobs_T.sum(), batch.loss_mask_T.sum().int(), {}

            return logits, loss

        iterators = [iter(mine) for _ in chunks]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=wrapped,
            num_microbatches=len(mine),
            seq_length=mine[0].tokens_T.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
        with torch.no_grad():
            for parameter in (p for chunk in chunks for p in chunk.parameters()):
                parameter.copy_(parameter.main_grad if hasattr(parameter, "main_grad") else torch.zeros_like(parameter))
        gradients = {name: tensor.float() for name, tensor in Exporter(chunks, hf)}
        everywhere = sum(distributed.gather_over_dp(sum(losses)))
        return everywhere, gradients if distributed.rank() == 0 else {}
    finally:
        distributed.shutdown()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    worst = max((float((found[name] - g).abs().max()), name) for name, g in expected.items())
    assert worst[0] <= tolerance * scale, f"{worst=} {scale=}"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Any:
    """A model's folder, and what one rank makes of it; one folder a config."""
    made: dict[str, tuple[str, tuple[float, dict[str, torch.Tensor]]]] = {}

    def make(hf: dict[str, Any]) -> tuple[str, tuple[float, dict[str, torch.Tensor]]]:
        key = json.dumps(hf)
        if key not in made:
            folder = write_weights(hf, tmp_path_factory.mktemp("model"))
            made[key] = (folder, run_ranks(1, step_gradients, hf, {}, folder, {})[0])
        return made[key]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_rank(layout, one_rank):
    folder, (expected_loss, expected) = one_rank(model())
    ranks, sizes = LAYOUTS[layout]
    losses, gradients = zip(*run_ranks(ranks, step_gradients, model(), sizes, folder, {}), strict=True)
    assert max(losses, key=abs) == pytest.approx(expected_loss, rel=1e-5)
    assert_close(gradients[0], expected)


def threads_of_layouts(hf: dict[str, Any], folder: str, count: int) -> list[int]:
    """On a rank: its threads after each of several layouts that it made, trained with and shut down."""
    found = []
    for _ in range(count):
        step_gradients(hf, {}, folder, {})
        gc.collect()
        found.append(len(os.listdir("/proc/self/task")))
    return found


def test_a_layout_that_is_shut_down_leaves_neither_its_model_nor_its_groups_behind(one_rank):
    folder, _ = one_rank(model())
    [(first, *later)] = run_ranks(1, threads_of_layouts, model(), folder, 4)
    assert max(later) < first + 24, "each group has a thread of gloo's, a layout has 48 groups"


SHAPES = {
    "tied, full-rank queries": {"tie_word_embeddings": True, "q_lora_rank": None},
    "no MTP, two dense layers": {"num_nextn_predict_layers": 0, "first_k_dense_replace": 2},
    "uneven stages": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("layout", ["PP2", "PP2 x TP2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_too(shape, layout, one_rank):
    hf = model(**SHAPES[shape])
    folder, (_, expected) = one_rank(hf)
    ranks, sizes = LAYOUTS[layout]
    (_, gradients), *_ = run_ranks(ranks, step_gradients, hf, sizes, folder, {})
    assert_close(gradients, expected)


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(recompute, layout, one_rank):
    folder, (_, expected) = one_rank(model())
    ranks, sizes = LAYOUTS[layout]
    (_, gradients), *_ = run_ranks(ranks, step_gradients, model(), sizes, folder, {"recompute": recompute})
    assert_close(gradients, expected)


def test_bf16_is_near_fp32(one_rank):
    folder, (expected_loss, expected) = one_rank(model())
    [(loss, gradients)] = run_ranks(1, step_gradients, model(), {}, folder, {"dtype": torch.bfloat16})
    assert loss == pytest.approx(expected_loss, rel=0.02)
    name = "model.embed_tokens.weight"
    assert torch.nn.functional.cosine_similarity(gradients[name].flatten(), expected[name].flatten(), dim=0) > 0.9


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_without_its_loss_mtp_is_frozen_and_the_rest_trains(layout, one_rank):
    folder, (expected_loss, expected) = one_rank(model())
    ranks, sizes = LAYOUTS[layout]
    losses, gradients = zip(*run_ranks(ranks, step_gradients, model(), sizes, folder, {"train_mtp": False}), strict=True)
    assert max(losses, key=abs) == pytest.approx(expected_loss, rel=1e-5)
    shared = ("embed_tokens.weight", "shared_head.head.weight", "e_score_correction_bias")  # with the model, or not a parameter
    own = [name for name in expected if name.startswith("model.layers.4.") and not name.endswith(shared)]
    assert own
    assert not any(gradients[0][name].any() for name in own)
    trained = [name for name in expected if name.startswith("model.layers.3.") and name.endswith("_proj.weight")]
    assert all(gradients[0][name].any() for name in ("model.embed_tokens.weight", "lm_head.weight", *trained))


@pytest.mark.parametrize(("rate", "moved"), [(0.0, False), (0.01, True)])
def test_router_bias_moves_at_its_rate_alone(rate, moved, one_rank):
    folder, (_, expected) = one_rank(model())
    options = {"router_bias_update_rate": rate}
    (_, found), *_ = run_ranks(2, step_gradients, model(), LAYOUTS["PP2"][1], folder, options)
    names = [name for name in expected if name.endswith("e_score_correction_bias")]
    steps = torch.stack([found[name] - expected[name] for name in names])
    assert steps.abs().max() == pytest.approx(rate)
    assert bool(steps.any()) == moved


BAD_CONFIGS = [
    ({"model_type": None}, "model_type"),
    ({"model_type": "deepseek_v4"}, "deepseek_v4"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"n_group": None}, "n_group is missing"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"topk_method": "group_limited_greedy"}, "topk_method = 'group_limited_greedy'"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ({"norm_topk_prob": False}, "norm_topk_prob = False"),
    ({"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}, "norm_topk_prob = True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
    ({"n_group": 3}, "n_group = 3"),
    ({"topk_group": 3}, "topk_group = 3"),
    ({"num_experts_per_tok": 3}, "topk_group = 1"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type = 'linear'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.original_max_position_embeddings is missing"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale": 1.0}}, "mscale"),
]


def build_errors(configs: list[dict[str, Any]]) -> list[str]:
    """On a rank: what each config.json is refused with."""
    from megatron_r1.models.build import build
    from megatron_r1.parallel import Parallel

    messages = []
    for hf in configs:
        try:
            build(hf, Parallel())
            messages.append("built")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_configs_that_are_not_built_say_so_in_one_line():
    configs = [{name: value for name, value in model(**changes).items() if value is not None} for changes, _ in BAD_CONFIGS]
    [messages] = run_ranks(1, build_errors, configs)
    for message, (_, expected) in zip(messages, BAD_CONFIGS, strict=True):
        assert expected in message
        assert "\n" not in message
