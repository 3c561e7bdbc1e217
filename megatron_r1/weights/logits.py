"""One text through transformers and through Megatron, on one CPU or GPU: do both checkpoints mean the same model?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from megatron_r1.models import family
from megatron_r1.processes import free_port

ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def compare_logits(a: Path, b: Path, *, text: str, tolerance: float) -> int:
    """Print how far the logits of `text` are apart; 0 where that is at most `tolerance` of the largest logit, else 1.

    One of the folders, the first where both can be, is run by transformers: a Hugging Face folder with its tokenizer.
    The other one, Hugging Face's or a Megatron checkpoint, is run by Megatron. Both in float32, one after the other.
    """
    reference, other = (a, b) if (a / "config.json").is_file() else (b, a)
    config = reference / "config.json"
    if not config.is_file():
        raise ValueError(f"{config}: missing; --logits needs one Hugging Face folder, for transformers")
    hf = json.loads(config.read_text())
    family(hf).check(hf)
    ids, expected = _by_transformers(reference, text)
    os.environ.update(ONE_RANK, MASTER_PORT=str(free_port()))
    from megatron_r1.mcore.logits import logits  # after transformers: on a CPU it changes torch.cuda for the whole process

    found = logits(hf, other, ids)
    if found.shape != expected.shape:
        raise ValueError(f"{other}: gives logits {tuple(found.shape)}, {reference} {tuple(expected.shape)}; they are two models")
    apart, largest = float((found - expected).abs().max()), float(expected.abs().max())
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    print(f"{len(ids)} tokens: logits up to {largest:.4g}, at most {apart:.3g} apart; the likeliest token is the same at {same}")
    return int(not apart <= tolerance * largest)


def _by_transformers(folder: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [T] and logits [T, V]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    if not len(ids):
        raise ValueError("--logits: the text has no tokens; give a longer one")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return ids, model(ids[None]).logits[0]
