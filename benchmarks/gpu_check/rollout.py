"""`python -m benchmarks.gpu_check.rollout rollout`: the program's own GRPO with a vLLM server on the same GPU, weights sent by CUDA IPC."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import models
from benchmarks.gpu_check.report import Row, emit
from megatron_r1.models.kernels import is_installed
from megatron_r1.weights import fp8
from megatron_r1.weights.rules import rules

RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRPO = """
steps = 6
reference_refresh_steps = 0
model = {{ path = "{model}", init = "random", dtype = "bfloat16" }}
kernels = {{ {kernels} }}
data = {{ reasoning_gym = "chain_sum", prompt_key = "expression", size = 400 }}
batch = {{ problems = 32, completions = 8, minibatches = 2, chunk_tokens = 8192 }}
sampling = {{ max_tokens = 64 }}
checkpoint = {{ every = 0, export = false, resume = false }}

[rollout]
weight_transfer = "ipc"
quantization = "{quantization}"
canary_tolerance = 1.0
max_prompt_tokens = 64
kv_cache_mib = 2048
vllm_args = ["--enforce-eager", "--gpu-memory-utilization", "0.3"]
"""


def model_folder(folder: Path) -> Path:
    """config.json and tokenizer of what is served."""
    shutil.copytree(models.CONFIGS / "tiny_v3", folder)
    (folder / "config.json").write_text(json.dumps(models.served()))
    return folder


def bytes_sent(quantization: str) -> int:
    """Of one sync."""
    weights = [(t.name, torch.empty(t.shape, dtype=torch.bfloat16, device="meta")) for rule in rules(models.served()) for t in rule.hf]
    if quantization == "none":
        return sum(tensor.nbytes for _, tensor in weights)
    is_code = [bool(tensor.dim() == 2 and fp8.QUANTIZED.search(name)) for name, tensor in weights]
    return sum(tensor.numel() if code else tensor.nbytes for (_, tensor), code in zip(weights, is_code, strict=True))


def copy_rate() -> float:
    """Bytes a second of a copy from this GPU's memory to itself."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return source.nbytes / min(times) * 1e3


def one_run(root: Path, quantization: str) -> list[dict[str, Any]]:
    """The metrics of each rollout; raises with the run's own line where it fails."""
    kernels = "" if is_installed("transformer_engine") else 'transformer_impl = "local"'
    file = root / f"{quantization}.toml"
    file.write_text(GRPO.format(model=root / "model", kernels=kernels, quantization=quantization))
    argv = [sys.executable, "-m", "megatron_r1", "grpo", str(file), f"run.dir={root / quantization}"]
    environment = {name: value for name, value in os.environ.items() if name not in RANK}  # or the program takes itself for a rank
    done = subprocess.run(argv, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise RuntimeError(lines[-1])
    records = [json.loads(line) for line in (root / quantization / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "time/sync" in record]


def rollout() -> None:
    """GB a second of a sync that is not the first, the canary's gap, tokens a second; then again with block FP8."""
    if not is_installed("vllm"):
        return emit(Row("rollout", "all", None, note="vLLM is not installed"))
    copied = copy_rate()
    emit(Row("rollout", "a copy on the device", copied / 1e9, "GB/s"))
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        root = Path(name)
        model_folder(root / "model")
        for quantization, label in (("none", "bf16"), ("fp8", "block FP8")):
            records = one_run(root, quantization)
            sync = min(record["time/sync"] for record in records[1:])
            rate = bytes_sent(quantization) / sync
            emit(Row("rollout", f"sync of {label} by IPC, pause and canary included", rate / 1e9, "GB/s", note=f"{sync:.3f} s"))
            emit(Row("rollout", f"log-probs' largest gap after a sync, {label}", max(r["sync/canary_gap"] for r in records)))
            emit(Row("rollout", f"rollout, {label}", records[-1]["perf/rollout_tokens_per_second"], "tokens/s"))
            emit(Row("rollout", f"optimizer steps of GRPO, {label}", 2 * len(records), target=6))
    return None


if __name__ == "__main__":
    rollout()
