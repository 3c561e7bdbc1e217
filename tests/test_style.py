"""The house rules, held by a test: what makes the code readable is measured, not hoped for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "megatron_r1").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
PACKAGE = ROOT / "megatron_r1"
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)

# module prefix -> the only places that may import it (design rule 6)
IMPORT_HOMES = {
    "megatron.core": ("mcore/", "models/", "weights/shard.py", "weights/exporter.py"),
    "transformer_engine": ("models/build.py",),
    "vllm": ("rollout/",),
    "megatron_r1.stages": ("__main__.py", "stages/"),
}
PURE = (
    *("algorithms/", "policy_loss/", "selection.py", "shaping.py", "packing.py"),
    *("weights/rules.py", "models/", "rewards/", "parallel.py", "types.py"),
)
IMPURE_IMPORTS = ("torch.distributed", "megatron.core", "megatron_r1.config", "megatron_r1.mcore")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def depth(node: ast.AST) -> int:
    """How deep the blocks of a function nest; an elif is not deeper than its if, a nested function starts anew."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def test_no_file_is_longer_than_300_lines():
    long = {relative(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert not long, f"split where a second subject begins: {long}"


def test_no_function_is_longer_than_60_lines_or_nests_deeper_than_4():
    bad = []
    for path in SOURCES:
        for f in functions(path):
            lines = f.end_lineno - f.lineno + 1
            if lines > 60 or depth(f) > 4:
                bad.append(f"{relative(path)}:{f.lineno} {f.name}: {lines} lines, depth {depth(f)}")
    assert not bad, "\n".join(bad)


def test_functions_take_at_most_9_parameters_and_name_those_after_the_third():
    bad = []
    for path in SOURCES:
        for f in functions(path):
            positional = [a for a in [*f.args.posonlyargs, *f.args.args] if a.arg not in ("self", "cls")]
            count = len(positional) + len(f.args.kwonlyargs)
            # autograd.Function and patched foreign functions keep the signature their caller dictates
            foreign = (
                f.name in ("forward", "backward", "_postprocess")
                or path.name in ("cpu.py", "vllm_plugin.py")
                or f.name.startswith("__exit")
            )
            if count > 9 or (len(positional) > 3 and not foreign):
                bad.append(f"{relative(path)}:{f.lineno} {f.name}: {count} parameters, {len(positional)} positional")
    assert not bad, "\n".join(bad)


def test_public_functions_are_annotated():
    bad = []
    for path in SOURCES:
        for f in functions(path):
            arguments = [a for a in [*f.args.args, *f.args.kwonlyargs] if a.arg not in ("self", "cls")]
            if not f.name.startswith("_") and (f.returns is None or any(a.annotation is None for a in arguments)):
                bad.append(f"{relative(path)}:{f.lineno} {f.name}")
    assert not bad, "annotate parameters and result:\n" + "\n".join(bad)


def test_every_module_says_what_it_is():
    bad = [relative(p) for p in SOURCES if p.name != "__init__.py" and not ast.get_docstring(ast.parse(p.read_text()))]
    assert not bad, f"no module docstring: {bad}"


@pytest.mark.parametrize("module", IMPORT_HOMES)
def test_a_foreign_package_is_imported_only_where_its_home_is(module):
    homes = IMPORT_HOMES[module]
    bad = [
        relative(p)
        for p in PACKAGE.rglob("*.py")
        if not str(p.relative_to(PACKAGE)).startswith(homes) and any(is_under(i, module) for i in imports(p))
    ]
    assert not bad, f"{module} belongs in {homes}, not in {bad}"


def test_the_pure_core_knows_no_processes_and_no_config():
    bad = []
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)).startswith(PURE) and path.name != "build.py":
            bad += [f"{relative(path)} imports {i}" for i in imports(path) if any(is_under(i, x) for x in IMPURE_IMPORTS)]
    assert not bad, bad


def test_config_is_read_only_by_stages_and_launchers():
    allowed = ("stages/", "config.py", "config_types.py", "__main__.py", "launch.py", "rank.py", "cluster.py", "demo.py", "r1_tiny.py")
    bad = [
        relative(p)
        for p in PACKAGE.rglob("*.py")
        if not str(p.relative_to(PACKAGE)).startswith(allowed) and any(is_under(i, "megatron_r1.config") for i in imports(p))
    ]
    assert not bad, f"pass values, not the config: {bad}"


def test_modules_import_each_other_without_cycles():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        found = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        for node in (n for n in top if isinstance(n, ast.ImportFrom) and n.module):
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        name = name.removesuffix(".__init__")
        graph[name] = {x for x in found if x.startswith("megatron_r1.") and x != name}

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join([*trail[trail.index(module) :], module])}"
        for other in graph.get(module, ()):
            walk(other, (*trail, module))

    for module in graph:
        walk(module, ())


def test_errors_are_not_swallowed():
    """`except Exception` has two homes: grading untrusted output and HTTP retry."""
    allowed = ("scoring.py", "vllm_server.py", "grading.py")
    bad = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and path.name not in allowed:
                name = node.type.id if isinstance(node.type, ast.Name) else ""
                if node.type is None or name in ("Exception", "BaseException"):
                    bad.append(f"{relative(path)}:{node.lineno}")
    assert not bad, bad


def test_assertions_say_what_was_wrong():
    nodes = [(p, n) for p in SOURCES for n in ast.walk(ast.parse(p.read_text()))]
    bad = [f"{relative(p)}:{n.lineno}" for p, n in nodes if isinstance(n, ast.Assert) and n.msg is None]
    assert not bad, f"assert without a message: {bad}"


def test_text_is_ascii_and_leaves_nothing_for_later():
    bad = []
    for path in [*SOURCES, *(ROOT / "configs").rglob("*.toml"), *(ROOT / "configs").rglob("*.jinja"), *(ROOT / "slurm").glob("*.sh")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.isascii() or re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", line) or len(line) > 140:
                bad.append(f"{relative(path)}:{number}")
    assert not bad, bad
