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
SCORES, GENERATES = "ForSequenceClassification", "ForCausalLM"  # how Hugging Face's architectures end


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


def is_reward_model(hf: dict[str, Any]) -> bool:
    """Whether `hf` (a config.json) is of a model with a scalar head, `score`, in the place of the output layer."""
    return any(name.endswith(SCORES) for name in hf.get("architectures") or ())


def reward_model(hf: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the reward model with the decoder of `hf`: one label, no MTP; transformers and vLLM have its class.

    Raises ValueError where `hf` names no architecture to derive it from, or a classifier of several labels.
    """
    [name, *_] = hf.get("architectures") or [""]
    labels = hf.get("num_labels", len(hf.get("id2label", (0, 1))))  # transformers' own default is 2
    if not name.endswith((SCORES, GENERATES)) or (name.endswith(SCORES) and labels != 1):
        raise ValueError(f"config.json: architectures = {[name]!r}, {labels} labels: give a ...{GENERATES}, or a ...{SCORES} of one label")
    changed = {"architectures": [name.replace(GENERATES, SCORES)], "num_labels": 1, "tie_word_embeddings": False}
    changed |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    if "num_nextn_predict_layers" in hf:
        changed["num_nextn_predict_layers"] = 0
    if hf.get("pad_token_id") is not None and hf["pad_token_id"] == hf.get("eos_token_id"):
        changed["pad_token_id"] = None  # transformers takes the last token that is no padding, and the end token is to be scored
    return hf | changed
