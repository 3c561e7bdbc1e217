"""The model families: one file each, named as config.json's model_type, and what builds them.

A family's file has

    check(hf)                  ValueError with one line for a config.json that is not built
    transformer_arguments(hf)  the config.json as arguments of Megatron's configuration
    rules(hf)                  its weights: which Hugging Face tensors make which Megatron tensor, of weights/rules.py

and imports neither torch nor Megatron, so that a config.json is checked, and weights converted, without either.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from megatron_r1 import plugins

NOT_FAMILIES = ("build", "decoder", "fields", "kernels")


def families() -> list[str]:
    """The names that config.json's model_type may have."""
    return [name for name in plugins.names("models") if name not in NOT_FAMILIES]


def family(hf: dict[str, Any]) -> ModuleType:
    """The file of the family that `hf` (a config.json) names. Raises ValueError where it names none that is here."""
    name = hf.get("model_type")
    if name is None:
        raise ValueError("config.json: model_type is missing; it names the file in megatron_r1/models/")
    if "." not in name and name not in families():
        known = ", ".join(families())
        raise ValueError(f"config.json: model_type = {name!r} is not built here: no megatron_r1/models/{name}.py; known: {known}")
    return plugins.load("models", name)
