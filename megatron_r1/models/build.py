"""From a Hugging Face config.json to Megatron-Core's GPTModel: the one place that chooses between CPU and GPU layers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

import megatron_r1.mcore  # noqa: F401  installs the CPU adaptations before the first import of Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_r1 import plugins
from megatron_r1.mcore.attention import PackedAttention
from megatron_r1.mcore.norm import RMSNorm
from megatron_r1.parallel import Parallel

# Megatron's own local layers refuse packed sequences, MLA's head sizes and sequence parallelism
LOCAL_PARTS = {DotProductAttention: PackedAttention, WrappedTorchNorm: RMSNorm}


class PolicyModel(GPTModel):
    """GPTModel whose MTP layers can be left out of a forward.

    Without labels it returns logits [1, T, V / TP] on the last stage and runs no MTP layer: what RL and log-probs need.
    With labels [1, T] and loss_mask [1, T] it returns the same logits with the MTP loss attached to them, which backward
    then adds; Megatron's roll keeps the shifted labels inside their sequence.
    """

    main_labels: torch.Tensor | None = None

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Megatron asks this for the MTP heads and for the main one, of which the caller wants the logits themselves."""
        if labels is self.main_labels:
            return logits.transpose(0, 1).contiguous()
        return super().compute_language_model_loss(labels, logits)

    def _postprocess(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if labels is not None or self.config.mtp_num_layers is None:
            self.main_labels = labels
            return super()._postprocess(*args, labels=labels, **kwargs)
        depth, self.config.mtp_num_layers = self.config.mtp_num_layers, None
        try:
            return super()._postprocess(*args, labels=None, **{**kwargs, "mtp_in_postprocess": False})
        finally:
            self.config.mtp_num_layers = depth


def build(hf: dict[str, Any], parallel: Parallel, **options: Any) -> list[GPTModel]:
    """This rank's model chunks (one, or one a virtual pipeline stage), randomly initialised, not yet wrapped for training.

    hf       a config.json; its model_type names the file in models/ that translates it
    options  keyword arguments of that file's transformer_config (dtype, recompute, train_mtp ...)
    """
    family = plugins.load("models", hf["model_type"])
    config = family.transformer_config(hf, parallel, **options)
    on_gpu = torch.cuda.is_available()
    return [_chunk(hf, config, family.embedding_options(hf), stage=stage, on_gpu=on_gpu) for stage in _stages(parallel)]


def _stages(parallel: Parallel) -> list[int | None]:
    count = parallel.virtual_pipeline_model_parallel_size
    return [None] if count is None else list(range(count))


def _chunk(hf: dict[str, Any], config: Any, embedding: dict[str, Any], *, stage: int | None, on_gpu: bool) -> GPTModel:
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=on_gpu, normalization="RMSNorm", vp_stage=stage)
    mtp = None
    if config.mtp_num_layers:
        # a stage without decoder layers of its own has none to copy the MTP block from, hence the whole model's list
        mtp = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=on_gpu, vp_stage=stage)
    if not on_gpu:
        layers, mtp = _with_local_parts(layers), _with_local_parts(mtp)
        layers.layer_norm = RMSNorm
    virtual = {"ignore_virtual": stage is None, "vp_stage": stage}
    model = PolicyModel(
        config,
        layers,
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(**virtual),
        post_process=parallel_state.is_pipeline_last_stage(**virtual),
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", False)),
        mtp_block_spec=mtp,
        vp_stage=stage,
        **embedding,
    )
    if mtp is not None and not config.mtp_loss_scaling_factor:
        model.mtp.requires_grad_(False)  # else weight decay would wear down layers that get no gradient
    return model


def _with_local_parts(spec: Any) -> Any:
    """A copy of a spec tree with Megatron's local attention and norm replaced by ours."""
    if isinstance(spec, type):
        return LOCAL_PARTS.get(spec, spec)
    if isinstance(spec, list | tuple):
        return type(spec)(_with_local_parts(part) for part in spec)
    if not dataclasses.is_dataclass(spec):
        return spec
    spec = copy.copy(spec)
    for field in dataclasses.fields(spec):
        if field.name not in ("params", "metainfo"):
            setattr(spec, field.name, _with_local_parts(getattr(spec, field.name)))
    return spec
