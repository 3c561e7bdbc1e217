"""Configuration: strict, typed, TOML. A key that does not exist is an error that names the nearest one that does.

    python -m megatron_r1 grpo configs/tiny_grpo.toml optimizer.lr=1e-4 run.seed=2

A file may begin with `base = "other.toml"` (relative to itself) and then says only what differs; of a list of bases a later
one wins. Model shapes live in the checkpoint's config.json and are never repeated here.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megatron_r1.config_stages import CONFIGS, StageConfig

Tree = dict[str, Any]


def load(stage: str, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> StageConfig:
    """The configuration of `stage` from a TOML file and `section.key=value` overrides.

    Raises ValueError with one line: the setting, the value and what to change.
    """
    tree = read_toml(Path(path))
    for override in overrides:
        _apply(tree, override)
    return parse(stage, tree, where=str(path))


def parse(stage: str, tree: Tree, *, where: str = "config") -> StageConfig:
    """The same from a tree already read."""
    kind = CONFIGS[stage]
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {_one_line(kind, error)}") from None


def read_toml(path: Path) -> Tree:
    """The tree of one file with its `base` files merged beneath it."""
    return _read(path, ())


def _read(path: Path, trail: tuple[Path, ...]) -> Tree:
    path = path.resolve()
    if path in trail:
        raise ValueError(f"{path}: its base files form a circle: {' -> '.join(p.name for p in [*trail, path])}")
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        tree = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    base = tree.pop("base", [])
    below: Tree = {}
    for name in base if isinstance(base, list) else [base]:
        below = _merge(below, _read(path.parent / str(name), (*trail, path)))
    return _merge(below, tree)


def _merge(below: Tree, above: Tree) -> Tree:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: Tree, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # an unquoted string, as shells pass it
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
    tree[last] = value


def dump(config: BaseModel) -> str:
    """The configuration as TOML that `load` reads back to an equal one."""
    lines: list[str] = []
    _dump_table(config.model_dump(exclude_none=True), (), lines)
    return "\n".join(lines) + "\n"


def _dump_table(tree: Tree, path: tuple[str, ...], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{'.'.join(map(_toml_key, path))}]"]
    tables = {k: v for k, v in tree.items() if isinstance(v, dict) and v}
    for key, value in tree.items():
        if key not in tables:
            lines.append(f"{_toml_key(key)} = {json.dumps(value)}")  # JSON scalars and lists are TOML's, and so is {}
    for key, table in tables.items():
        _dump_table(table, (*path, key), lines)


def _toml_key(key: str) -> str:
    """A source's pattern or a dotted path must be quoted."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _one_line(kind: type[BaseModel], error: ValidationError) -> str:
    """The first mistake in the user's terms, and how many more there are."""
    errors = error.errors()
    first = errors[0]
    location = [str(part) for part in first["loc"]]
    name = ".".join(location) or "the config"
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        text = f"{name}: no such setting; {hint}"
    elif first["type"] == "missing":
        text = f"{name}: required, and not set"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"]) if not location else f"{name} = {first['input']!r}: {first['ctx']['error']}"
    else:
        text = f"{name} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return text if len(errors) == 1 else f"{text} (and {len(errors) - 1} more)"


def _fields_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[part].annotation
        if get_origin(annotation) is UnionType:
            annotation = next(a for a in get_args(annotation) if a is not type(None))
        kind = annotation
    return list(kind.model_fields)
