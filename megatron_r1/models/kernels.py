"""What a GPU adds to a model: layers, FP8, expert dispatchers, recompute. Their settings, what each needs, Megatron's names for them.

FP8 as V3 trained (arXiv:2412.19437, section 3.3) is "blockwise": e4m3 throughout, one float32 scale a 1 x 128 tile of activations and
of their gradients and a 128 x 128 block of weights. Embedding, head, router, norms and the attention itself stay in bfloat16 or
float32 in every recipe, for they are not Transformer Engine's linear layers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.parallel import Parallel

TransformerImpl = Literal["transformer_engine", "local"]
Recompute = Literal["none", "selective", "full"]
INSTALL = {
    "transformer_engine": "pip install --no-build-isolation 'transformer-engine[pytorch]==2.12.*'",
    "deep_ep": "build it from github.com/deepseek-ai/DeepEP",
    "deep_ep.hybrid_ep_buffer": "build DeepEP's branch hybrid-ep from github.com/deepseek-ai/DeepEP",
}
DISPATCHERS = {"deepep": "deep_ep", "hybridep": "deep_ep.hybrid_ep_buffer"}  # the module that each is
# tokens of a tensor-parallel rank: below 128 a blockwise tensor is gathered in bfloat16; the others are what the GEMM takes
TOKENS = {"none": 1, "blockwise": 128, "tensorwise": 16, "delayed": 16, "mxfp8": 32}
FEATURES = {"blockwise": 16, "tensorwise": 16, "delayed": 16, "mxfp8": 32}  # inputs and outputs of a linear layer
COMPUTE_CAPABILITY = {"blockwise": (9, 9), "tensorwise": (9, 99), "delayed": (9, 99), "mxfp8": (10, 99)}  # first and last that have it


@dataclass(frozen=True)
class Kernels:
    """How a model is computed, which changes its rounding and its speed but not what it is."""

    transformer_impl: TransformerImpl | None = None  # None: Transformer Engine's layers where there is CUDA
    fp8: Literal["none", "blockwise", "tensorwise", "delayed", "mxfp8"] = "none"
    dispatcher: Literal["alltoall", "deepep", "hybridep"] = "alltoall"  # of tokens to experts
    overlap_expert_communication: bool = False  # the dispatcher's communication of one microbatch while another is computed
    rope_fusion: bool = True  # with Transformer Engine's layers
    head_dtype: Literal["model", "float32"] = "model"  # the output layer's product, from which the log-probs come
    recompute_modules: Sequence[str] = ()  # of recompute = "selective"; none: V3's

    @property
    def token_multiple(self) -> int:
        """What each tensor-parallel rank's tokens of a microbatch must be a multiple of. Experts pad what they get themselves."""
        return TOKENS[self.fp8]


def is_installed(module: str) -> bool:
    """Whether `module` can be imported; its package is imported for that, it itself is not."""
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def check(kernels: Kernels, hf: dict[str, Any], parallel: Parallel, *, dtype: str, recompute: Recompute, has_gpu: bool) -> None:
    """Raise ValueError with one line for the first setting that cannot work with this model, layout or machine."""
    for name, used in {
        'kernels.transformer_impl = "transformer_engine"': kernels.transformer_impl == "transformer_engine",
        f'kernels.fp8 = "{kernels.fp8}"': kernels.fp8 != "none",
        f'kernels.dispatcher = "{kernels.dispatcher}"': kernels.dispatcher != "alltoall",
        "kernels.overlap_expert_communication = true": kernels.overlap_expert_communication,
    }.items():
        if used and not has_gpu:
            raise ValueError(f"{name}: needs an NVIDIA GPU, and torch has none here; leave it out")
        if used and dtype != "bfloat16" and "transformer_impl" not in name:
            raise ValueError(f'{name}: is for bfloat16, and model.dtype = "{dtype}"; set model.dtype = "bfloat16"')
    if has_gpu and kernels.transformer_impl != "local" and not is_installed("transformer_engine"):
        fix = f'{INSTALL["transformer_engine"]}, or set "local" for Megatron\'s own layers'
        raise ValueError(f"kernels.transformer_impl: Transformer Engine is not installed here; {fix}")
    _check_recompute(kernels, hf, recompute=recompute, has_gpu=has_gpu)
    _check_fp8(kernels, hf, parallel)
    _check_dispatcher(kernels, hf, parallel)
    if kernels.overlap_expert_communication:
        _check_overlap(kernels, hf, parallel, recompute=recompute)


def check_optimizer(*, moments_dtype: str, offload_fraction: float, dtype: str, has_gpu: bool) -> None:
    """Raise ValueError with one line for an optimizer that this machine or these parameters cannot have."""
    for name, used in {
        f'optimizer.moments_dtype = "{moments_dtype}"': moments_dtype != "float32",
        f"optimizer.offload_fraction = {offload_fraction}": offload_fraction > 0,
    }.items():
        if used and not has_gpu:
            raise ValueError(f"{name}: needs an NVIDIA GPU, and torch has none here; leave it out")
        if used and dtype != "bfloat16":
            raise ValueError(f'{name}: is for bfloat16 parameters, and model.dtype = "{dtype}"; set model.dtype = "bfloat16"')
        if used and not is_installed("transformer_engine"):
            raise ValueError(f"{name}: Transformer Engine is not installed here, and it is its Adam's; {INSTALL['transformer_engine']}")
    if moments_dtype != "float32" and offload_fraction > 0:
        raise ValueError(
            f'optimizer.moments_dtype = "{moments_dtype}": what optimizer.offload_fraction moves to the host is float32; leave one out'
        )


def _check_recompute(kernels: Kernels, hf: dict[str, Any], *, recompute: Recompute, has_gpu: bool) -> None:
    if kernels.recompute_modules and recompute != "selective":
        raise ValueError(f'kernels.recompute_modules: is for model.recompute = "selective", and it is "{recompute}"; set that')
    has = {"mla_up_proj": "kv_lora_rank" in hf, "moe": experts(hf) > 0, "shared_experts": bool(hf.get("n_shared_experts"))}
    has["moe_act"] = experts(hf) > 0 and has_gpu and kernels.transformer_impl != "local"
    for name in kernels.recompute_modules:
        if not has.get(name, True):
            need = "grouped experts, which Transformer Engine has" if name == "moe_act" else "a model that has them"
            raise ValueError(f'kernels.recompute_modules: "{name}" needs {need}; leave it out')
        if kernels.fp8 == "delayed" and name in ("layernorm", "moe_act"):
            raise ValueError(f'kernels.recompute_modules: "{name}" cannot be recomputed with kernels.fp8 = "delayed"; leave it out')


def _check_fp8(kernels: Kernels, hf: dict[str, Any], parallel: Parallel) -> None:
    if kernels.fp8 == "none":
        return
    if kernels.transformer_impl == "local":
        raise ValueError(f'kernels.fp8 = "{kernels.fp8}": is Transformer Engine\'s; take kernels.transformer_impl = "local" out')
    multiple = FEATURES[kernels.fp8]
    for name, size, parts in linear_sizes(hf, parallel):
        if size % (multiple * parts):
            raise ValueError(
                f'kernels.fp8 = "{kernels.fp8}": {name} = {size} of config.json, over {parts} ranks, is not a multiple of {multiple};'
                ' set "none" or lower the tensor parallel size'
            )


def _check_dispatcher(kernels: Kernels, hf: dict[str, Any], parallel: Parallel) -> None:
    if kernels.dispatcher == "alltoall":
        return
    name, module = f'kernels.dispatcher = "{kernels.dispatcher}"', DISPATCHERS[kernels.dispatcher]
    if not experts(hf):
        raise ValueError(f'{name}: this model has no routed experts; set "alltoall"')
    if parallel.expert_model_parallel_size * parallel.expert_tensor_size == 1:
        raise ValueError(f'{name}: moves tokens between ranks, and parallel.expert_model_parallel_size = 1; raise that or set "alltoall"')
    if not is_installed(module):
        raise ValueError(f"{name}: is not installed here; {INSTALL[module]}")


def _check_overlap(kernels: Kernels, hf: dict[str, Any], parallel: Parallel, *, recompute: Recompute) -> None:
    stages, ranks = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    interleaved = parallel.virtual_pipeline_model_parallel_size
    for is_so, what, fix in (
        (kernels.transformer_impl == "local", 'kernels.transformer_impl = "local"', "take that out"),
        (ranks == 1, "parallel.expert_model_parallel_size = 1", "raise that"),
        # Megatron 0.16 frees what an only expert was given before its backward pass
        (ranks >= experts(hf), f"parallel.expert_model_parallel_size = {ranks} for {experts(hf)} experts", "lower that"),
        (stages > 1 and not interleaved, f"{stages} pipeline stages", "set parallel.virtual_pipeline_model_parallel_size"),
        (recompute == "full", 'model.recompute = "full"', 'set "selective"'),
        ("moe" in kernels.recompute_modules, '"moe" in kernels.recompute_modules', "take that out"),
    ):
        if is_so:
            raise ValueError(f"kernels.overlap_expert_communication = true: not with {what}; {fix}, or leave it out")


def experts(hf: dict[str, Any]) -> int:
    """Routed experts of a layer; families call the field differently."""
    return next((hf[name] for name in ("n_routed_experts", "num_experts", "num_local_experts") if hf.get(name)), 0)


def linear_sizes(hf: dict[str, Any], parallel: Parallel) -> list[tuple[str, int, int]]:
    """(field, inputs or outputs of a linear layer, ranks that divide them) for each kind in the model."""
    tensor, expert_tensor = parallel.tensor_model_parallel_size, parallel.expert_tensor_size
    heads = hf["num_attention_heads"]
    found = [("hidden_size", hf["hidden_size"], 1), ("intermediate_size", hf["intermediate_size"], tensor)]
    if "kv_lora_rank" in hf:
        nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
        found += [
            ("kv_lora_rank", hf["kv_lora_rank"], 1),
            ("kv_lora_rank + qk_rope_head_dim", hf["kv_lora_rank"] + rope, 1),
            ("num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)", heads * (nope + rope), tensor),
            ("num_attention_heads x (qk_nope_head_dim + v_head_dim)", heads * (nope + value), tensor),
            ("num_attention_heads x v_head_dim", heads * value, tensor),
        ]
        found += [("q_lora_rank", hf["q_lora_rank"], 1)] if hf.get("q_lora_rank") else []
    else:
        width, groups = hf.get("head_dim") or hf["hidden_size"] // heads, hf.get("num_key_value_heads") or heads
        found += [
            ("num_attention_heads x head_dim", heads * width, tensor),
            ("(num_attention_heads + 2 x num_key_value_heads) x head_dim", (heads + 2 * groups) * width, tensor),
        ]
    if experts(hf):
        found.append(("moe_intermediate_size", hf["moe_intermediate_size"], expert_tensor))
        shared = (hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"]
        found += [("n_shared_experts x moe_intermediate_size", shared, tensor)] if shared else []
    return found


def recompute_arguments(recompute: Recompute, kernels: Kernels, *, latent: bool, grouped: bool) -> dict[str, Any]:
    """Which activations are computed again in the backward pass instead of kept; `grouped`: the experts are one grouped GEMM."""
    if recompute == "none":
        return {}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert recompute == "selective", f"{recompute=}"
    # what V3 computes again (arXiv:2412.19437, section 3.2.3); delayed scaling counts an amax at each forward, so norms and SwiGLU stay
    v3 = {"layernorm": kernels.fp8 != "delayed", "mla_up_proj": latent, "moe_act": grouped and kernels.fp8 != "delayed"}
    modules = list(kernels.recompute_modules) or [name for name, there in v3.items() if there]
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def arguments(kernels: Kernels, *, rope_type: str | None, has_experts: bool, is_apex_there: bool) -> dict[str, Any]:
    """Arguments of Megatron's configuration for Transformer Engine's layers. `rope_type`: MLA's, None for grouped-query attention."""
    return {
        "moe_grouped_gemm": has_experts,
        "moe_permute_fusion": has_experts,
        "bias_activation_fusion": True,
        "apply_rope_fusion": kernels.rope_fusion and rope_type in (None, "yarn"),  # MLA's fused rotation is YaRN's
        # the output layer is not Transformer Engine's, and needs Apex's kernel for it
        "gradient_accumulation_fusion": is_apex_there,
        **_fp8_arguments(kernels),
        **_dispatcher_arguments(kernels),
    }


def _fp8_arguments(kernels: Kernels) -> dict[str, Any]:
    if kernels.fp8 == "none":
        return {}
    # V3: e4m3 for gradients too. One scale a tensor has too little range for that: there they are e5m2
    found: dict[str, Any] = {"fp8": "e4m3" if kernels.fp8 in ("blockwise", "mxfp8") else "hybrid", "fp8_recipe": kernels.fp8}
    if kernels.fp8 == "delayed":
        found |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return found


def _dispatcher_arguments(kernels: Kernels) -> dict[str, Any]:
    if kernels.dispatcher == "alltoall":
        return {}
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": kernels.dispatcher}


def check_device(kernels: Kernels, capability: tuple[int, int]) -> None:
    """Raise ValueError where this GPU, of compute capability `capability`, has no such FP8."""
    if kernels.fp8 == "none":
        return
    first, last = COMPUTE_CAPABILITY[kernels.fp8]
    if not first <= capability[0] <= last:
        instead = "mxfp8" if capability[0] >= 10 else "blockwise" if capability[0] == 9 else "none"
        name = f"compute capability {capability[0]}.{capability[1]}"
        raise ValueError(f'kernels.fp8 = "{kernels.fp8}": this GPU has {name}, which it is not for; set "{instead}"')
