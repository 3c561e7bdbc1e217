"""`python -m benchmarks.step`: seconds a phase of one GRPO step, and the train step against a bare Megatron-Core loop.

The GRPO step is the program's own (`python -m megatron_r1 grpo`): 32 problems x 16 completions of about 46 tokens on tiny_v3, two
trainer ranks with expert parallel 2, two vLLM servers as in the demo, old and reference log-probs, two optimizer steps. The bare loop is
Megatron's model, DDP, schedule and optimizer with a cross-entropy loss written here, on the same tokens and ranks; the two alternate,
for the load of a shared machine falls on both. Last line: JSON of the medians.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.processes import free_port

CONFIG = Path("configs/models/tiny_v3")
RANKS, ROLLOUTS, ROUNDS = 2, 6, 7
SEQUENCES, TOKENS, PROMPT_TOKENS = 512, 54, 8

GRPO = f"""
steps = {2 * ROLLOUTS}
reference_refresh_steps = 0
model = {{ path = "{CONFIG}", init = "random" }}
parallel = {{ world_size = {RANKS}, expert_model_parallel_size = {RANKS} }}
data = {{ reasoning_gym = "chain_sum", prompt_key = "expression", size = 400 }}
batch = {{ problems = 32, completions = 16, minibatches = 2, chunk_tokens = 8192 }}
rollout = {{ servers = 2, max_prompt_tokens = 64 }}
sampling = {{ max_tokens = 50 }}
checkpoint = {{ every = 0, export = false, resume = false }}
"""


def phases() -> dict[str, float]:
    """Median seconds of each phase over the rollouts after the first, from the run's own metrics."""
    folder = Path(tempfile.mkdtemp(prefix="step-"))
    (folder / "grpo.toml").write_text(GRPO)
    argv = [sys.executable, "-m", "megatron_r1", "grpo", str(folder / "grpo.toml"), f"run.dir={folder}/run"]
    subprocess.run(argv, check=True, stdout=sys.stderr)
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rollouts = [r for r in records if "time/step" in r][1:]
    names = [name for name in rollouts[0] if name.startswith("time/")]
    return {name: statistics.median(r[name] for r in rollouts) for name in (*names, "rollout/length_mean")}


def microbatches(seed: int) -> list[Any]:
    """This rank's share of one optimizer step's sequences, packed."""
    from megatron_r1.mcore import distributed
    from megatron_r1.packing import TokenSequence, pack, plan

    rng = random.Random(seed)
    learned = [0] * PROMPT_TOKENS + [1] * (TOKENS - PROMPT_TOKENS)
    made = [TokenSequence(ids=[rng.randrange(3, 300) for _ in range(TOKENS)], learned=learned) for _ in range(SEQUENCES // 2)]
    chunks = plan([TOKENS] * len(made), chunk_tokens=8192, num_groups=distributed.dp_size())
    return pack(made, chunks[distributed.dp_rank()])


def forward_backward(chunks: list[Any], batches: list[Any]) -> None:
    """Gradients with nothing of ours but the model: Megatron's schedule and a cross entropy."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_r1.mcore.policy import on_device

    def forward_step(iterator: Any, model: Any) -> tuple[Any, Callable[[Any], Any]]:
        batch = next(iterator)
        bounds, longest = batch.cu_seqlens, longest_of[id(batch)]
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        logits = model(batch.tokens_T[None], batch.positions_T[None], None, packed_seq_params=packed)
        return logits, partial(cross_entropy, batch)

    def cross_entropy(batch: Any, logits: Any) -> tuple[Any, Any, dict[str, Any]]:
        losses_T = vocab_parallel_cross_entropy(logits[0].float(), batch.labels_T)
        return (losses_T * batch.loss_mask_T).sum(), batch.loss_mask_T.sum().int(), {}

    for chunk in chunks:
        chunk.zero_grad_buffer()
    inputs = [on_device(batch) for batch in batches]
    longest_of = {id(there): int(here.cu_seqlens.diff().max()) for there, here in zip(inputs, batches, strict=True)}
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(inputs),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens_T.numel(),
        micro_batch_size=1,
        forward_only=False,
    )


def bare_step(chunks: list[Any], optimizer: Any, batches: list[Any]) -> None:
    """One optimizer step like that."""
    optimizer.zero_grad()
    forward_backward(chunks, batches)
    optimizer.step()


def train_rank() -> None:
    """Both loops in turn on this rank; rank 0 prints the seconds of each."""
    from megatron_r1.algorithms import sft
    from megatron_r1.mcore import distributed
    from megatron_r1.mcore.policy import Policy, Training
    from megatron_r1.parallel import Parallel

    parallel = Parallel(expert_model_parallel_size=RANKS)
    distributed.init(parallel, seed=1)
    policy = Policy(json.loads((CONFIG / "config.json").read_text()), parallel, training=Training(lr=1e-4), seed=1)
    policy.init_random()
    batches = microbatches(0)
    loops = {"ours": lambda: policy.train_step(batches, sft.loss), "bare": lambda: bare_step(policy.chunks, policy.optimizer, batches)}
    for turn in range(ROUNDS + 1):
        for name, loop in loops.items():
            distributed.any_rank(True)  # start together
            started = time.perf_counter()
            loop()
            if turn and distributed.rank() == 0:
                print("seconds", name, time.perf_counter() - started, flush=True)
    distributed.shutdown()


def train_ratio() -> dict[str, float]:
    """Medians of both loops and of their ratio, pair by pair."""
    common = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step", "rank"],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(RANKS)
    ]
    lines = [line.split() for line in ranks[0].communicate()[0].splitlines() if line.startswith("seconds ")]
    times = {name: [float(seconds) for _, kind, seconds in lines if kind == name] for name in ("ours", "bare")}
    ratios = [ours / bare for ours, bare in zip(times["ours"], times["bare"], strict=True)]
    return {f"train_step/{name}": statistics.median(values) for name, values in times.items()} | {
        "train_step/ratio": statistics.median(ratios)
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        train_rank()
    else:
        print(json.dumps({name: round(value, 3) for name, value in (train_ratio() | phases()).items()}))
