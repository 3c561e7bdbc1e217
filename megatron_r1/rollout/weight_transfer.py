"""The trainer's side of vLLM's native weight-transfer API: one kind of sender a backend, all with the same calls.

gloo, nccl and file have engines of ours in vLLM (vllm_engines.py); gloo and nccl are one code, with another group. ipc drives vLLM's
trainer class. vLLM is imported for that alone: on a CPU the trainer adapts torch.cuda for Megatron, and vLLM must not see that.
"""

from __future__ import annotations

import base64
import contextlib
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate, count, zip_longest
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import torch
from safetensors.torch import save_file

from megatron_r1.rollout import wire
from megatron_r1.rollout.engine import ALONE, EngineError, Ranks
from megatron_r1.rollout.servers import Servers
from megatron_r1.rollout.weight_buckets import BUCKET_BYTES
from megatron_r1.weights.division import Division

BUCKET_SECONDS = 60.0  # for one bucket to reach all workers
NUMBERS = count()  # of this process's meetings
Round = tuple[Future[Any] | None, torch.Tensor | None, Any]  # the servers' answers, the bytes on their way, and the work that brings them


@dataclass(frozen=True)
class Meeting:
    """Where the trainer's senders and the servers' workers meet. A new one has a new number."""

    number: int
    host: str = ""
    port: int = 0
    workers: int = 0  # of all servers


class Sender(Protocol):
    """Moves buckets of weights to every worker of every server. Rank 0 makes all calls, the other ranks `join` and `send`."""

    def meet(self, world_sizes: Sequence[int], *, senders: int) -> Meeting:
        """Call the servers' workers, `world_sizes[i]` of them at server i, together; again after a server restarted."""

    def join(self, meeting: Meeting, division: Division) -> None:
        """Open the way from this rank, sender number `division.mine`; once for each meeting."""

    def send(self, buckets: Iterable[list[wire.Named]], others: Sequence[Iterable[wire.Described]]) -> None:
        """Return once every worker has all buckets. `others` is on rank 0 what each other sender says of its buckets."""

    def close(self) -> None: ...


def make_sender(backend: str, servers: Servers, *, ranks: Ranks = ALONE, folder: Path | None = None) -> Sender:
    """The sender of rollout.weight_transfer = `backend` on one of `ranks`. `folder` is the shared folder of "file"."""
    if backend in ("nccl", "ipc") and (torch.version.cuda is None or not torch.cuda.is_available()):
        raise ValueError(f'rollout.weight_transfer = {backend!r}: needs CUDA, and there is none here; set "gloo" or "file"')
    if backend in ("gloo", "nccl"):
        return GroupSender(servers, rank=ranks.rank(), device="cpu" if backend == "gloo" else "cuda")
    if backend == "file":
        if folder is None:
            raise ValueError('rollout.weight_transfer = "file": needs a folder that trainer and servers share')
        return FileSender(servers, folder)
    if backend == "ipc":
        return IpcSender(servers, ranks=ranks)
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


def watch(theirs: Future[Any] | None, ours: Callable[[], bool], limit_seconds: float) -> None:
    """Wait until our half of an exchange is done; a server that fails its half ends the wait at once.

    Nothing here blocks inside torch.distributed: a trainer that gives up must also be able to exit.
    """
    limit = time.monotonic() + limit_seconds
    while not ours():
        if theirs is not None and theirs.done():
            theirs.result()
        if time.monotonic() > limit:
            raise EngineError(f"weight transfer: no answer of the servers' workers within {limit_seconds:g} s; see the servers' logs")
        time.sleep(wire.POLL_SECONDS)


@contextlib.contextmanager
def group_errors() -> Iterator[None]:
    """What torch.distributed says when a peer is gone, as the error of a server."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"weight transfer: {str(error).splitlines()[0]}; see the servers' logs") from error


class GroupSender:
    """Rank 0 of a group of this rank and all workers: one broadcast a bucket, and the next bucket is made while it is on its way.

    Senders do not wait for each other. Rank 0 tells the servers, once a round, what comes from whom.
    """

    def __init__(self, servers: Servers, *, rank: int, device: str = "cpu") -> None:
        self.servers, self.rank, self.device = servers, rank, device
        self.limit_seconds = min(BUCKET_SECONDS, servers.limit_seconds)
        self.meeting: Meeting | None = None
        self.store: Any = None
        self.group: Any = None

    def meet(self, world_sizes: Sequence[int], *, senders: int) -> Meeting:
        self.close()
        limit, workers = self.limit_seconds, sum(world_sizes)
        host = local_address(self.servers)
        self.store = wire.listen(host, limit_seconds=limit)
        common = {"host": host, "port": self.store.port, "senders": senders, "world_size": 1 + workers, "limit_seconds": limit}
        bodies = [{"init_info": common | {"rank_offset": offset}} for offset in rank_offsets(world_sizes)]
        self.theirs = self.servers.all("/init_weight_transfer_engine", bodies)
        return Meeting(next(NUMBERS), host, self.store.port, workers)

    def join(self, meeting: Meeting, division: Division) -> None:
        if division.mine is None or meeting == self.meeting:
            return
        limit = self.limit_seconds
        if self.rank == 0:
            watch(self.theirs, lambda: wire.arrived(self.store) == meeting.workers, limit)
        of_all = {"rank": 0, "world_size": 1 + meeting.workers, "device": self.device, "limit_seconds": limit}
        with group_errors():
            if self.rank > 0:
                self.store = wire.visit(meeting.host, meeting.port, limit_seconds=limit)
            self.group = wire.make_group(self.store, sender=division.mine, **of_all)
        if self.rank == 0:
            self.theirs.result()
        self.meeting = meeting

    def send(self, buckets: Iterable[list[wire.Named]], others: Sequence[Iterable[wire.Described]]) -> None:
        if self.group is None:  # this rank only takes part in the gathering
            for _ in buckets:
                pass
            return
        last = None
        try:
            for bucket, *theirs in zip_longest(buckets, *others):
                flat = wire.pack(bucket, device=self.device) if bucket else None
                if last is not None:
                    self._wait(*last)
                last = self._start(flat, [wire.describe(bucket) if bucket else None, *theirs])
            if last is not None:
                self._wait(*last)
        except EngineError:
            self.close()  # now, while `last` holds the bytes: on a GPU a broadcast that lost a peer reads them until it is aborted
            raise

    def _start(self, flat: torch.Tensor | None, parts: list[wire.Described | None]) -> Round:
        theirs = None
        if self.rank == 0:
            theirs = self.servers.all("/update_weights", [{"update_info": {"parts": parts}}] * len(self.servers.urls))
        with group_errors():
            return theirs, flat, None if flat is None else wire.broadcast(self.group, flat)

    def _wait(self, theirs: Future[Any] | None, flat: torch.Tensor | None, work: Any) -> None:
        if work is not None:
            watch(theirs, work.is_completed, self.limit_seconds)
        if theirs is not None:
            theirs.result()  # says more than the group does when a server died
        if work is not None:
            with group_errors():
                work.wait()

    def close(self) -> None:
        if self.group is not None:
            self.group.abort()
        self.group = self.store = self.meeting = None


class FileSender:
    """A safetensors file a bucket, deleted when all workers have read it."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers = servers
        self.folder = folder

    def meet(self, world_sizes: Sequence[int], *, senders: int) -> Meeting:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.servers.all("/init_weight_transfer_engine", [{"init_info": {"root": str(self.folder)}}] * len(world_sizes)).result()
        return Meeting(next(NUMBERS))

    def join(self, meeting: Meeting, division: Division) -> None:
        """The folder is all there is."""

    def send(self, buckets: Iterable[list[wire.Named]], others: Sequence[Iterable[wire.Described]]) -> None:
        file = self.folder / "bucket.safetensors"
        for bucket in buckets:
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


class IpcSender:
    """vLLM's own trainer class, one round a bucket, with this object as its client; its workers read the memory of the rank on their GPU.

    Every rank has all weights and makes each call.
    """

    def __init__(self, servers: Servers, *, ranks: Ranks) -> None:
        self.servers, self.ranks = servers, ranks
        self.source = Bucket()
        self.failure: EngineError | None = None  # of the servers, in this round
        self.meeting: Meeting | None = None
        self.engine: Any = None

    def meet(self, world_sizes: Sequence[int], *, senders: int) -> Meeting:
        return Meeting(next(NUMBERS), workers=sum(world_sizes))

    def join(self, meeting: Meeting, division: Division) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        if meeting == self.meeting:
            return
        self.close()
        largest = max((tensor.nbytes for part in division.parts for tensor in part), default=0)  # vLLM takes none beyond its buffer
        info = IPCTrainerInitInfo(rank=self.ranks.rank(), packed=True, packed_buffer_size_bytes=max(BUCKET_BYTES, largest))
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=self, source=self.source)
        self.meeting = meeting

    def send(self, buckets: Iterable[list[wire.Named]], others: Sequence[Iterable[wire.Described]]) -> None:
        for bucket in buckets:
            self.source.tensors, self.failure = [(name, tensor.detach().cuda()) for name, tensor in bucket], None
            self.engine.send_weights()
            self.source.tensors = []
            if self.ranks.any_rank(self.failure is not None):
                raise self.failure or EngineError("weight transfer: rank 0 could not hand over a bucket; see its log")

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
        self.engine = self.meeting = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """vLLM's client protocol: the same for all servers."""
        self.servers.all("/init_weight_transfer_engine", [{"init_info": init_info}] * len(self.servers.urls)).result()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = update_info.pop("ipc_handles", None)
        if handles is not None:
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        try:
            self.servers.all("/update_weights", [{"update_info": update_info}] * len(self.servers.urls)).result()
        except EngineError as error:  # raised here it would leave the other ranks in the round's collectives
            self.failure = error

    def start_weight_update(self) -> None:
        """The whole update is started once, by VLLMServers, not once a bucket."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """As start_weight_update."""
