"""What a checkpoint answers in Megatron, on one rank: for a comparison with another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed.checkpoint.api import CheckpointException

from megatron_r1.mcore import distributed
from megatron_r1.models.build import build
from megatron_r1.parallel import Parallel
from megatron_r1.weights import shard
from megatron_r1.weights.hf import SafetensorsReader

RELEASE = "release"  # the subfolder where Megatron-LM keeps weights that were not trained there


def logits(hf: dict[str, Any], folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Token ids [T] -> logits [T, V] in float32, by the model of `hf` (a config.json) with the weights of `folder`.

    The folder is Hugging Face's, or a checkpoint that Megatron's own dist_checkpointing loads. Needs the environment of
    a single rank.
    """
    parallel = Parallel()
    distributed.init(parallel, seed=1)
    try:
        [model] = build(hf, parallel)
        if (folder / "config.json").is_file():
            shard.load([model], SafetensorsReader(folder), hf)
        else:
            _load(model, folder / RELEASE if (folder / RELEASE).is_dir() else folder)
        device = next(model.parameters()).device
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=len(ids), max_seqlen_kv=len(ids))
        positions = torch.arange(len(ids), device=device)[None]
        with torch.no_grad():
            return model(ids.to(device)[None], positions, None, packed_seq_params=packed)[0].cpu()
    finally:
        distributed.shutdown()


def _load(model: torch.nn.Module, folder: Path) -> None:
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder}: neither a Hugging Face folder nor a Megatron checkpoint; name the one or the other")
    try:
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata={})}, str(folder))
    except (CheckpointException, CheckpointingException) as error:  # torch's, Megatron's
        [reason, *_] = [str(failure[0]) for failure in getattr(error, "failures", {}).values()] or [str(error)]
        raise ValueError(f"{folder}: another model than config.json describes: {reason[:100]}...") from None
    model.load_state_dict(loaded["model"])
