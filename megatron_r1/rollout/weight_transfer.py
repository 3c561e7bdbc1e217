"""The trainer's side of vLLM's native weight-transfer API: one sender a backend, all with the same three calls.

gloo and file are our own engines (vllm_engines.py) and need no GPU; nccl and ipc drive vLLM's trainer classes. vLLM is imported
only for those two: on a CPU the trainer adapts torch.cuda for Megatron, and vLLM must not see that.
"""

from __future__ import annotations

import base64
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import torch
from safetensors.torch import save_file

from megatron_r1.processes import free_port
from megatron_r1.rollout import wire
from megatron_r1.rollout.engine import EngineError
from megatron_r1.rollout.servers import Servers

BUCKET_SECONDS = 60.0  # for one bucket to reach all workers
POLL_SECONDS = 0.001


class Sender(Protocol):
    """Moves buckets of weights to every worker of every server."""

    def connect(self, world_sizes: Sequence[int]) -> None:
        """Open the way to the servers' workers, `world_sizes[i]` of them at server i; again after a server restarted."""

    def send(self, bucket: list[wire.Named]) -> None:
        """Return once every worker has the bucket."""

    def close(self) -> None: ...


def make_sender(backend: str, servers: Servers, *, rank: int = 0, folder: Path | None = None) -> Sender:
    """The sender of rollout.weight_transfer = `backend`. `folder` is the shared folder of "file"."""
    if backend == "gloo":
        return GlooSender(servers)
    if backend == "file":
        if folder is None:
            raise ValueError('rollout.weight_transfer = "file": needs a folder that trainer and servers share')
        return FileSender(servers, folder)
    if backend in ("nccl", "ipc"):
        return DeviceSender(backend, servers, rank=rank)
    raise ValueError(f'rollout.weight_transfer = {backend!r}: not a backend; use "gloo", "file", "nccl" or "ipc"')


def local_address(servers: Servers) -> str:
    """The address under which the servers reach this process."""
    host = urlparse(servers.urls[0]).hostname or ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent: the kernel only picks a route
        probe.connect((host, 9))
        return probe.getsockname()[0]


def rank_offsets(world_sizes: Sequence[int]) -> list[int]:
    """First rank of each server's workers; rank 0 is the trainer."""
    return [1 + n for n in accumulate(world_sizes, initial=0)][:-1]


def watch(theirs: Future[Any], ours: Callable[[], bool], limit_seconds: float) -> None:
    """Wait until our half of an exchange is done; a server that fails its half ends the wait at once.

    Nothing here blocks inside torch.distributed: a trainer that gives up must also be able to exit.
    """
    limit = time.monotonic() + limit_seconds
    while not ours():
        if theirs.done():
            theirs.result()
        if time.monotonic() > limit:
            raise EngineError(f"weight transfer: no answer of the servers' workers within {limit_seconds:g} s; see the servers' logs")
        time.sleep(POLL_SECONDS)


class GlooSender:
    """Rank 0 of a gloo group of this process and all workers; one broadcast a bucket."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.limit_seconds = min(BUCKET_SECONDS, servers.limit_seconds)
        self.group: Any = None

    def connect(self, world_sizes: Sequence[int]) -> None:
        self.close()
        limit, workers = self.limit_seconds, sum(world_sizes)
        host = local_address(self.servers)
        self.store = wire.listen(host, limit_seconds=limit)
        common = {"host": host, "port": self.store.port, "world_size": 1 + workers, "limit_seconds": limit}
        bodies = [{"init_info": common | {"rank_offset": offset}} for offset in rank_offsets(world_sizes)]
        theirs = self.servers.all("/init_weight_transfer_engine", bodies)
        watch(theirs, lambda: wire.arrived(self.store) == workers, limit)
        self.group = wire.gloo_group(self.store, rank=0, world_size=1 + workers, limit_seconds=limit)
        theirs.result()

    def send(self, bucket: list[wire.Named]) -> None:
        flat = wire.pack(bucket)
        theirs = self.servers.all("/update_weights", [{"update_info": wire.describe(bucket)}] * len(self.servers.urls))
        work = wire.broadcast(self.group, flat)
        watch(theirs, work.is_completed, self.limit_seconds)
        theirs.result()  # says more than the group does when a server died
        work.wait()

    def close(self) -> None:
        self.group = self.store = None


class FileSender:
    """A safetensors file a bucket, deleted when all workers have read it."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers = servers
        self.folder = folder

    def connect(self, world_sizes: Sequence[int]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.servers.all("/init_weight_transfer_engine", [{"init_info": {"root": str(self.folder)}}] * len(world_sizes)).result()

    def send(self, bucket: list[wire.Named]) -> None:
        file = self.folder / "bucket.safetensors"
        # copies: safetensors refuses tensors that share storage, as slices of a fused weight do
        save_file({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in bucket}, file)
        self.servers.all("/update_weights", [{"update_info": {"file": file.name}}] * len(self.servers.urls)).result()
        file.unlink()

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Bucket:
    """One bucket as vLLM's trainer classes take weights: iterable, with its metadata known beforehand."""

    tensors: list[wire.Named] = field(default_factory=list)

    @dataclass(frozen=True)
    class Meta:
        name: str
        dtype: torch.dtype
        shape: tuple[int, ...]

    def metadata(self) -> list[Meta]:
        return [self.Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

    def __iter__(self) -> Iterator[wire.Named]:
        return iter(self.tensors)


class DeviceSender:
    """nccl and ipc: vLLM's own trainer classes, one round a bucket. They take this object as their client.

    Every trainer rank makes each call with ipc, whose workers read the memory of the rank on their own GPU; rank 0 alone with nccl.
    """

    def __init__(self, backend: str, servers: Servers, *, rank: int) -> None:
        if torch.version.cuda is None or not torch.cuda.is_available():
            raise ValueError(f'rollout.weight_transfer = {backend!r}: needs CUDA, and there is none here; set "gloo" or "file"')
        self.backend, self.servers, self.rank = backend, servers, rank
        self.source = Bucket()
        self.engine: Any = None

    def connect(self, world_sizes: Sequence[int]) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self.close()
        self.offsets = rank_offsets(world_sizes)
        if self.backend == "nccl":
            host, port = local_address(self.servers), free_port()
            info = NCCLTrainerInitInfo(rank=self.rank, master_address=host, master_port=port, world_size=1 + sum(world_sizes))
        else:
            info = IPCTrainerInitInfo(rank=self.rank, packed=True)
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=self, source=self.source)

    def send(self, bucket: list[wire.Named]) -> None:
        self.source.tensors = [(name, tensor.detach().cuda()) for name, tensor in bucket]
        self.engine.send_weights()
        self.source.tensors = []

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """vLLM's client protocol: one init_info for all servers; only the first ranks of their workers differ."""
        ranks = [{"rank_offset": offset} if "rank_offset" in init_info else {} for offset in self.offsets]
        self.servers.all("/init_weight_transfer_engine", [{"init_info": init_info | rank} for rank in ranks]).result()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = update_info.pop("ipc_handles", None)
        if handles is not None:
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self.servers.all("/update_weights", [{"update_info": update_info}] * len(self.servers.urls)).result()

    def start_weight_update(self) -> None:
        """The whole update is started once, by VLLMServers, not once a bucket."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """As start_weight_update."""
