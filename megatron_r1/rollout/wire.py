"""What trainer and workers must agree on to move weights: buckets of bytes, and the process group that carries them.

Imported on both sides, so it knows neither vLLM nor Megatron.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist

from megatron_r1 import gloo
from megatron_r1.weights.division import TensorInfo

ALIGNMENT = 64  # bytes: a tensor is viewed in place, so it must start where its element type may
ARRIVED = "arrived"  # key of the rendezvous
POLL_SECONDS = 0.001
Named = tuple[str, torch.Tensor]
Described = dict[str, list]  # names, dtypes and shapes of a bucket's tensors


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


def describe(bucket: Sequence[Named]) -> Described:
    """Names, dtypes and shapes: what the receiver needs beside the bytes. JSON-ready."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def shapes_only(part: Sequence[TensorInfo]) -> Iterator[Named]:
    """Tensors without bytes, of which `buckets` and `describe` make what they make of the tensors themselves."""
    for name, dtype, shape in part:
        yield name, torch.empty(shape, dtype=dtype, device="meta")


def pack(bucket: Sequence[Named], *, device: str = "cpu") -> torch.Tensor:
    """The bucket's bytes in one flat uint8 tensor."""
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in bucket]
    flat = torch.empty(sum(map(padded, sizes)), dtype=torch.uint8, device=device)
    offset = 0
    for (_, tensor), size in zip(bucket, sizes, strict=True):
        flat[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        offset += padded(size)
    return flat


def receive(groups: Sequence[dist.ProcessGroup], parts: Sequence[Described | None], *, device: str = "cpu") -> Iterator[Named]:
    """The other end of `pack` and `broadcast`, for one bucket of each sender that has one: their tensors, as views of fresh buffers."""
    coming = []
    for group, part in zip(groups, parts, strict=True):
        if part is not None:
            types = [getattr(torch, name) for name in part["dtypes"]]
            sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(part["shapes"], types, strict=True)]
            flat = torch.empty(sum(map(padded, sizes)), dtype=torch.uint8, device=device)
            coming.append((group, broadcast(group, flat), flat, zip(part["names"], types, part["shapes"], sizes, strict=True)))
    for group, work, flat, tensors in coming:
        finish(group, work)
        offset = 0
        for name, dtype, shape, size in tensors:
            yield name, flat[offset : offset + size].view(dtype).view(shape)
            offset += padded(size)


def broadcast(group: dist.ProcessGroup, flat: torch.Tensor) -> dist.Work:
    """From rank 0, the sender, to all workers of all servers."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([flat], options)


def finish(group: dist.ProcessGroup, work: dist.Work) -> None:
    """Wait until it is done; RuntimeError when a peer is gone or the group's limit is over."""
    limit = time.monotonic() + group.options._timeout.total_seconds()
    while not work.is_completed() and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)  # NCCL's own wait sleeps 10 ms at a time, in which a bucket is there
    work.wait()


@contextlib.contextmanager
def no_watchdog() -> Iterator[None]:
    """NCCL groups that are made here have none: where a peer is gone it would end the process. Instead `wait` raises, as gloo's does."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"  # torch reads it as it makes a group
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def listen(host: str, *, limit_seconds: float) -> dist.TCPStore:
    """The place where senders and workers meet, on a free port that rank 0 takes (`.port`)."""
    return dist.TCPStore(host, 0, is_master=True, timeout=timedelta(seconds=limit_seconds), wait_for_workers=False)


def visit(host: str, port: int, *, limit_seconds: float) -> dist.TCPStore:
    """The same place, for the others."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=limit_seconds))


def arrived(store: dist.TCPStore) -> int:
    """How many workers are there."""
    return store.add(ARRIVED, 0)


def join(
    store: dist.TCPStore, *, senders: int, rank: int, world_size: int, device: str = "cpu", limit_seconds: float
) -> list[dist.ProcessGroup]:
    """A worker's groups, one with each sender."""
    store.add(ARRIVED, 1)
    of_all = {"rank": rank, "world_size": world_size, "device": device, "limit_seconds": limit_seconds}
    return [make_group(store, sender=sender, **of_all) for sender in range(senders)]


def make_group(
    store: dist.TCPStore, *, sender: int, rank: int, world_size: int, device: str = "cpu", limit_seconds: float
) -> dist.ProcessGroup:
    """A group of a sender, its rank 0, and all workers, apart from the process's own default one: gloo on a CPU, NCCL on a GPU.

    With gloo it blocks until all ranks are there; NCCL waits with the first broadcast.
    """
    timeout = timedelta(seconds=limit_seconds)
    prefixed = dist.PrefixStore(f"weights{sender}", store)
    if device == "cpu":
        address = store.host if store.host.startswith("127.") else None  # one machine: no guessing which of its addresses others can reach
        return dist.ProcessGroupGloo(prefixed, rank, world_size, gloo.options(timeout, address))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with no_watchdog():
        return dist.ProcessGroupNCCL(prefixed, rank, world_size, options)


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
