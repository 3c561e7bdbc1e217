"""The record of a conversion: what it is, and for each tensor that is on the disk its place and hash.

While a conversion runs, its folder holds `ledger.partial`, a line of JSON a tensor, written when the tensor's bytes are
on the disk; a kill at any moment leaves at most half a line. A whole folder holds the same lines sorted, in `ledger.jsonl`.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

PARTIAL, WHOLE = "ledger.partial", "ledger.jsonl"


def hasher() -> Any:
    """128 bits against accidents, not against an enemy: a cryptographic hash costs more time than the disk."""
    return xxhash.xxh3_128()


@dataclass(frozen=True, order=True)
class Line:
    """A tensor, or a file as a whole, that was written."""

    file: str
    offset: int
    bytes: int
    name: str
    hash: str  # xxh3_128 of the bytes


class Ledger:
    """An open `ledger.partial`. Raises ValueError where it is another conversion's, or another process has it open."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._path = folder / PARTIAL
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another conversion is writing there; wait for it") from None
        found, lines, length = _read(self._path)
        if found is None:
            self._file.truncate(0)
            self._append([about])
        elif found != about:
            self._file.close()
            changed = ", ".join(key for key in about if found.get(key) != about[key])
            raise ValueError(f"{folder}: is half of another conversion ({changed} differs); use --overwrite to start anew")
        else:
            self._file.truncate(length)
        self.done = {line.name: line for line in lines}

    def add(self, lines: list[Line]) -> None:
        """Record tensors whose bytes are on the disk."""
        self._append([asdict(line) for line in lines])
        self.done |= {line.name: line for line in lines}

    def _append(self, entries: list[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, about: dict[str, Any]) -> None:
        """Write `ledger.jsonl`, then remove `ledger.partial`."""
        entries = [about, *(asdict(line) for line in sorted(self.done.values()))]
        with (self._path.parent / WHOLE).open("w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        self._path.unlink()
        self._file.close()

    def close(self) -> None:
        """Leave it for a later run."""
        self._file.close()


def read(folder: Path) -> tuple[dict[str, Any], list[Line]]:
    """What a whole folder holds, and its tensors. Raises ValueError where it has no ledger."""
    if not (folder / WHOLE).is_file():
        raise ValueError(f"{folder}: no {WHOLE}; it was not written by a conversion, or not to the end")
    about, lines, _ = _read(folder / WHOLE)
    if about is None:
        raise ValueError(f"{folder / WHOLE}: damaged; convert again")
    return about, lines


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Line], int]:
    """First entry, lines, and the length of the part that is whole."""
    about, lines, length = None, [], 0
    for raw in path.read_bytes().splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            break
        try:
            entry = json.loads(raw)
        except json.JSONDecodeError:
            break
        if about is None:
            about = entry
        else:
            lines.append(Line(**entry))
        length += len(raw)
    return about, lines, length
