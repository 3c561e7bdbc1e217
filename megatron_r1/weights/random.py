"""Random initial weights that are the same in every parallel layout: each tensor's generator is seeded by its name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_r1.weights.hf import Reader
from megatron_r1.weights.rules import rules

RESIDUAL = ("o_proj.weight", "down_proj.weight")
SCORE = "score.weight"


class RandomWeights:
    """Stands where a SafetensorsReader does: normal(0, initializer_range), norms 1, biases 0.

    What writes to the residual stream is smaller by sqrt(2 layers), as in Megatron (and GPT-2): a tiny policy that starts
    without it learns its cold start as fast, and then hardly improves under RL.
    """

    def __init__(self, hf: dict[str, Any], *, seed: int) -> None:
        self.folder = Path("random weights")
        self.std = hf.get("initializer_range", 0.02)
        self.residual_std = self.std / (2 * hf["num_hidden_layers"]) ** 0.5
        self.seed = seed
        self.shapes = {tensor.name: tensor.shape for rule in rules(hf) for tensor in rule.hf}
        self.files = dict.fromkeys(self.shapes, self.folder)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.shapes[name]

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """One rectangular part of a tensor; the whole is made to get it."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0)[index]
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "little", signed=True)
        std = self.residual_std if name.endswith(RESIDUAL) else self.std
        return torch.empty(shape).normal_(std=std, generator=torch.Generator().manual_seed(seed))[index]


class NewHead:
    """A language model's weights as a reward model's: without its output layer and with a random `score.weight`."""

    def __init__(self, language_model: Reader, hf: dict[str, Any], *, seed: int) -> None:
        self.folder, self.language_model, self.random = language_model.folder, language_model, RandomWeights(hf, seed=seed)
        self.files = {name: file for name, file in language_model.files.items() if name != "lm_head.weight"} | {SCORE: self.random.folder}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._of(name).shape(name)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """One rectangular part of a tensor."""
        return self._of(name).read(name, index)

    def _of(self, name: str) -> Reader:
        return self.random if name == SCORE else self.language_model
