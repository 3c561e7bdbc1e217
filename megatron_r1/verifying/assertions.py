"""Python tests of somebody else's program, run so that the program cannot talk its way to a pass.

Tests and program share an interpreter in the sandbox, as in every grader of this kind. The tests are never on its disk, the
verdict is a secret that is written only after the last of them, and to end early is to fail. A program that rewrites the
interpreter under its tests (patches unittest, walks the stack's frames) is not held.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence

from megatron_r1.verifying import sandbox

# The module's name is "program", so what stands under `if __name__ == "__main__":` does not run.
HARNESS = """
import json, os, sys, types

def main():
    job = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    verdict = os.dup(1)
    sys.path.insert(0, os.getcwd())
    module = types.ModuleType("program")
    sys.modules["program"] = module
    for number, text in enumerate(job["texts"]):
        exec(compile(text, f"<text {number}>", "exec"), module.__dict__)
    sys.stdout.flush()
    os.write(verdict, job["secret"].encode())
    os._exit(0)

main()
"""

# After a file of unit tests: its TestCases and its functions test_*, at least one, all passing.
RUN_UNIT_TESTS = """
import inspect as _inspect, sys as _sys, unittest as _unittest

_module = _sys.modules[__name__]
_suite = _unittest.defaultTestLoader.loadTestsFromModule(_module)
_suite.addTests(
    _unittest.FunctionTestCase(f)
    for name, f in list(vars(_module).items())
    if name.startswith("test_") and _inspect.isfunction(f) and f.__module__ == __name__
)
_result = _unittest.TextTestRunner(stream=_sys.stderr).run(_suite)
if not _result.testsRun or not _result.wasSuccessful():
    _sys.exit("failed")
"""


def passes(texts: Sequence[str], *, files: Mapping[str, str] | None = None, limits: sandbox.Limits, unsafe: bool = False) -> bool:
    """Whether the texts (program, then tests) run to their end one after the other in one module, among `files`."""
    secret = secrets.token_hex(16)
    job = json.dumps({"texts": list(texts), "secret": secret})
    result = sandbox.run([*sandbox.PYTHON, "-c", HARNESS], stdin=job, files=files, limits=limits, unsafe=unsafe)
    return result.is_success and result.stdout.endswith(secret)
