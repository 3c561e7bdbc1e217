"""1.0 if the program a completion ends with passes all of its problem's tests (R1's code reward: compiler and tests; Nature 645, 633).

The program is the last fenced block of the conclusion, in Python. The problem's answer is a JSON object of one of two forms:

    {"cases": [{"stdin": "1 2\\n", "stdout": "3\\n"}, ...]}             a program that reads and writes
    {"assertions": "assert add(1, 2) == 3", "prelude": "import math"}  functions; `prelude` (optional) runs before the program

Each case has a process of its own. Output is compared line by line, without white space at the ends of lines and of the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_r1.problem import Problem
from megatron_r1.verifying import assertions, sandbox
from megatron_r1.verifying.completion import code_blocks


@dataclass(frozen=True)
class Tests:
    """What a program must do: `cases`, or `assertions`."""

    cases: tuple[tuple[str, str], ...] = ()  # (stdin, stdout)
    assertions: str = ""
    prelude: str = ""


def reward(
    completion: str,
    problem: Problem,
    *,
    seconds: float = 6.0,
    cpu_seconds: int = 4,
    memory_mib: int = 1024,
    unsafe: bool = False,
) -> float:
    """1.0 or 0.0; limits are of one run, and `rewards.timeout_seconds` must hold all the cases' runs.

    unsafe: runs the program without a sandbox. Raises ValueError for an answer that is not tests.
    """
    tests = parse(problem.answer)
    program = last_program(completion)
    if program is None:
        return 0.0
    limits = sandbox.Limits(seconds=seconds, cpu_seconds=cpu_seconds, memory_bytes=memory_mib << 20)
    if tests.assertions:
        return float(assertions.passes([tests.prelude, program, tests.assertions], limits=limits, unsafe=unsafe))
    for stdin, stdout in tests.cases:
        command = [*sandbox.PYTHON, "program.py"]
        result = sandbox.run(command, stdin=stdin, files={"program.py": program}, limits=limits, unsafe=unsafe)
        if not result.is_success or _lines(result.stdout) != _lines(stdout):
            return 0.0
    return 1.0


def check(*, unsafe: bool = False, **_: Any) -> None:
    """ValueError where programs cannot run; asked before the first one."""
    if not unsafe:
        sandbox.check()


def last_program(completion: str) -> str | None:
    """The last fenced block, if it is Python or does not say what it is."""
    blocks = code_blocks(completion)
    return blocks[-1].text if blocks and blocks[-1].is_python else None


@lru_cache(maxsize=256)
def parse(answer: str) -> Tests:
    """The tests of an answer. Raises ValueError for any other text: it is the data that is wrong, not the completion."""
    form = 'write {"cases": [{"stdin": "...", "stdout": "..."}]} or {"assertions": "...", "prelude": "..."}'
    try:
        value = json.loads(answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"code tests: not JSON ({error.msg} at character {error.pos}); {form}") from None
    if not isinstance(value, dict):
        raise ValueError(f"code tests: a JSON {type(value).__name__}; {form}")
    given = {key: entry for key, entry in value.items() if entry is not None}  # tables fill what a row lacks with null
    if set(given) == {"cases"}:
        cases = given["cases"]
        good = isinstance(cases, list) and cases and all(isinstance(c, dict) and _is_text(c, "stdin", "stdout") for c in cases)
        if good:
            return Tests(cases=tuple((c["stdin"], c["stdout"]) for c in cases))
        raise ValueError(f'code tests: "cases" must be a list of objects with the texts "stdin" and "stdout"; {form}')
    if "assertions" in given and set(given) <= {"assertions", "prelude"} and _is_text(given, *given) and given["assertions"].strip():
        return Tests(**given)
    raise ValueError(f"code tests: with {', '.join(map(repr, given)) or 'nothing'}; {form}")


def _is_text(row: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(row.get(key), str) for key in keys)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
