"""1.0 if a repository's unit tests pass once a completion's changes are made (R1's bug fixing: issue, source, tests; Nature 645, 633).

The problem's answer is a JSON object of texts by path, the source with its bug and the tests of the fixed one:

    {"files": {"shop/cart.py": "..."}, "tests": {"test_cart.py": "..."}}

Each file of tests has TestCases or functions test_* without parameters, and runs in a process of its own, in the folder of the
files; fixtures of pytest are not there. The fenced blocks of the conclusion change the files, in order:

    ```diff                    a unified diff, of one file or several
    ```python shop/cart.py     the whole new text of that file; the path may be left out where there is one file, and so may the language
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_r1.problem import Problem
from megatron_r1.verifying import assertions, patches, sandbox
from megatron_r1.verifying.completion import code_blocks

FORM = 'write {"files": {"folder/name.py": "..."}, "tests": {"test_name.py": "..."}}'


@dataclass(frozen=True)
class Repository:
    """Texts by path."""

    files: dict[str, str]
    tests: dict[str, str]


def reward(
    completion: str,
    problem: Problem,
    *,
    seconds: float = 6.0,
    cpu_seconds: int = 4,
    memory_mib: int = 1024,
    unsafe: bool = False,
) -> float:
    """1.0 or 0.0, the latter also for changes that do not apply or none; limits are of one file of tests.

    unsafe: runs the tests without a sandbox. Raises ValueError for an answer that is not a repository.
    """
    repository = parse(problem.answer)
    try:
        files = changed(repository.files, completion)
    except patches.DoesNotApply:
        return 0.0
    limits = sandbox.Limits(seconds=seconds, cpu_seconds=cpu_seconds, memory_bytes=memory_mib << 20)
    return float(
        all(
            assertions.passes([text, assertions.RUN_UNIT_TESTS], files=files, limits=limits, unsafe=unsafe)
            for text in repository.tests.values()
        )
    )


def check(*, unsafe: bool = False, **_: Any) -> None:
    """ValueError where programs cannot run; asked before the first one."""
    if not unsafe:
        sandbox.check()


def changed(files: Mapping[str, str], completion: str) -> dict[str, str]:
    """The files with the completion's changes. Raises DoesNotApply for none, or one to a file that does not exist."""
    new, named = dict(files), False
    only = next(iter(files)) if len(files) == 1 else ""
    for block in code_blocks(completion):
        first, last = (block.info[0].lower(), block.info[-1]) if block.info else ("", "")
        if first in ("diff", "patch"):
            new, named = patches.apply(new, block.text), True
        elif last in files:
            new[last], named = block.text, True
        elif block.is_python and len(block.info) >= 2:
            raise patches.DoesNotApply(f"no file {last!r}")
        elif only and (block.is_python or only.endswith(f".{first}")) and not (named and not first):
            new[only] = block.text  # else a command, or what one prints, as a block without a name is after one with
    if new == files and not named:
        raise patches.DoesNotApply("no changes")
    return new


@lru_cache(maxsize=256)
def parse(answer: str) -> Repository:
    """The repository of an answer. Raises ValueError for any other text: it is the data that is wrong, not the completion."""
    try:
        value = json.loads(answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"bug fix: not JSON ({error.msg} at character {error.pos}); {FORM}") from None
    if not isinstance(value, dict) or set(value) != {"files", "tests"}:
        raise ValueError(f"bug fix: not an object of just files and tests; {FORM}")
    for name in ("files", "tests"):
        texts = value[name]
        if not isinstance(texts, dict) or not texts or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"bug fix: {name!r} is not an object of texts; {FORM}")
    for path in value["files"]:
        sandbox.check_path(path)
    return Repository(value["files"], value["tests"])
