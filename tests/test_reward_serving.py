"""An exported reward model scores in transformers and behind `vllm serve` as it did in Megatron, on the same tokens."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config
from mcore_runs import Run
from ranks import run_ranks

from megatron_r1 import models
from megatron_r1.chat import Chat
from megatron_r1.packing import TokenSequence
from megatron_r1.parallel import Parallel
from megatron_r1.problem import Conversation
from megatron_r1.processes import free_port
from megatron_r1.rewards import reward_model
from megatron_r1.rollout.server_process import ServerProcess
from megatron_r1.types import LossOutput, Microbatch

TINY = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_v3"  # for its tokenizer, too
TOLERANCE = 1e-4
HELPFUL = """
kind = "pairwise"
preferences = "not read by the servers"
max_length = 256
[run]
dir = "{folder}"
[model]
path = "{model}"
[rollout]
kv_cache_mib = 48
"""
MESSAGES = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in (
        ("What is 12 + 30?", "<think>12 + 30 = 42</think><answer>42</answer>"),
        ("hello?", "Hello!"),
        ("a <answer> b", ""),
        ("long", "so on and " * 12),
    )
] + [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": " \u4f60\u597d\n"}]]


def language_model(family: str) -> dict[str, Any]:
    hf = json.loads((TINY / "config.json").read_text())
    return hf if family == "deepseek_v3" else config("qwen2", hidden_size=128, vocab_size=hf["vocab_size"], tie_word_embeddings=True)


def collected(found: dict[int, float], scores_N: torch.Tensor, batch: Microbatch) -> LossOutput:
    found.update(zip(batch.indices, scores_N.tolist(), strict=True))
    return LossOutput(scores_N.sum(), 1)


def scored_and_exported(source: str, target: str, ids: list[list[int]], parallel: Parallel) -> list[float]:
    """Megatron's scores, packed, of a reward model that begins as the language model in `source` with a new head."""
    from megatron_r1.weights import exporter

    hf = models.reward_model(json.loads((Path(source) / "config.json").read_text()))
    with Run(parallel, hf=hf) as run:
        run.policy.load_hf(source)
        found: dict[int, float] = {}
        sequences = [TokenSequence(ids=one, learned=[0] * len(one)) for one in ids]
        batches = run.policy.pack(sequences, [list(range(len(ids)))])
        run.policy.scores(batches, partial(collected, found))
        exporter.save(run.policy.chunks, hf, folder=target, source_folder=source)
        return [found[i] for i in range(len(ids))]


def made(family: str, folder: Path, parallel: Parallel) -> tuple[Path, list[list[int]], list[float]]:
    """(the exported reward model, the token ids of MESSAGES, their scores in Megatron)."""
    described, source, target = folder / "described", folder / "source", folder / "hf"
    shutil.copytree(TINY, described)
    (described / "config.json").write_text(json.dumps(language_model(family)))
    run_ranks(1, write_language_model, str(described), str(source))
    chat = Chat(source)
    ids = [chat.scored_ids(Conversation(tuple(messages))) for messages in MESSAGES]
    return target, ids, run_ranks(parallel.tensor_model_parallel_size, scored_and_exported, str(source), str(target), ids, parallel)[0]


def write_language_model(source: str, target: str) -> None:
    from megatron_r1.weights import exporter

    hf = json.loads((Path(source) / "config.json").read_text())
    with Run(Parallel(), hf=hf) as run:
        exporter.save(run.policy.chunks, hf, folder=target, source_folder=source)


@torch.no_grad()
def by_transformers(folder: Path, ids: list[list[int]]) -> list[float]:
    from transformers import AutoModelForSequenceClassification

    scorer, report = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return [scorer.eval()(torch.tensor([one])).logits[0, 0].item() for one in ids]


@pytest.mark.parametrize(("family", "tensor"), [("deepseek_v3", 1), ("deepseek_v3", 2), ("qwen2", 1)])
def test_transformers_loads_the_export_and_scores_as_the_trainer(family: str, tensor: int, tmp_path: Path):
    folder, ids, expected = made(family, tmp_path, Parallel(tensor_model_parallel_size=tensor))
    assert max(expected) - min(expected) > 0.1, "the scores differ"
    assert by_transformers(folder, ids) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_vllm_serves_the_export_and_scores_the_same_tokens_as_the_trainer(family: str, tmp_path: Path):
    _, ids, expected = made(family, tmp_path, Parallel())
    config_file, port = tmp_path / "helpful.toml", free_port()
    config_file.write_text(HELPFUL.format(folder=tmp_path, model=TINY))
    argv = [sys.executable, "-m", "megatron_r1", "serve", "reward-model", str(config_file), f"rollout.port={port}"]
    server = ServerProcess(argv, {}, port=port, log_file=tmp_path / "server.log")
    server.start()
    try:
        server.wait_ready(300.0)
        assert [tokens(server.url, messages) for messages in MESSAGES] == ids
        scores = [reward_model.ask(server.url, messages, limit_seconds=60.0) for messages in MESSAGES]
        with pytest.raises(ValueError, match="400"):
            reward_model.ask(server.url, [{"role": "user", "content": "x" * 300}], limit_seconds=60.0)
    finally:
        server.stop()
    assert server.process.returncode == 0
    assert scores == pytest.approx(expected, abs=TOLERANCE)


def tokens(url: str, messages: list[dict[str, str]]) -> list[int]:
    body = json.dumps({"messages": messages, "add_generation_prompt": False}).encode()
    request = urllib.request.Request(f"{url}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["tokens"]
