"""What a GPU adds is Megatron's by name, is refused in one line where it cannot work, and its layers are the local ones' model.

Transformer Engine is a stand-in here (fake_te.py), which computes on the CPU; Megatron's own wrappers of it are the real ones.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from mcore_runs import Run, model
from ranks import run_ranks

from megatron_r1 import checks, config_types
from megatron_r1.models import kernels
from megatron_r1.models.kernels import Kernels
from megatron_r1.parallel import Parallel

V3 = json.loads((Path(__file__).resolve().parents[1] / "configs/models/deepseek_v3/config.json").read_text())
ENGINE = {"transformer_impl": "transformer_engine"}
FP8 = ("blockwise", "tensorwise", "delayed", "mxfp8")
EP2 = Parallel(expert_model_parallel_size=2)
STAGES = Parallel(expert_model_parallel_size=2, pipeline_model_parallel_size=2)
NO_MTP = {"num_nextn_predict_layers": 0}


def two_steps(parallel: Parallel, options: dict[str, Any], training: dict[str, Any], changes: dict[str, Any]) -> Any:
    """On a rank: metrics and weights of an optimizer step of SFT and one of GRPO."""
    with Run(parallel, hf=model(**changes), kernels=Kernels(**options), **training) as run:
        run.policy.refresh_reference()
        metrics = [run.sft_step(0, chunk_tokens=128), run.grpo_step(1)]
        config = run.policy.config
        names = [name for name, _ in run.policy.chunks[0].module.named_parameters()]
        return metrics, run.weights(), {f.name: repr(getattr(config, f.name)) for f in fields(config)}, names


TRAINED = {"train_mtp": True, "mtp_loss_scale": 0.5}


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes", "training"),
    [
        (1, Parallel(), {}, TRAINED),
        (1, Parallel(), {"q_lora_rank": None}, {}),
        (1, Parallel(), {}, {"recompute": "selective"}),
        (2, EP2, {}, TRAINED),
    ],
    ids=["one rank", "full-rank queries", "V3's recompute", "EP2"],
)
def test_layers_of_transformer_engine_train_as_the_local_ones(ranks, parallel, changes, training, on_engine):
    expected = run_ranks(ranks, two_steps, parallel, {}, training, changes)[0]
    found = on_engine(ranks, two_steps, parallel, ENGINE, training, changes)[0]
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        np.testing.assert_allclose(found[1][name], weight, rtol=0, atol=2e-5, err_msg=name)
    assert any(name.endswith("mlp.experts.linear_fc1.weight1") for name in found[3]), "experts are one grouped GEMM"
    assert any(name.endswith("linear_kv_up_proj.layer_norm_weight") for name in found[3]), "a norm is fused into its linear layer"
    assert not any("local_experts" in name for name in found[3])
    assert not any("layer_norm_weight" in name for name in expected[3])


def overlapped(parallel: Parallel, options: dict[str, Any], training: dict[str, Any]) -> Any:
    """On a rank: metrics and weights of two steps of several microbatches, and how often one's layer ran with another's backward."""
    with Run(parallel, kernels=Kernels(**ENGINE, **options), **training) as run:
        from megatron.core.models.common.model_chunk_schedule_plan import TransformerLayerSchedulePlan as Layer

        run.policy.refresh_reference()
        with mock.patch.object(Layer, "run", side_effect=Layer.run) as layers:
            metrics = [run.sft_step(0, chunk_tokens=64), run.grpo_step(1, chunk_tokens=64)]
        return metrics, run.weights(), sum(None not in call.args for call in layers.call_args_list)


@pytest.mark.parametrize(
    ("ranks", "parallel", "training"),
    [
        (2, EP2, TRAINED),
        (2, EP2, {"recompute": "selective", "train_mtp": False, "router_bias_update_rate": 1e-3}),
        (4, Parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, expert_model_parallel_size=2), TRAINED),
    ],
    ids=["MTP trained", "V3's recompute and bias updates", "interleaved stages"],
)
def test_hidden_communication_of_experts_changes_nothing(ranks, parallel, training, on_engine):
    expected = on_engine(ranks, overlapped, parallel, {}, training)[0]
    found = on_engine(ranks, overlapped, parallel, {"overlap_expert_communication": True}, training)[0]
    assert found[2] > 0 == expected[2]
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    for name, weight in expected[1].items():  # the embedding's gradients of decoder and MTP are added in another order
        np.testing.assert_allclose(found[1][name], weight, rtol=0, atol=1e-7, err_msg=name)


def fp8_steps(recipe: str) -> Any:
    """On a rank: what the FP8 contexts were, and the log-probs' shape; the stand-in refuses shapes that FP8 cannot take."""
    import fake_te

    hf = model(qk_nope_head_dim=32, kv_lora_rank=64, **NO_MTP)
    with Run(Parallel(), hf=hf, dtype="bfloat16", kernels=Kernels(fp8=recipe, **ENGINE), recompute="selective") as run:
        loss = run.sft_step(0)["policy/loss"]
        sizes = {b.tokens_T.numel() for b in run.batches([], chunk_tokens=64)}
        recipes = {(type(r).__name__, *sorted(map(str, r.settings.items()))) for r in fake_te.seen if r is not None}
        config = run.policy.config
        return loss, sizes, recipes, (config.fp8, config.fp8_recipe, config.fp8_param, config.recompute_modules)


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_runs_in_its_recipe_with_tokens_and_experts_padded(recipe, on_engine):
    loss, sizes, recipes, (fp8, name, parameters, recomputed) = on_engine(1, fp8_steps, recipe)[0]
    assert np.isfinite(loss)
    assert all(size % kernels.TOKENS[recipe] == 0 for size in sizes)
    classes = {"blockwise": "Float8BlockScaling", "tensorwise": "Float8CurrentScaling", "mxfp8": "MXFP8BlockScaling"}
    assert {r[0] for r in recipes} == {classes.get(recipe, "TEDelayedScaling")}
    assert name == recipe and parameters is False, "parameters stay bf16"
    assert fp8 == ("e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid")
    assert recomputed == (["mla_up_proj"] if recipe == "delayed" else ["layernorm", "mla_up_proj", "moe_act"])


def known_names() -> tuple[set[str], set[str]]:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    import megatron_r1.mcore  # noqa: F401

    return {f.name for f in fields(MLATransformerConfig)}, {f.name for f in fields(OptimizerConfig)}


def test_every_argument_is_a_field_of_megatrons_configuration():
    model_fields, optimizer_fields = run_ranks(1, known_names)[0]
    for recipe in ("none", *FP8):
        for dispatcher in ("alltoall", "deepep", "hybridep"):
            given = Kernels(fp8=recipe, dispatcher=dispatcher)
            found = kernels.arguments(given, rope_type="yarn", has_experts=True, is_apex_there=True)
            found |= kernels.recompute_arguments("selective", given, latent=True, grouped=True)
            assert found.keys() <= model_fields, found.keys() - model_fields
    assert optimizer_fields >= {"use_precision_aware_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype", "optimizer_offload_fraction"}


def test_every_kernel_can_be_set_in_a_config():
    assert config_types.Kernels.model_fields.keys() == {f.name for f in fields(Kernels)}


def logits_dtype(head: str) -> Any:
    import torch

    with Run(Parallel(), dtype="bfloat16", kernels=Kernels(head_dtype=head)) as run:
        [chunk] = run.policy.chunks
        found: list[Any] = []
        chunk.module.register_forward_hook(lambda module, args, output: found.append(output.dtype))
        before = run.weights()["lm_head.weight"]
        run.sft_step(0)
        assert run.policy.chunks[0].module.output_layer.weight.dtype == torch.bfloat16
        return str(found[0]), bool((run.weights()["lm_head.weight"] != before).any())


@pytest.mark.parametrize(("head", "dtype"), [("model", "torch.bfloat16"), ("float32", "torch.float32")])
def test_the_head_computes_in_float32_where_asked_and_trains(head, dtype):
    assert run_ranks(1, logits_dtype, head)[0] == (dtype, True)


def complaint(*, hf: dict[str, Any] = V3, parallel: Parallel = EP2, has_gpu: bool = True, **given: Any) -> str:
    """The one line that these settings are refused with; "" where they are not."""
    names = {f.name for f in fields(Kernels)}
    settings = Kernels(**{name: value for name, value in given.items() if name in names})
    run = {"dtype": "bfloat16", "recompute": "none"} | {n: v for n, v in given.items() if n not in names}
    try:
        kernels.check(settings, hf, parallel, has_gpu=has_gpu, **run)
    except ValueError as error:
        return str(error)
    return ""


REFUSED = [
    ({"fp8": "blockwise", "has_gpu": False}, ['kernels.fp8 = "blockwise"', "NVIDIA GPU"]),
    ({"transformer_impl": "transformer_engine", "has_gpu": False}, ["kernels.transformer_impl", "NVIDIA GPU"]),
    ({"dispatcher": "deepep", "has_gpu": False}, ["kernels.dispatcher", "NVIDIA GPU"]),
    ({"fp8": "blockwise", "dtype": "float32"}, ["kernels.fp8", 'model.dtype = "bfloat16"']),
    ({"fp8": "blockwise", "transformer_impl": "local"}, ["kernels.fp8", "Transformer Engine"]),
    ({"fp8": "mxfp8", "hf": V3 | {"q_lora_rank": 1544}}, ["kernels.fp8", "q_lora_rank = 1544", "multiple of 32"]),
    ({"fp8": "blockwise", "hf": V3 | {"moe_intermediate_size": 2056}}, ["moe_intermediate_size = 2056", "multiple of 16"]),
    ({"dispatcher": "deepep", "parallel": Parallel()}, ["kernels.dispatcher", "expert_model_parallel_size = 1"]),
    ({"dispatcher": "deepep"}, ["kernels.dispatcher", "github.com/deepseek-ai/DeepEP"]),
    ({"dispatcher": "hybridep"}, ["kernels.dispatcher", "hybrid-ep"]),
    ({"recompute_modules": ["layernorm"]}, ["kernels.recompute_modules", 'model.recompute = "selective"']),
    ({"recompute_modules": ["moe_act"], "recompute": "selective", "transformer_impl": "local"}, ["moe_act", "grouped experts"]),
    ({"recompute_modules": ["layernorm"], "recompute": "selective", "fp8": "delayed"}, ["layernorm", "delayed"]),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(given, words, monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda module: module == "transformer_engine")
    line = complaint(**given)
    assert all(word in line for word in words), line
    assert "\n" not in line


NOT_HIDDEN = [
    ({"has_gpu": False}, "NVIDIA GPU"),
    ({"parallel": Parallel()}, "parallel.expert_model_parallel_size = 1;"),
    ({"parallel": Parallel(expert_model_parallel_size=256)}, "256 experts"),
    ({"parallel": STAGES}, "set parallel.virtual_pipeline_model_parallel_size"),
    ({"transformer_impl": "local"}, 'kernels.transformer_impl = "local"'),
    ({"recompute": "full"}, 'set "selective"'),
    ({"recompute": "selective", "recompute_modules": ["moe"]}, '"moe" in kernels.recompute_modules'),
]


@pytest.mark.parametrize(("given", "words"), NOT_HIDDEN)
def test_communication_that_cannot_be_hidden_is_refused_in_one_line(given, words, monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda module: module == "transformer_engine")
    line = complaint(overlap_expert_communication=True, **given)
    assert line.startswith("kernels.overlap_expert_communication = true: ") and words in line, line
    assert "\n" not in line
    assert complaint(overlap_expert_communication=True) == ""


def test_a_gpu_without_transformer_engine_is_told_how_to_install_it():
    assert "pip install --no-build-isolation 'transformer-engine[pytorch]==2.12.*'" in complaint(fp8="blockwise")
    assert "pip install --no-build-isolation 'transformer-engine[pytorch]==2.12.*'" in complaint()
    assert complaint(transformer_impl="local") == ""
    assert complaint(has_gpu=False, dtype="float32") == "", "a CPU needs none of it"


def test_v3_itself_takes_every_fp8_and_every_dispatcher(monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda module: True)
    for recipe in FP8:
        for dispatcher in ("alltoall", "deepep", "hybridep"):
            assert complaint(fp8=recipe, dispatcher=dispatcher, recompute="selective") == ""


GENERATIONS = [("blockwise", (10, 0), "mxfp8"), ("mxfp8", (9, 0), "blockwise"), ("delayed", (8, 0), "none")]


@pytest.mark.parametrize(("recipe", "capability", "instead"), GENERATIONS)
def test_fp8_of_another_gpu_generation_is_named(recipe, capability, instead):
    with pytest.raises(ValueError, match=f'set "{instead}"'):
        kernels.check_device(Kernels(fp8=recipe), capability)
    kernels.check_device(Kernels(fp8="blockwise"), (9, 0))


OPTIMIZERS = [
    ({"moments_dtype": "bfloat16", "has_gpu": False}, "NVIDIA GPU"),
    ({"offload_fraction": 0.5, "has_gpu": False}, "NVIDIA GPU"),
    ({"moments_dtype": "bfloat16", "dtype": "float32"}, 'model.dtype = "bfloat16"'),
    ({"moments_dtype": "bfloat16", "offload_fraction": 1.0}, "leave one out"),
]


@pytest.mark.parametrize(("given", "words"), OPTIMIZERS)
def test_an_optimizer_that_cannot_be_is_refused_in_one_line(given, words, monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda module: True)
    default = {"moments_dtype": "float32", "offload_fraction": 0.0, "dtype": "bfloat16", "has_gpu": True}
    with pytest.raises(ValueError, match=words):
        kernels.check_optimizer(**default | given)
    kernels.check_optimizer(**default)


@pytest.mark.parametrize(
    ("build", "driver", "expected"),
    [
        ("cuda: Optional[str] = '13.0'", "/usr/bin/nvidia-smi", True),
        ("cuda: Optional[str] = '13.0'", None, False),
        ("cuda: Optional[str] = None", "/usr/bin/nvidia-smi", False),
    ],
)
def test_a_gpu_is_there_where_a_driver_is_and_torch_was_built_for_it(build, driver, expected, tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('torch is not to be imported')")
    (tmp_path / "torch/version.py").write_text(f"from typing import Optional\n\n{build}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")  # so that it is looked for
    monkeypatch.setattr(checks.shutil, "which", lambda program: driver)
    monkeypatch.setattr(checks.Path, "exists", lambda path: False)
    assert checks.has_gpu() is expected


def test_the_torch_that_is_here_is_taken_for_what_it_is(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda program: f"/usr/bin/{program}")
    assert checks.has_gpu() is (torch.version.cuda is not None)
