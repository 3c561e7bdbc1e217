"""Checkpoints of a policy by Megatron's dist_checkpointing, which a run in another parallel layout can load.

    checkpoints/step-00000400/   model, optimizer, random state, reference
    checkpoints/latest           the name of the newest folder, written when that is complete

A folder is written under a temporary name and renamed, so that under its own name it is never half there.
"""

from __future__ import annotations

import json
import queue
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_r1.mcore.policy import Policy
from megatron_r1.mcore.reference import Reference
from megatron_r1.weights.torch_dist import missing_file

LATEST = "latest"
ABOUT = "policy.json"  # ours, in each folder; Megatron's own metadata.json says that its part is complete
PREFIX = "step-"
TEMPORARY = ".writing-"
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# fields of config.json that do not change what the weights mean
NOT_THE_MODEL = frozenset(
    ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "max_position_embeddings")
)

Tree = dict[str, Any]


def _write_here(transforms: list[Any], use_msc: bool, *job: Any) -> None:
    """Megatron's writer without its processes: forked from one with gloo's threads they can hang for ever."""
    _rank, buckets, results = job
    written, pending = {}, queue.Queue()
    for number, bucket in enumerate(buckets):
        done: queue.Queue = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, done, pending, True)
        written[number] = done.get()[1]
    failed = [result for result in written.values() if isinstance(result, Exception)]
    results.put(failed[0] if failed else written)


FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_here)
filesystem_async._results_queue = queue.Queue()  # else the first save starts a process to hold one


def save(policy: Policy, folder: str | Path, *, step: int, extra: Tree, keep: int) -> Path:
    """Write `<folder>/step-<step>`, point `latest` at it and delete all but the newest `keep`. Collective.

    extra  what the stage needs to go on (the data cursor): JSON; rank 0's counts
    """
    folder = Path(folder)
    final, temporary = folder / f"{PREFIX}{step:08d}", folder / f"{TEMPORARY}{step:08d}"
    if dist.get_rank() == 0:
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    dist.barrier()
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    state, _ = _state(policy, loading=False)
    dist_checkpointing.save(state, str(temporary), strategy, content_metadata=dict(CONTENT))
    if dist.get_rank() == 0:
        about = {
            "hf": policy.hf,
            "step": policy.step,
            "reference_step": policy.reference_step,
            "layout": _layout(policy),
            "train_mtp": policy.training.train_mtp,
            "moments_dtype": policy.training.moments_dtype,
            "extra": extra,
        }
        (temporary / ABOUT).write_text(json.dumps(about, indent=1))
        if final.exists():  # of an earlier run that was resumed from before this step
            shutil.rmtree(final)
        temporary.rename(final)
        pointer = folder / f"{TEMPORARY}{LATEST}"
        pointer.write_text(final.name)
        pointer.replace(folder / LATEST)
        for old in sorted(folder.glob(f"{PREFIX}*"))[:-keep]:
            if old != final:
                shutil.rmtree(old)
    dist.barrier()
    return final


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, or None where none was ever written. Raises ValueError where it was taken away."""
    pointer = Path(folder) / LATEST
    if not pointer.is_file():
        return None
    path = Path(folder) / pointer.read_text().strip()
    if not path.is_dir():
        raise ValueError(f"{pointer}: names {path.name}, which is not there; write one that is into it, or delete it to start anew")
    return path


def latest_step(folder: str | Path) -> int | None:
    """The optimizer step of the newest complete checkpoint."""
    path = latest(folder)
    return None if path is None else int(path.name.removeprefix(PREFIX))


def load(policy: Policy, path: str | Path) -> Tree:
    """Make the policy what it was when `path` was saved, and return `extra`. Collective.

    Any layout will do; in the same one the run goes on to the bit. The random state is restored in the same one only,
    elsewhere it stays as seeded. Learning rate, betas and decay are the policy's own settings, not the checkpoint's.
    Raises ValueError for a folder that is not whole or holds another model.
    """
    path = Path(path)
    about = _about(policy, path)
    same_layout = about["layout"] == _layout(policy)
    policy.reference = None if about["reference_step"] is None else Reference(policy.chunks, step=about["reference_step"])
    state, optimizer = _state(policy, loading=True)
    if not same_layout:
        del state["random"]
    tensors = _tensors(state["model"])  # before loading replaces what they are described by
    loaded = dist_checkpointing.load(state, str(path))
    for key, chunk in _named_chunks(policy):
        chunk.load_state_dict(loaded["model"][key])
    _load_optimizer(policy, optimizer, moments=loaded["optimizer"], step=about["step"])
    if policy.reference:
        policy.reference.assign((tensors[key][name], value) for key, part in loaded["reference"].items() for name, value in part.items())
    if same_layout:
        _set_random_state(loaded["random"])
    policy.step = about["step"]
    policy.scheduler.num_steps = 0
    policy.scheduler.step(policy.step)
    return about["extra"]


def _about(policy: Policy, path: Path) -> Tree:
    if name := missing_file(path) if (path / ABOUT).is_file() else ABOUT:
        raise ValueError(f"{path}: not a complete checkpoint, {name} is missing; resume from another one")
    try:
        about = json.loads((path / ABOUT).read_text())
    except json.JSONDecodeError:
        raise ValueError(f"{path / ABOUT}: damaged; resume from another checkpoint") from None
    for name in sorted((about["hf"].keys() | policy.hf.keys()) - NOT_THE_MODEL):
        saved, wanted = about["hf"].get(name), policy.hf.get(name)
        if saved != wanted:
            raise ValueError(
                f"{path}: holds a model with {name} = {saved!r}, config.json has {wanted!r};"
                " set checkpoint.resume = false or another run.dir"
            )
    if about["train_mtp"] != policy.training.train_mtp:
        raise ValueError(f"{path}: is of another stage (MTP trained: {about['train_mtp']}); give this stage a run.dir of its own")
    saved, wanted = about.get("moments_dtype", "float32"), policy.training.moments_dtype
    if saved != wanted:  # the one has whole master weights, the other what bf16 parameters lack of them
        raise ValueError(f'{path}: was saved with optimizer.moments_dtype = "{saved}", not "{wanted}"; set it to "{saved}"')
    return about


def _layout(policy: Policy) -> Tree:
    return {**asdict(policy.parallel), "world_size": dist.get_world_size()}


def _named_chunks(policy: Policy) -> list[tuple[str, torch.nn.Module]]:
    """model0, model1 ...: the names that Megatron's optimizer knows them by."""
    return [(f"model{i}", chunk.module) for i, chunk in enumerate(policy.chunks)]


def _state(policy: Policy, *, loading: bool) -> tuple[Tree, list[Tree]]:
    """What is saved, each tensor with its place in the whole; and the states of the optimizer's parts that are not saved.

    Those say nothing that the policy's settings and step do not, and there are more of them where experts are parallel.
    """
    content = dict(CONTENT)  # Megatron adds this layout's groups to it
    model = {key: chunk.sharded_state_dict(metadata=content) for key, chunk in _named_chunks(policy)}
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=content)
    parts = [optimizer] if len(policy.optimizer.chained_optimizers) == 1 else [part for _, part in sorted(optimizer.items())]
    state: Tree = {"model": model, "optimizer": {f"part{i}": part.pop("param_state") for i, part in enumerate(parts)}}
    if policy.reference:
        weights = policy.reference.by_tensor()
        state["reference"] = {
            key: {
                name: replace(entry, key=f"reference.{entry.key}", data=weights[id(entry.data)])
                for name, entry in part.items()
                if isinstance(entry, ShardedTensor | ShardedTensorFactory)
            }
            for key, part in model.items()
        }
    rank, ranks = dist.get_rank(), dist.get_world_size()
    state["random"] = ShardedObject("random", None if loading else _random_state(), (ranks,), (rank,), replica_id=0)
    return state, parts


def _load_optimizer(policy: Policy, parts: list[Tree], *, moments: Tree, step: int) -> None:
    for i, part in enumerate(parts):
        part["param_state"] = moments[f"part{i}"]
        for group in part["optimizer"]["param_groups"]:
            group["step"] = step
    policy.optimizer.load_state_dict(parts[0] if len(parts) == 1 else dict(enumerate(parts)))


def _tensors(model: Tree) -> dict[str, dict[str, torch.Tensor]]:
    return {key: {name: entry.data for name, entry in part.items()} for key, part in model.items()}


def _random_state() -> Tree:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: Tree) -> None:
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    get_cuda_rng_tracker().set_states(state["megatron"])
