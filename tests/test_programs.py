"""Rewards that run programs: only a program that passes every test scores, and no trick of its own makes it pass."""

from __future__ import annotations

import json
import time

import pytest
from processes import is_soon, running

from megatron_r1.problem import Problem
from megatron_r1.rewards import bugfix, code
from megatron_r1.types import Sample
from megatron_r1.verifying import patches, sandbox
from megatron_r1.verifying.completion import Block, code_blocks
from megatron_r1.verifying.scoring import Scorer

PATIENT = {"seconds": 60.0, "cpu_seconds": 10}  # the machine may be busy
CASES = json.dumps({"cases": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10"}]})
ASSERTIONS = json.dumps({"assertions": "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'", "prelude": "import math"})


def problem(answer: str) -> Problem:
    return Problem(id=0, prompt="", answer=answer)


def fenced(program: str, info: str = "python") -> str:
    return f"<think>Let me see.\n```python\nraise SystemExit(1)\n```\n</think>\nHere it is:\n```{info}\n{program}\n```\nDone."


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", 1.0),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())), '  \\n')", 1.0),
        ("print(3)", 0.0),
        ("a, b = map(int, input().split())\nprint(a + b)\nraise ValueError", 0.0),
        ("a, b = map(int, input().split()\nprint(a + b)", 0.0),
        ("a, b = map(int, input().split())\nprint(a + b, end='\\n\\n7')", 0.0),
    ],
)
def test_a_program_must_give_every_cases_output_and_end_well(program: str, score: float):
    assert code.reward(fenced(program), problem(CASES), **PATIENT) == score


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("def add(a, b):\n    return a + b", 1.0),
        ("import math\ndef add(a, b):\n    return a + b\nif __name__ == '__main__':\n    raise SystemExit(input())", 1.0),
        ("def add(a, b):\n    print('x' * 1000)\n    return a + b", 1.0),
        ("def add(a, b):\n    return 3", 0.0),
        ("def sub(a, b):\n    return a + b", 0.0),
        ("def add(a, b) return a + b", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("import os\ndef add(a, b):\n    print('passed')\n    os._exit(0)", 0.0),
        ("import os\nos.dup2(os.open('/dev/null', os.O_WRONLY), 1)\ndef add(a, b):\n    return a + b", 1.0),
        (
            "import atexit, threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\ndef add(a, b):\n    return a + b",
            1.0,
        ),
    ],
)
def test_assertions_must_all_hold_and_to_end_early_is_to_fail(program: str, score: float):
    assert code.reward(fenced(program), problem(ASSERTIONS), **PATIENT) == score


def test_a_program_finds_its_tests_neither_on_disk_nor_in_another_process():
    hunt = """
        import glob, os, sys
        def add(a, b):
            for path in glob.glob("/proc/[0-9]*/fd/*") + glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/tmp/**", recursive=True):
                try:
                    text = os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 1 << 20)
                except OSError:
                    continue
                if b"add(1, 2)" in text:
                    return a + b
            return None
    """
    program = "\n".join(line[8:] for line in hunt.splitlines())
    assert code.reward(fenced(program), problem(ASSERTIONS), **PATIENT) == 0.0


def test_the_prelude_comes_before_the_program():
    tests = json.dumps({"prelude": "from math import sqrt", "assertions": "assert root(4) == 2"})
    assert code.reward(fenced("def root(x):\n    return sqrt(x)"), problem(tests), **PATIENT) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "def add(a, b):\n    return a + b",
        "<think>```python\ndef add(a, b):\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return a + b\n",
        "```python\ndef add(a, b):\n    return a + b\n```\nor in C++:\n```cpp\nint add(int a, int b);\n```",
        "",
    ],
)
def test_a_completion_that_does_not_end_with_a_python_block_scores_0(completion: str):
    assert code.reward(completion, problem(ASSERTIONS), **PATIENT) == 0.0


def test_blocks_may_stand_in_answer_tags_and_hold_fences_of_their_own():
    text = (
        "<think>```\nno\n```</think><answer>```python a.py\nx = '<answer>'\n```</answer>\n````md\n```\ninner\n```\n````\n  ```py\ny\n  ```"
    )
    assert code_blocks(text) == [Block(("python", "a.py"), "x = '<answer>'\n"), Block(("md",), "```\ninner\n```\n"), Block(("py",), "y\n")]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("42", "a JSON int"),
        ("print(1", "not JSON"),
        ("{}", "with nothing"),
        ('{"cases": []}', '"cases" must be a list'),
        ('{"cases": [{"stdin": "1"}]}', '"cases" must be a list'),
        ('{"cases": [["1", "2"]]}', '"cases" must be a list'),
        ('{"assertions": ""}', "with 'assertions'"),
        ('{"assertions": 3}', "with 'assertions'"),
        ('{"asserts": "x"}', "with 'asserts'"),
        ('{"assertions": "x", "cases": [{"stdin": "", "stdout": ""}]}', "with 'assertions', 'cases'"),
    ],
)
def test_tests_that_are_malformed_are_an_error_and_not_a_0(answer: str, message: str):
    with pytest.raises(ValueError, match="code tests: .*" + message + ".*; write ") as error:
        code.reward("no code", problem(answer))
    assert "\n" not in str(error.value)


def test_nulls_of_a_table_are_no_tests():
    row = {"cases": None, "assertions": "assert add", "prelude": None}
    assert code.parse(json.dumps(row)) == code.Tests(assertions="assert add")


FILES = {
    "shop/__init__.py": "",
    "shop/cart.py": "def total(prices):\n    result = 0\n    for p in prices:\n        result = p\n    return result\n",
}
TESTS = {
    "test_cart.py": "from shop.cart import total\n\ndef test_total():\n    assert total([1, 2]) == 3\n",
    "test_empty.py": "import unittest\nfrom shop import cart\nclass T(unittest.TestCase):\n"
    "    def test_empty(self):\n        self.assertEqual(cart.total([]), 0)\n",
}
REPOSITORY = json.dumps({"files": FILES, "tests": TESTS})
DIFF = """--- a/shop/cart.py
+++ b/shop/cart.py
@@ -2,3 +2,3 @@ def total(prices):
     for p in prices:
-        result = p
+        result += p
     return result
"""
FIXED = FILES["shop/cart.py"].replace("result = p", "result += p")


@pytest.mark.parametrize(
    ("text", "info", "score"),
    [
        (DIFF, "diff", 1.0),
        (FIXED, "python shop/cart.py", 1.0),
        (FILES["shop/cart.py"], "python shop/cart.py", 0.0),
        (FIXED, "python", 0.0),
        (FIXED, "python shop/basket.py", 0.0),
        (DIFF.replace("result = p", "result = q"), "diff", 0.0),
        (DIFF.replace("result += p", "result =+ p"), "diff", 0.0),
        (DIFF.replace("cart.py", "../cart.py"), "diff", 0.0),
        ("import os\nos._exit(0)", "python shop/cart.py", 0.0),
        ("import sys\nsys.exit(0)", "python shop/cart.py", 0.0),
        ("def total(prices):\n    return 3", "python shop/cart.py", 0.0),
        ("def total(prices)", "python shop/cart.py", 0.0),
        (TESTS["test_cart.py"], "python test_cart.py", 0.0),
    ],
)
def test_a_bug_is_fixed_when_all_tests_pass(text: str, info: str, score: float):
    assert bugfix.reward(fenced(text, info), problem(REPOSITORY), **PATIENT) == score


def test_the_path_of_the_only_file_may_be_left_out_and_no_tests_is_a_failure():
    answer = json.dumps({"files": {"a.py": "x = 1"}, "tests": {"t.py": "import a\ndef test_x():\n    assert a.x == 2"}})
    assert bugfix.reward(fenced("x = 2"), problem(answer), **PATIENT) == 1.0
    assert bugfix.reward("x = 2", problem(answer), **PATIENT) == 0.0
    for info in ("python3.11", "{.python}", "a.py", "python:a.py"):
        assert bugfix.reward(fenced("x = 2", info), problem(answer), **PATIENT) == 1.0, info
    assert bugfix.reward(fenced("x = 2", "python a.py") + "\n```\n1 passed\n```\n", problem(answer), **PATIENT) == 1.0
    assert bugfix.reward(f"{fenced('x = 2')}\nRun it:\n```bash\npython t.py\n```\n", problem(answer), **PATIENT) == 1.0
    none = json.dumps({"files": {"a.py": "x = 1"}, "tests": {"t.py": "import a"}})
    assert bugfix.reward(fenced("x = 2"), problem(none), **PATIENT) == 0.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("x", "not JSON"),
        ("[]", "not an object"),
        ('{"files": {"a.py": ""}}', "not an object of just files and tests"),
        ('{"files": {"a.py": ""}, "tests": {}}', "'tests' is not an object of texts"),
        ('{"files": {"a.py": 1}, "tests": {"t.py": ""}}', "'files' is not an object of texts"),
        ('{"files": {"../a.py": ""}, "tests": {"t.py": ""}}', "not a path inside"),
    ],
)
def test_a_repository_that_is_malformed_is_an_error_and_not_a_0(answer: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        bugfix.reward("", problem(answer))
    assert "\n" not in str(error.value)


BEFORE = "".join(f"{n}\n" for n in "abcdefabc")


@pytest.mark.parametrize(
    ("hunks", "after"),
    [
        ("@@ -2,1 +2,1 @@\n-b\n+B\n", "aBcdefabc"),
        ("@@ -8,1 +8,1 @@\n-b\n+B\n", "abcdefaBc"),
        ("@@ -99,7 +1,1 @@\n-b\n+B\n", "abcdefaBc"),
        ("@@\n a\n-b\n c\n", "acdefabc"),
        ("@@ -1,2 +1,3 @@\n a\n+x\n b\n@@ -8,1 +9,1 @@\n-b\n+y\n", "axbcdefayc"),
        ("@@ -3,0 +4,1 @@\n+x\n", "abcxdefabc"),
        ("@@ -0,0 +1,1 @@\n+x\n", "xabcdefabc"),
        ("@@ -9,1 +9,2 @@\n c\n+x\n\\ No newline at end of file\n\ndiff --git a/f b/f\nindex 1..2\n", "abcdefabcx"),
    ],
)
def test_a_hunk_goes_where_its_lines_are_nearest_to_where_it_says(hunks: str, after: str):
    changed = patches.apply({"f": BEFORE, "g": "g"}, f"diff --git a/f b/f\n--- a/f\t2025\n+++ b/f\t2025\n{hunks}")
    assert changed == {"f": "".join(f"{n}\n" for n in after), "g": "g"}


@pytest.mark.parametrize("text", ["a\nb\n", "a\nb", "a\r\nb\r\n", "a\nb\n'\x0c\u2028'\n"])
def test_a_diff_changes_its_lines_and_nothing_else(text: str):
    diff = "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n-a\n+A\n b\n"
    assert patches.apply({"f": text, "g": text}, diff) == {"f": text.replace("a", "A"), "g": text}


def test_a_context_line_that_is_empty_may_have_lost_its_space():
    diff = "--- f\n+++ f\n@@ -1,3 +1,3 @@\n a\n\n-b\n+c\n\n--- g\n+++ g\n@@ -1 +1 @@\n-x\n+y\n"
    assert patches.apply({"f": "a\n\nb\n", "g": "x\n"}, diff) == {"f": "a\n\nc\n", "g": "y\n"}


@pytest.mark.parametrize(
    "diff", ["", "x", "@@ -1 +1 @@\n-a\n+b\n", "--- f\n+++ f\n", "--- f\n+++ f\n@@ -1 +1 @@\n-z\n+b\n", "--- h\n+++ h\n@@\n+b\n"]
)
def test_a_diff_that_does_not_fit_is_refused(diff: str):
    with pytest.raises(patches.DoesNotApply):
        patches.apply({"f": BEFORE}, diff)


def sample(text: str, answer: str) -> Sample:
    return Sample(
        problem(answer), 0, prompt_ids=[1], completion_ids=[2], sampler_logprobs=[0.0], finish_reason="stop", weight_version=0, text=text
    )


def test_in_the_verifiers_a_hostile_program_scores_0_and_bad_tests_fail():
    samples = [
        sample(fenced("def add(a, b):\n    return a + b"), ASSERTIONS),
        sample(fenced("import os\nwhile True: os.fork()"), ASSERTIONS),
        sample(fenced("while True: print('x' * 1000)"), CASES),
        sample(fenced("x = bytearray(1 << 40)"), CASES),
        sample(fenced("pass"), "no tests"),
    ]
    with Scorer({"code": 1.0}, workers=2, timeout_seconds=100.0, options={"code": PATIENT}) as pool:
        pool.collect(samples)
    assert [s.rewards for s in samples] == [{"code": 1.0}, {"code": 0.0}, {"code": 0.0}, {"code": 0.0}, {}]
    assert "not JSON" in samples[4].failures["code"]


def test_a_verifier_that_runs_out_of_time_takes_its_program_along():
    mark = f"late_{time.monotonic():.6f}".replace(".", "_")
    late = sample(
        fenced(f"import os, time\nos.execv('{sandbox.PYTHON[0]}', ['python', '-c', 'import time; time.sleep(1000)', '{mark}'])"), CASES
    )
    with Scorer({"code": 1.0}, timeout_seconds=8.0, options={"code": {"seconds": 500.0}}) as pool:
        pool.submit(late)
        assert is_soon(lambda: bool(running(mark)))
        pool.collect([late])
    assert late.failures == {"code": "no verdict within 8 s"}
    assert is_soon(lambda: not running(mark))


def test_without_a_sandbox_the_pool_does_not_start_unless_told(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise ValueError("no bwrap on PATH")

    monkeypatch.setattr(sandbox, "check", refuse)
    for name in ("code", "bugfix"):
        with pytest.raises(ValueError, match="no bwrap"):
            Scorer({name: 1.0})
        Scorer({name: 1.0}, options={name: {"unsafe": True}}).close()
