"""`python -m benchmarks.rollout [MODEL] [SERVERS]`: 32 prompts x 16 completions of 46 tokens, through our client and by bare vLLM.

Bare is vLLM's offline class in a process of its own, one thread like each server, on the same prompts and seeds; the rounds
alternate, for the load of a shared machine falls on both. Last line: JSON of the medians; the ratio is that of the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_r1.processes import free_port
from megatron_r1.rollout.engine import Request, SamplingParams
from megatron_r1.rollout.server_process import CPU_ENV, ServerProcess, server_command
from megatron_r1.rollout.vllm_server import VLLMServers

PROMPTS, COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 16, 24, 46, 21
LIMITS = {"max_model_len": 256, "max_num_seqs": 256}
KV_CACHE_BYTES = 256 << 20


def requests() -> list[Request]:
    random.seed(0)
    return [Request(i, [random.randrange(3, 300) for _ in range(PROMPT_TOKENS)], seed=1000 * i) for i in range(PROMPTS)]


def bare(model: str) -> None:
    """In a process of its own: a round for each line on stdin, its tokens a second to stdout."""
    from vllm import LLM
    from vllm import SamplingParams as Sampling

    llm = LLM(
        model,
        dtype="float32",
        load_format="dummy",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        skip_tokenizer_init=True,
        attention_backend="CPU_MLA",
        logprobs_mode="processed_logprobs",
        **LIMITS,
    )
    prompts = [{"prompt_token_ids": request.token_ids} for request in requests()]
    common = {"n": COMPLETIONS, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": 0, "detokenize": False}
    params = [Sampling(seed=request.seed, **common) for request in requests()]
    for _ in sys.stdin:
        started = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        print(f"rate {tokens / (time.monotonic() - started)}", flush=True)


def round_of(engine: VLLMServers) -> float:
    """Tokens a second of one round through the client."""
    started = time.monotonic()
    sampling = SamplingParams(max_tokens=NEW_TOKENS, n=COMPLETIONS)
    tokens = sum(len(c.token_ids) for _, group in engine.generate(requests(), sampling) for c in group)
    return tokens / (time.monotonic() - started)


def main(model: str, servers: int) -> None:
    logs = Path(tempfile.mkdtemp(prefix="rollout-"))
    processes = []
    for i in range(servers):
        port = free_port()
        argv, env = server_command(model, port=port, dtype="float32", kv_cache_bytes=KV_CACHE_BYTES, **LIMITS)
        processes.append(ServerProcess(argv, env, port=port, log_file=logs / f"{i}.log"))
    offline = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.rollout", model, "bare"],
        env={**os.environ, **CPU_ENV, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    rates: dict[str, list[float]] = {"bare": [], "client": []}
    engine = VLLMServers([process.url for process in processes], own_weights=True)
    try:
        for process in processes:
            process.start()
        starts = [process.wait_ready(300.0) for process in processes]
        for _ in range(ROUNDS + 1):
            print("go", file=offline.stdin, flush=True)
            rates["bare"].append(next(float(line.split()[1]) for line in offline.stdout if line.startswith("rate ")))
            rates["client"].append(round_of(engine))
            print({name: f"{values[-1]:.0f} tok/s" for name, values in rates.items()}, flush=True)
    finally:
        engine.close()
        offline.kill()
        for process in processes:
            process.stop()
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first round warms up
    ratios = [ours / theirs for ours, theirs in zip(rates["client"][1:], rates["bare"][1:], strict=True)]
    medians |= {"ratio": statistics.median(ratios), "start_seconds": max(starts), "servers": servers}
    print(json.dumps({name: round(value, 3) for name, value in medians.items()}))


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "configs/models/tiny_v3"
    if sys.argv[2:3] == ["bare"]:
        bare(model)
    else:
        main(model, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
