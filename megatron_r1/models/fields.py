"""What the families read alike from a config.json: which fields must be there, which values are built, rotary settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# field -> (values that are built, where the first one is also the default; what to do about another one)
Supported = Mapping[str, tuple[tuple[Any, ...], str]]


def check(hf: dict[str, Any], *, required: Iterable[str], supported: Supported) -> None:
    """Raise ValueError for the first field of `hf` that is missing, or that has a value which is not built."""
    for name in required:
        if hf.get(name) is None:
            raise ValueError(f"config.json: {name} is missing; take it from the model's own config.json")
    for name, (values, fix) in supported.items():
        if hf.get(name, values[0]) not in values:
            raise ValueError(f"config.json: {name} = {hf[name]!r} is not built; use {values[0]!r}: {fix}")


def rotary(hf: dict[str, Any], kinds: Mapping[str, tuple[str, ...]]) -> tuple[str, float, dict[str, Any]]:
    """Kind ("default", or a key of `kinds`), base and settings of the rotary embedding.

    They are in `rope_parameters` (transformers 5), or in `rope_scaling` and `rope_theta` (before). `kinds` names the
    settings that each kind needs. Raises ValueError for another kind and for a missing setting.
    """
    field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    settings = hf.get(field) or {}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ("default", *kinds):
        built = " or ".join(repr(name) for name in (*kinds, "default"))
        raise ValueError(f"config.json: {field}.rope_type = {kind!r} is not built; use {built}")
    for name in kinds.get(kind, ()):
        if settings.get(name) is None:
            raise ValueError(f"config.json: {field}.{name} is missing; rope_type = {kind!r} needs it")
    part = settings.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor = {part} is not built; use 1.0: all of a head is rotated")
    return kind, settings.get("rope_theta") or hf.get("rope_theta") or 10000.0, settings
