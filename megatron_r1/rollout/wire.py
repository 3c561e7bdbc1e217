"""What trainer and workers must agree on to move weights: buckets of bytes, and the process group that carries them.

Imported on both sides, so it knows neither vLLM nor Megatron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist

ALIGNMENT = 64  # bytes: a tensor is viewed in place, so it must start where its element type may
ARRIVED = "arrived"  # key of the rendezvous
Named = tuple[str, torch.Tensor]


def buckets(weights: Iterable[Named], limit_bytes: int) -> Iterator[list[Named]]:
    """Group a stream of tensors into lists of at most `limit_bytes`; a larger tensor is a bucket of its own."""
    bucket: list[Named] = []
    filled = 0
    for name, tensor in weights:
        size = padded(tensor.numel() * tensor.element_size())
        if bucket and filled + size > limit_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += size
    if bucket:
        yield bucket


def describe(bucket: Sequence[Named]) -> dict[str, list]:
    """Names, dtypes and shapes: what the receiver needs beside the bytes. JSON-ready."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def pack(bucket: Sequence[Named]) -> torch.Tensor:
    """The bucket's bytes in one flat uint8 tensor on the CPU."""
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in bucket]
    flat = torch.empty(sum(map(padded, sizes)), dtype=torch.uint8)
    offset = 0
    for (_, tensor), size in zip(bucket, sizes, strict=True):
        flat[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        offset += padded(size)
    return flat


def receive(group: dist.ProcessGroup, names: list[str], *, dtypes: list[str], shapes: list[list[int]]) -> Iterator[Named]:
    """The other end of `pack` and `broadcast`: the bucket's tensors, as views of one fresh buffer."""
    types = [getattr(torch, name) for name in dtypes]
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, types, strict=True)]
    flat = torch.empty(sum(map(padded, sizes)), dtype=torch.uint8)
    broadcast(group, flat).wait()
    offset = 0
    for name, dtype, shape, size in zip(names, types, shapes, sizes, strict=True):
        yield name, flat[offset : offset + size].view(dtype).view(shape)
        offset += padded(size)


def broadcast(group: dist.ProcessGroup, flat: torch.Tensor) -> dist.Work:
    """From rank 0, the trainer, to all workers of all servers."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([flat], options)


def listen(host: str, *, limit_seconds: float) -> dist.TCPStore:
    """The trainer's half of a rendezvous, on a free port that it takes (`.port`)."""
    return dist.TCPStore(host, 0, is_master=True, timeout=timedelta(seconds=limit_seconds), wait_for_workers=False)


def arrived(store: dist.TCPStore) -> int:
    """How many workers are at the rendezvous."""
    return store.add(ARRIVED, 0)


def join(host: str, port: int, *, rank: int, world_size: int, limit_seconds: float) -> dist.ProcessGroup:
    """A worker's half of the rendezvous, and its group."""
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=limit_seconds))
    store.add(ARRIVED, 1)
    return gloo_group(store, rank=rank, world_size=world_size, limit_seconds=limit_seconds)


def gloo_group(store: dist.TCPStore, *, rank: int, world_size: int, limit_seconds: float) -> dist.ProcessGroup:
    """A group apart from the process's own default one; blocks until all ranks are there. Rank 0 is the trainer."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=limit_seconds)
    if store.host.startswith("127."):  # one machine: no guessing which of its addresses others can reach
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=store.host)]
    else:
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
    return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, world_size, options)


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
