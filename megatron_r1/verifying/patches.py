"""Applies unified diffs as language models write them: what a hunk says counts, its line numbers are a hint.

Models miscount the numbers of a hunk's header and drop the space before an empty line of context, at which `patch` and `git apply`
refuse. Context and removed lines must still be in the file exactly, and every hunk must find its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

HUNK = re.compile(r"@@(?: -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@)?")


class DoesNotApply(ValueError):
    """The diff does not fit the files."""


@dataclass(frozen=True)
class Hunk:
    """A change of one file."""

    path: str
    line: int | None  # where the header says it begins, from 1
    lines: list[str] = field(default_factory=list)  # as written, with their marks

    def side(self, mark: str) -> list[str]:
        """The lines before ("-") or after ("+") the change. An empty line is context; at the end it is the diff's own layout."""
        end = max((i for i, line in enumerate(self.lines, 1) if line), default=0)
        return [line[1:] for line in self.lines[:end] if (line[:1] or " ") in (" ", mark)]


def apply(files: Mapping[str, str], diff: str) -> dict[str, str]:
    """The files after the diff. Raises DoesNotApply where it is no diff, or of files or lines that are not there."""
    texts = {path: lines_of(text) for path, text in files.items()}
    reached = dict.fromkeys(files, 0)  # the first line a further hunk may touch
    found = list(hunks(diff))
    if not found:
        raise DoesNotApply("no hunks")
    for hunk in found:
        if hunk.path not in texts:
            raise DoesNotApply(f"no file {hunk.path!r}")
        lines, old, new = texts[hunk.path], hunk.side("-"), hunk.side("+")
        moved = len(lines) - len(lines_of(files[hunk.path]))  # how far the hunks before have shifted the rest
        start = _place(lines, hunk, first=reached[hunk.path], moved=moved)
        lines[start : start + len(old)] = new
        reached[hunk.path] = start + len(new)
    changed = {hunk.path for hunk in found}
    return {path: joined(texts[path], like=text) if path in changed else text for path, text in files.items()}


def lines_of(text: str) -> list[str]:
    """The lines without their ends. Python's splitlines would end some within a string, as at U+2028."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def joined(lines: list[str], *, like: str) -> str:
    """The lines as a text whose line ends, the last among them, are those of another."""
    end = "\r\n" if "\r\n" in like else "\n"
    return end.join(lines) + (end if lines and (not like or like.endswith("\n")) else "")


def hunks(diff: str) -> Iterator[Hunk]:
    """The hunks of a diff, in order. Raises DoesNotApply for one without its file."""
    lines = lines_of(diff)
    path, hunk = "", None
    for line, following in pairwise([*lines, ""]):
        header = HUNK.match(line)
        if header and not path:
            raise DoesNotApply(f"a hunk before any file: {line}")
        is_file = line.startswith("--- ") and following.startswith("+++ ")
        if hunk and (header or is_file):
            yield hunk
        if is_file:
            path, hunk = _path(following), None
        elif header:
            hunk = Hunk(path, int(header[1]) if header[1] else None)
        elif hunk and line[:1] in ("", " ", "-", "+"):  # not what git says of a file
            hunk.lines.append(line)
    if hunk:
        yield hunk


def _place(lines: list[str], hunk: Hunk, *, first: int, moved: int) -> int:
    """The index its old lines stand at, the nearest to where the header says; a hunk that only adds goes behind that line."""
    expected = first if hunk.line is None else max(hunk.line - 1, 0) + moved
    old = hunk.side("-")
    if not old:
        return min(max(expected + bool(hunk.line), first), len(lines))
    places = [i for i in range(first, len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
    if not places:
        raise DoesNotApply(f"{hunk.path}: lines not found: {old[0]!r} ...")
    return min(places, key=lambda i: abs(i - expected))


def _path(line: str) -> str:
    return line.removeprefix("+++ ").split("\t")[0].strip().removeprefix("b/")
