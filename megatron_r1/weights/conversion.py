"""Carry out a conversion: streams in, known places of files out, from several threads, in memory for rows.

The target is written as `.<name>.partial` beside itself and renamed when every byte is on the disk, so under its own
name it is whole. A ledger says what is done: a run that was killed goes on from there, and ends with the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_r1.weights.hf import check_target
from megatron_r1.weights.ledger import WHOLE, Ledger, Line, hasher
from megatron_r1.weights.ledger import read as read_ledger
from megatron_r1.weights.progress import Progress
from megatron_r1.weights.streams import Files, Stream, height, is_finite, row_bytes, tensor_bytes

RUN_BYTES = 2**20  # of a tensor at a time: enough for the disk, little for the cache
SETTLE_BYTES = 2**29  # written between two entries in the ledger
AHEAD = 64  # tasks that are handed out, so that the workers go on while the disk settles
MALLOC = {"trim threshold": (-1, 2**30), "mmap threshold": (-3, 2**30), "arenas": (-8, 1)}  # of mallopt(3), by its numbers
BASE_BYTES = 350 * 2**20  # Python and torch


@dataclass(frozen=True)
class Output:
    """A tensor's place in the target."""

    name: str
    file: str
    offset: int
    stream: Stream

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return height(self.stream.shape) * row_bytes(self.stream)


@dataclass(frozen=True)
class Task:
    """What one worker writes in one go, in this order, after it has found each pair of `same` equal."""

    outputs: list[Output]
    same: list[tuple[Stream, Stream]] = field(default_factory=list)


@dataclass
class Plan:
    """A whole conversion. The places depend on the source and the options only, never on the run."""

    what: str
    sources: list[Path]  # files with tensors
    sizes: dict[str, int]  # files of the target that hold tensors
    frames: dict[str, list[tuple[int, bytes]]]  # what they hold besides
    tasks: list[Task]
    small: dict[str, bytes]  # other files of the target
    files: Files
    notes: list[str] = field(default_factory=list)

    @property
    def output_bytes(self) -> int:
        """Disk that the target needs."""
        return sum(self.sizes.values()) + sum(map(len, self.small.values()))

    def about(self) -> dict[str, Any]:
        """The identity of the conversion: another source or option is another one."""
        places = [(o.name, o.file, o.offset, str(o.stream.dtype), o.stream.shape) for task in self.tasks for o in task.outputs]
        small = {name: hashlib.blake2b(data).hexdigest() for name, data in sorted(self.small.items())}
        digest = hashlib.blake2b(json.dumps([places, small], default=str).encode(), digest_size=16).hexdigest()
        stats = [(path, path.stat()) for path in self.sources]
        return {"what": self.what, "plan": digest, "sources": [[str(p), s.st_size, s.st_mtime_ns] for p, s in stats]}

    def peak_bytes(self, workers: int) -> int:
        """Memory it needs at most, estimated: a few runs of rows a worker, or the largest tensor that is made whole."""
        largest = max((_held_bytes(o.stream) for task in self.tasks for o in task.outputs), default=0)
        return BASE_BYTES + workers * (32 * RUN_BYTES + largest) + 3 * sum(map(len, self.small.values()))

    def describe(self, workers: int) -> str:
        """What --dry-run prints."""
        tensors = sum(len(task.outputs) for task in self.tasks)
        read = sum(path.stat().st_size for path in self.sources)
        lines = [
            f"{self.what}: {tensors} tensors, {_gb(read)} to read, {_gb(self.output_bytes)} to write in {len(self.sizes)} files",
            f"memory at most about {_gb(self.peak_bytes(workers))} with {workers} workers, disk {_gb(self.output_bytes)}",
        ]
        return "\n".join(lines + self.notes)


def run(plan: Plan, target: Path, *, workers: int, resume: bool, overwrite: bool, allow_nan: bool = False) -> Path:
    """Write the target. Raises ValueError, and leaves what is done for --resume, where the source or the disk will not do."""
    try:
        return _run(plan, target, workers=workers, resume=resume, overwrite=overwrite, allow_nan=allow_nan)
    except OSError as error:
        raise ValueError(f"{error.filename or target}: {error.strerror or error}; mend it and go on with --resume") from None
    finally:
        plan.files.close()


def _run(plan: Plan, target: Path, *, workers: int, resume: bool, overwrite: bool, allow_nan: bool) -> Path:
    about = plan.about()
    if resume and (target / WHOLE).is_file() and read_ledger(target)[0] == about:
        print(f"{target}: is whole already")
        return target
    target = check_target(target, overwrite=overwrite)
    partial = target.with_name(f".{target.name}.partial")
    if overwrite:
        shutil.rmtree(partial, ignore_errors=True)
    elif partial.exists() and not resume:
        raise ValueError(f"{partial}: half of a conversion is there; use --resume to go on or --overwrite to start anew")
    partial.mkdir(parents=True, exist_ok=True)
    _check_disk(plan, partial)
    ledger = Ledger(partial, about)
    try:
        _prepare(plan, partial)
        _write_all(plan, partial, ledger, workers=workers, allow_nan=allow_nan)
        ledger.finish(about)
    finally:
        ledger.close()
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _settle_folder(target.parent)
    return target


def _check_disk(plan: Plan, partial: Path) -> None:
    there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    needed, free = plan.output_bytes - there, shutil.disk_usage(partial).free
    if needed > free:
        if there == 0:
            partial.rmdir()
        raise ValueError(f"{partial.parent}: {_gb(free)} of disk are free, {_gb(needed)} are needed; make room or name another folder")


def _prepare(plan: Plan, partial: Path) -> None:
    """Files of their final size, with everything in them but the tensors."""
    for name, data in plan.small.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, size in plan.sizes.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(size)
        for offset, data in plan.frames.get(name, ()):
            plan.files.write(path, offset, data)
    for path in [partial / name for name in (*plan.small, *plan.sizes)]:
        plan.files.settle(path)


def _write_all(plan: Plan, partial: Path, ledger: Ledger, *, workers: int, allow_nan: bool) -> None:
    todo = [task for task in plan.tasks if any(output.name not in ledger.done for output in task.outputs)]
    total = sum(output.nbytes for task in plan.tasks for output in task.outputs)
    left = sum(output.nbytes for task in todo for output in task.outputs)
    progress, stop = Progress(plan.what, total=total, done=total - left), threading.Event()
    unsettled: list[Line] = []

    def work(task: Task) -> list[Line]:
        return [] if stop.is_set() else _write(task, partial, files=plan.files, progress=progress, allow_nan=allow_nan)

    def settle() -> None:
        for file in {line.file for line in unsettled}:
            plan.files.settle(partial / file)
        ledger.add(unsettled)
        unsettled.clear()

    torch.set_num_threads(1)
    _keep_freed_memory()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for lines in _in_any_order(pool, work, todo, ahead=AHEAD):
                unsettled += lines
                if sum(line.bytes for line in unsettled) > SETTLE_BYTES:
                    settle()
        finally:
            stop.set()
            settle()
    progress.finish()


def _in_any_order(pool: ThreadPoolExecutor, work: Any, tasks: list[Task], *, ahead: int) -> Iterator[list[Line]]:
    running: set[Future] = set()
    for task in tasks:
        running.add(pool.submit(work, task))
        if len(running) >= ahead:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    for future in running:
        yield future.result()


def _write(task: Task, partial: Path, *, files: Files, progress: Progress, allow_nan: bool) -> list[Line]:
    for one, other in task.same:
        _check_same(one, other)
    lines = []
    for output in task.outputs:
        digest, written = hasher(), 0
        for values in runs(output.stream):
            if not allow_nan and not is_finite(values):
                raise ValueError(f"tensor {output.stream.name}: holds NaN or infinity; use --allow-nan to convert it all the same")
            data = tensor_bytes(values)
            digest.update(data)
            files.write(partial / output.file, output.offset + written, data)
            written += len(data)
            progress.add(len(data))
        assert written == output.nbytes, f"{output.name=} {written=}"
        lines.append(Line(output.file, output.offset, written, output.name, digest.hexdigest()))
    return lines


def _check_same(one: Stream, other: Stream) -> None:
    for a, b in zip(runs(one), runs(other), strict=True):
        if tensor_bytes(a) != tensor_bytes(b):
            raise ValueError(f"tensor {other.name}: is not the copy of {one.name} that Megatron takes it for; mend the checkpoint")


def runs(stream: Stream) -> Iterator[torch.Tensor]:
    """All rows of a stream, about RUN_BYTES at a time."""
    rows, step = height(stream.shape), max(1, RUN_BYTES // max(1, row_bytes(stream)))
    step = -(-step // stream.multiple) * stream.multiple
    for start in range(0, rows, step):
        yield stream.rows(start, min(rows, start + step))


def verify(folder: Path) -> int:
    """Read a converted folder again and compare every tensor's hash; the number of tensors. Raises ValueError for the first wrong one."""
    _, lines = read_ledger(folder)
    progress = Progress("verify", total=sum(line.bytes for line in lines), done=0)
    try:
        with closing(Files()) as files:
            for line in lines:
                _check_hash(line, folder, files=files, progress=progress)
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror or error}; convert again") from None
    progress.finish()
    return len(lines)


def _check_hash(line: Line, folder: Path, *, files: Files, progress: Progress) -> None:
    digest = hasher()
    for start in range(0, line.bytes, RUN_BYTES):
        data = torch.empty(min(RUN_BYTES, line.bytes - start), dtype=torch.uint8)
        files.read(folder / line.file, line.offset + start, data)
        digest.update(tensor_bytes(data))
        progress.add(len(data))
    if digest.hexdigest() != line.hash:
        raise ValueError(f"{folder / line.file}: tensor {line.name} is not what was written; convert again")


def _held_bytes(stream: Stream) -> int:
    """Of a stream that is made whole: what it is made of, and itself."""
    source = getattr(stream, "source", None)
    if source is not None:
        return _held_bytes(source)
    return 3 * math.prod(stream.shape) * stream.dtype.itemsize if hasattr(stream, "make") else 0


def _keep_freed_memory() -> None:
    """Let a run of rows have the memory of the one before. Else glibc gives it back, and clearing pages takes half of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    for option, value in MALLOC.values() if mallopt else ():
        mallopt(option, value)


def _settle_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
