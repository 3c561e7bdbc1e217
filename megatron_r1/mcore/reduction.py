"""What one optimizer step measured, summed over microbatches and data-parallel ranks and told to every pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1.types import LossOutput


def of_losses(outputs: Sequence[LossOutput]) -> dict[str, float]:
    """Weighted means and maxima over this step's microbatches on all data-parallel ranks; {} before the last stage.

    Every microbatch must report the same metrics.
    """
    if not outputs:
        return {}
    sums, maxima = sorted(outputs[0].sums), sorted(outputs[0].maxima)
    assert all(sorted(o.sums) == sums and sorted(o.maxima) == maxima for o in outputs), f"{sums=} {maxima=} differ between microbatches"
    device = outputs[0].loss_sum.device
    group = parallel_state.get_data_parallel_group()
    totals = torch.tensor([[o.sums[name] for name in sums] for o in outputs], dtype=torch.float64, device=device).sum(0)
    dist.all_reduce(totals, group=group)
    largest = torch.tensor([[o.maxima[name] for name in maxima] for o in outputs], dtype=torch.float64, device=device).amax(0)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    means = {name: value / weight if weight else 0.0 for name, (value, weight) in zip(sums, totals.tolist(), strict=True)}
    return {**means, **dict(zip(maxima, largest.tolist(), strict=True))}


def over_stages(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of all pipeline stages together, on each."""
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() == 1:
        return metrics
    stages: list[dict[str, float]] = [{}] * pipeline.size()
    dist.all_gather_object(stages, metrics, group=pipeline)
    return {name: value for stage in stages for name, value in stage.items()}


@torch.no_grad()
def expert_load(chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """Of each MoE layer here with a correction bias: tokens of its busiest expert over the mean, and the range of that bias.

    From these routers' own counts since the last optimizer step. Layers are numbered from 0, as in the checkpoint.
    """
    modules = [module for chunk in chunks for name, module in chunk.named_modules() if ".mtp." not in f".{name}"]
    routers = [module for module in modules if getattr(module, "expert_bias", None) is not None]  # softmax routers have none
    if not routers:
        return {}
    counts = torch.stack([router.local_tokens_per_expert for router in routers])
    dist.all_reduce(counts, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    bias = torch.stack([router.expert_bias for router in routers])
    load = counts.amax(1) / counts.mean(1).clamp(min=1e-9)
    metrics = {}
    for router, value, spread in zip(routers, load.tolist(), (bias.amax(1) - bias.amin(1)).tolist(), strict=True):
        metrics[f"moe/load_max_over_mean/{router.layer_number - 1}"] = value
        metrics[f"moe/bias_range/{router.layer_number - 1}"] = spread
    return metrics
