"""The folder is the registry: a name in a config is a file name in a folder; a dotted path names code outside."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from dataclasses import fields
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError


def names(folder: str) -> list[str]:
    """The names a config may use for `folder` ("rewards", "algorithms", "models", ...)."""
    package = importlib.import_module(f"megatron_r1.{folder}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def load(folder: str, name: str) -> ModuleType:
    """The module `megatron_r1.<folder>.<name>`, or any importable module when `name` has a dot.

    Raises ValueError when there is no such file, with the nearest name that exists.
    """
    if "." in name:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            raise ValueError(f"{folder} = {name!r}: no module of that name can be imported; put its package on PYTHONPATH")
        return importlib.import_module(name)
    known = names(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)} or a dotted path"
        raise ValueError(f"{folder} = {name!r}: there is no megatron_r1/{folder}/{name}.py; {hint}")
    return importlib.import_module(f"megatron_r1.{folder}.{name}")


def options(kind: type, values: dict[str, Any], *, where: str) -> Any:
    """An instance of the dataclass `kind` from a config table; an unknown key or a wrong type is a one-line ValueError.

    `where` is the table's name in the config, for the message.
    """
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise ValueError(f"{where}.{key}: no such option; {hint}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([where, *(str(part) for part in first["loc"])])
        raise ValueError(f"{name} = {first['input']!r}: {first['msg']}") from None
