"""Megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule for the chunks of one policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1.models.kernels import Kernels


@dataclass(frozen=True)
class Training:
    """What a policy needs to know to be trained; the betas, weight decay and clipping are V3's."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: Literal["none", "selective", "full"] = "none"  # activation recompute, Megatron's granularity
    train_mtp: bool = False  # SFT trains the MTP layer with the policy; RL leaves it out and as it is
    mtp_loss_scale: float = 0.1
    router_bias_update_rate: float = 0.0  # 0 freezes the routers' correction bias
    lr: float = 3e-6
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    lr_decay_steps: int | None = None  # from the first step; None is for "constant" only
    weight_decay: float = 0.1  # not of vectors (norms, biases)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # 0 = off
    moments_dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's two; V3's are bfloat16
    offload_fraction: float = 0.0  # of the optimizer's state and its step, in host memory; 0 = none
    kernels: Kernels = field(default_factory=Kernels)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

    def __post_init__(self) -> None:
        steps, warmup = self.lr_decay_steps, self.lr_warmup_steps
        if steps is None and self.lr_decay_style != "constant":
            raise ValueError(f"optimizer.lr_decay_style = {self.lr_decay_style!r}: needs optimizer.lr_decay_steps; set it")
        if steps is not None and warmup >= steps:
            raise ValueError(f"optimizer.lr_warmup_steps = {warmup}: must be below optimizer.lr_decay_steps = {steps}; lower it")
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr = {self.min_lr}: must not be above optimizer.lr = {self.lr}; lower it")


def wrap(chunks: Sequence[torch.nn.Module]) -> list[DistributedDataParallel]:
    """The model chunks with gradient buffers that are reduced in float32 over the data-parallel ranks."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
    for chunk in wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            _count_padding(buffer)
    return wrapped


def _count_padding(buffer: _ParamAndGradBuffer) -> None:
    """Keep the optimizer's checkpoint whole where a buffer has several buckets, as with an embedding on two stages.

    Megatron gathers the buckets without their padding at the end, but then looks parameters up by where they are in the
    padded buffer: those after the first bucket would be saved shifted. With the padding counted, both agree.
    """
    for bucket in buffer.buckets:
        bucket.numel_unpadded = bucket.grad_data.numel()
    buffer.numel_unpadded = buffer.numel


def make_optimizer(chunks: list[DistributedDataParallel], training: Training) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW, its state divided among the data-parallel ranks, and the schedule of its learning rate. Collective."""
    moments, offloads = getattr(torch, training.moments_dtype), training.offload_fraction > 0
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.torch_dtype == torch.bfloat16,
        params_dtype=training.torch_dtype,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=moments != torch.float32 or offloads,  # offloading is a part of that
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        optimizer_cpu_offload=offloads,
        optimizer_offload_fraction=training.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=offloads,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            _allocate(part)  # else there is nothing to save before the first step
    warmup = training.lr_warmup_steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=training.lr / (warmup + 1),  # Megatron counts steps from 0: from 0.0 the first step would change nothing
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=training.lr_decay_steps or warmup + 1,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def _allocate(part: Any) -> None:
    """Adam's moments, all zero. What Megatron has for it calls Transformer Engine with an argument less than newer ones take."""
    adam = part.optimizer
    if part.init_state_fn is None:  # offloaded: only a step makes its state, here from noise that Megatron draws
        adam.dummy_step()
        for tensors in adam.state.values():
            for name in tensors.keys() & {"exp_avg", "exp_avg_sq", "step"}:
                tensors[name].zero_()
        for group in (group for inner in adam.sub_optimizers for group in inner.param_groups if "step" in group):
            group["step"] = 0
    elif part.config.use_precision_aware_optimizer:
        more = (part.config.store_param_remainders,) if "store_param_remainders" in signature(adam.initialize_state).parameters else ()
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.initialize_state(parameter, *more)
        _take_remainders(adam)
    else:
        part.init_state_fn(adam, part.config)


def _take_remainders(adam: Any) -> None:
    """Let Transformer Engine's Adam load what Megatron saves of a bf16 parameter's master weight: the 16 bits that the parameter lacks.

    They are whole numbers, int16 in Adam, which takes no others; Megatron saves them as float32 and hands them back so.
    """
    set_state = adam.set_scaled_state

    def set_scaled_state(parameter: torch.Tensor, name: str, value: torch.Tensor) -> None:
        is_remainder = adam.store_param_remainders and name == "master_param" and parameter.dtype == torch.bfloat16
        set_state(parameter, name, value.to(torch.int16) if is_remainder else value)

    adam.set_scaled_state = set_scaled_state
