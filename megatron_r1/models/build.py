"""A Hugging Face config.json -> Megatron model chunks on this rank; which layers they are made of is decided here alone.

On CPU the layers are Megatron's local ones with our attention and norm, on GPU they are Transformer Engine's unless
kernels.py says otherwise.
"""

from __future__ import annotations

import importlib.util
from dataclasses import fields, is_dataclass
from typing import Any

import torch

import megatron_r1.mcore  # noqa: F401  installs the CPU adaptations before the first import of Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.utils import init_method_normal

from megatron_r1.mcore import cpu
from megatron_r1.mcore.attention import GroupedAttention, LatentAttention, PackedAttention, SpecifiedLatentAttention
from megatron_r1.mcore.gpt import GroupedConfig, PolicyModel, ScoreHead
from megatron_r1.mcore.norm import RMSNorm
from megatron_r1.models import family, is_reward_model
from megatron_r1.models.kernels import INSTALL, Kernels, Recompute, arguments, check_device, recompute_arguments
from megatron_r1.parallel import Parallel

ALWAYS: dict[Any, type[torch.nn.Module]] = {SelfAttention: GroupedAttention, MLASelfAttention: SpecifiedLatentAttention}
NORMS = {WrappedTorchNorm: RMSNorm, FusedLayerNorm: RMSNorm}  # the second where there is Apex, whose norm is no RMSNorm
LOCAL = ALWAYS | NORMS | {DotProductAttention: PackedAttention, MLASelfAttention: LatentAttention}


def build(
    hf: dict[str, Any],
    parallel: Parallel,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    train_mtp: bool = True,
    mtp_loss_scale: float = 0.1,
    router_bias_update_rate: float = 0.0,
    kernels: Kernels | None = None,
) -> list[PolicyModel]:
    """This rank's model chunks (one, or `virtual_pipeline_model_parallel_size`), randomly initialised, not yet wrapped.

    All chunks share one TransformerConfig. Parameters are `dtype`, the routers' correction bias is float32. Without
    `train_mtp` the MTP layers are frozen: with no loss of their own, weight decay alone would move them.
    Needs `mcore.distributed.init(parallel, ...)`. Raises ValueError with one line for a family or field not built here.
    """
    std, kernels = hf.get("initializer_range", 0.02), kernels or Kernels()
    model = family(hf).transformer_arguments(hf)
    latent, experts, engine = bool(model.get("multi_latent_attention")), bool(model.get("num_moe_experts")), _has_engine(kernels)
    computed = {"use_cpu_initialization": not cpu.has_cuda(), "moe_token_dispatcher_type": "alltoall"}
    if engine:
        has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
        computed |= arguments(kernels, rope_type=model.get("rope_type"), has_experts=experts, is_apex_there=has_apex)
    config = (MLATransformerConfig if latent else GroupedConfig)(
        **model,
        **_layout(hf, parallel),
        **recompute_arguments(recompute, kernels, latent=latent, grouped=experts and engine),
        **computed,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        moe_router_dtype="fp32",
        init_method=init_method_normal(std),
        output_layer_init_method=init_method_normal(std),
        mtp_loss_scaling_factor=mtp_loss_scale,
        moe_router_bias_update_rate=router_bias_update_rate,
        transformer_impl="transformer_engine" if engine else "local",
        calculate_per_token_loss=True,  # gradients are divided by the count that the loss reports, over all ranks
        activation_func=torch.nn.functional.silu,
    )
    # not an argument: Megatron refuses it for MTP layers without a pipeline, which its own plan of them needs (see mcore/overlap.py)
    config.overlap_moe_expert_parallel_comm = kernels.overlap_expert_communication
    stages = parallel.virtual_pipeline_model_parallel_size
    head = torch.float32 if kernels.head_dtype == "float32" else None
    chunks = [_chunk(config, hf, vp_stage=stage, head_dtype=head) for stage in (range(stages) if stages else [None])]
    for chunk in chunks:
        if chunk.mtp_process and not train_mtp:
            chunk.mtp.requires_grad_(False)
    return [chunk.cuda() for chunk in chunks] if cpu.has_cuda() else chunks


def _layout(hf: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    layers, stages = hf["num_hidden_layers"], parallel.pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": (interleaved := parallel.virtual_pipeline_model_parallel_size),
        # two stages send each other two things at a time: batched, and without a group for each, one is taken for the other
        "batch_p2p_comm": interleaved is None,
        "overlap_p2p_comm": interleaved is not None,
        "num_layers_in_last_pipeline_stage": parallel.layers_on_last_stage(layers) if layers % stages else None,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }


def _has_engine(kernels: Kernels) -> bool:
    """Whether the layers are Transformer Engine's."""
    engine = kernels.transformer_impl == "transformer_engine" or (kernels.transformer_impl is None and cpu.has_cuda())
    if engine and importlib.util.find_spec("transformer_engine") is None:
        fix = f'{INSTALL["transformer_engine"]}, or set "local" for Megatron\'s own layers'
        raise ValueError(f"kernels.transformer_impl: Transformer Engine is not installed here; {fix}")
    if cpu.has_cuda():
        check_device(kernels, torch.cuda.get_device_capability())
    return engine


def _chunk(config: TransformerConfig, hf: dict[str, Any], *, vp_stage: int | None, head_dtype: torch.dtype | None) -> PolicyModel:
    engine = config.transformer_impl == "transformer_engine"
    own = ALWAYS if engine else LOCAL
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=engine, normalization="RMSNorm", vp_stage=vp_stage)
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, _moe_layer(config), use_transformer_engine=engine, vp_stage=vp_stage)
    model = PolicyModel(
        config,
        _with_own_modules(block, own),
        mtp_block_spec=_with_own_modules(mtp, own),
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings")),
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        vp_stage=vp_stage,
        head_dtype=head_dtype,
    )
    if model.post_process and is_reward_model(hf):
        model.output_layer = ScoreHead(config)
    return model


def _moe_layer(config: TransformerConfig) -> ModuleSpec:
    """The layer of MTP: a mixture of experts, whatever the decoder's last layer is."""
    options = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(**options)
    return get_gpt_layer_local_spec(**options, normalization="RMSNorm")


def _with_own_modules(spec: Any, own: dict[Any, type[torch.nn.Module]]) -> Any:
    """A spec of Megatron's layers, with ours in the place of some of Megatron's modules."""
    if isinstance(spec, list):
        return [_with_own_modules(part, own) for part in spec]
    if is_dataclass(spec) and not isinstance(spec, type):
        for field in fields(spec):
            setattr(spec, field.name, _with_own_modules(getattr(spec, field.name), own))
    return own.get(spec, spec) if isinstance(spec, type) else spec
