"""`python -m benchmarks.gpu_check.training layers|curve|speed`: what Megatron computes on this GPU, and how fast."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import flops, models
from benchmarks.gpu_check.report import Row, emit
from benchmarks.step import bare_step, forward_backward
from megatron_r1.algorithms import sft
from megatron_r1.mcore import distributed
from megatron_r1.mcore.policy import Policy, Training
from megatron_r1.models.kernels import Kernels, is_installed
from megatron_r1.packing import TokenSequence
from megatron_r1.parallel import Parallel
from megatron_r1.weights import fp8

LENGTHS = (700, 324, 512, 512)  # of the sequences that are compared
STEPS, TAIL, TOKENS = 50, 10, 4096  # of the loss curves
TIMED = (4096, 4096)  # V3's length in pre-training
WARM, ROUNDS = 3, 9
PEAK = {"H100": 989.4e12, "H200": 989.4e12}  # bf16 without sparsity, of the SXM module's data sheet
ENGINE = "Transformer Engine is not installed"


class InMemory:
    """Tensors by Hugging Face name, where shard.load takes a checkpoint."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.folder = tensors, Path("memory")
        self.files = dict.fromkeys(tensors, self.folder)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors[name][index]


def sequences(hf: dict[str, Any], lengths: tuple[int, ...], *, seed: int) -> list[TokenSequence]:
    """Walks on a fixed graph of the words, in which each has four successors: something that can be learned."""
    rng, vocab = random.Random(seed), hf["vocab_size"]
    made = []
    for length in lengths:
        ids = [rng.randrange(vocab)]
        while len(ids) < length:
            ids.append((ids[-1] * 31 + 7 * rng.randrange(4) + 1) % vocab)
        made.append(TokenSequence(ids=ids, learned=[1] * length))
    return made


def logprobs(policy: Policy, made: list[TokenSequence], chunks: list[list[int]]) -> torch.Tensor:
    """Log-prob of each token that has one, in the order of the sequences, whichever chunks they are packed in."""
    batches = policy.pack(made, chunks)
    policy.attach_logprobs(batches, "old")
    found = {}
    for batch in batches:
        for index, start, stop in zip(batch.indices, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            found[index] = batch.old_logprobs_T[start : stop - 1]
    return torch.cat([found[i] for i in range(len(made))])


def compared(name: str, a: torch.Tensor, b: torch.Tensor, *, target: float) -> None:
    """A row of how far two runs' log-probs are apart."""
    gap = (a - b).abs()
    emit(Row("layers", name, float(gap.mean()), target=target, at_most=True, note=f"largest {float(gap.max()):.3g}"))


def policy_of(hf: dict[str, Any], **kernels: Any) -> Policy:
    """In bf16 on this GPU alone, with these kernels."""
    return Policy(hf, Parallel(), training=Training(dtype="bfloat16", lr=1e-4, lr_warmup_steps=5, kernels=Kernels(**kernels)), seed=1)


def free() -> None:
    """Give back what the policies before hold of the GPU: two of V3's layers do not fit beside each other."""
    distributed.drop_models()
    torch.cuda.empty_cache()


def layers() -> None:
    """Mean differences of log-probs, and tensors or bytes that differ where none may."""
    hf, apart = models.comparison(), [[i] for i in range(len(LENGTHS))]
    made, together = sequences(hf, LENGTHS, seed=0), [list(range(len(LENGTHS)))]
    local = policy_of(hf, transformer_impl="local")
    weights = {name: tensor.cpu() for name, tensor in local.hf_weights()}
    reference = logprobs(local, made, together)
    compared("local layers, packed against single: log-probs", reference, logprobs(local, made, apart), target=0.01)
    if is_installed("transformer_engine"):
        engine = policy_of(hf)
        engine.load(InMemory(weights))
        packed = logprobs(engine, made, together)
        compared("Transformer Engine against local layers: log-probs", packed, reference, target=0.02)
        compared("Transformer Engine, packed against single: log-probs", packed, logprobs(engine, made, apart), target=0.01)
        different = sum(not torch.equal(tensor.cpu(), weights[name]) for name, tensor in engine.hf_weights())
        emit(Row("layers", "tensors that loading and exporting changed", different, target=0, at_most=True))
    else:
        emit(Row("layers", "Transformer Engine's layers", None, note=ENGINE))
    changed = 0
    for name, tensor in weights.items():
        if tensor.dim() == 2 and fp8.QUANTIZED.search(name) and ".experts." not in name:
            for here, there in zip(fp8.quantize(tensor.cuda()), fp8.quantize(tensor), strict=True):
                changed += int((here.cpu().view(torch.uint8) != there.view(torch.uint8)).sum())
    emit(Row("layers", "bytes of block FP8 made on the GPU that the CPU makes otherwise", changed, target=0, at_most=True))


def curve() -> None:
    """Relative difference of the mean loss of the last steps."""
    hf = models.comparison()
    if not is_installed("transformer_engine"):
        return emit(Row("curve", "FP8 against bf16", None, note=ENGINE))
    data = [sequences(hf, (TOKENS // 4,) * 4, seed=step) for step in range(STEPS)]
    weights, tails = None, {}
    for name in ("none", "blockwise"):
        policy = policy_of(hf, fp8=name)
        weights = weights or {key: tensor.cpu() for key, tensor in policy.hf_weights()}
        policy.load(InMemory(weights))
        losses = [
            policy.train_step(policy.pack(made, [list(range(4))]), sft.loss)["policy/loss"] for made in data
        ]
        tails[name] = statistics.mean(losses[-TAIL:])
        note = f"first {losses[0]:.4f}, mean of the last {TAIL}"
        emit(Row("curve", f"loss of {STEPS} steps, {'bf16' if name == 'none' else 'FP8'}", tails[name], note=note))
        del policy
        free()
    difference = abs(tails["blockwise"] / tails["none"] - 1)
    return emit(Row("curve", "FP8 against bf16, relative", difference, target=0.01, at_most=True, note="V3 reports 0.0025 over its runs"))


def milliseconds(*calls: Callable[[], Any]) -> list[float]:
    """The median of each by CUDA events, the calls in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(WARM + ROUNDS):
        for call, found in zip(calls, times, strict=True):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            if turn >= WARM:
                found.append(start.elapsed_time(stop))
    return [statistics.median(found) for found in times]


def speed() -> None:
    """Milliseconds, shares of the peak and ratios."""
    side, has_engine = 8192, is_installed("transformer_engine")
    [matmul] = milliseconds(partial(torch.matmul, *(torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))))
    best = 2 * side**3 / matmul * 1e3
    emit(Row("speed", f"matmul of {side}^3, bf16", best / 1e12, "TFLOP/s"))
    if not has_engine:
        timed("bf16, local layers", best, target=None, steps=True, transformer_impl="local")
        return emit(Row("speed", "FP8 over bf16", None, note=ENGINE))
    bf16 = timed("bf16", best, target=0.45, steps=True)
    fp8_time = timed("FP8", best, target=None, steps=False, fp8="blockwise")
    return emit(Row("speed", "FP8 over bf16, forward and backward", bf16 / fp8_time, "x", target=1.3))


def timed(label: str, best: float, *, target: float | None, steps: bool, **kernels: Any) -> float:
    """Milliseconds of forward and backward of V3's layers, with their rows; `best` is the matmul's operations a second."""
    free()
    torch.cuda.reset_peak_memory_stats()
    hf = models.stack()
    policy, made, work = policy_of(hf, **kernels), sequences(hf, TIMED, seed=0), flops.training(hf, TIMED)
    batches = policy.pack(made, [list(range(len(made)))])
    [both] = milliseconds(partial(forward_backward, policy.chunks, batches))
    emit(Row("speed", f"forward and backward of {sum(TIMED)} tokens, {label}", both, "ms"))
    emit(Row("speed", f"of the matmul's rate, {label}", work / both * 1e3 / best))
    if peak := next((value for name, value in PEAK.items() if name in torch.cuda.get_device_name()), None):
        emit(Row("speed", f"MFU, {label}", work / both * 1e3 / peak, target=target))
    if steps:
        ours, bare = milliseconds(
            partial(policy.train_step, batches, sft.loss), partial(bare_step, policy.chunks, policy.optimizer, batches)
        )
        emit(Row("speed", f"train step, {label}", ours, "ms"))
        emit(Row("speed", "train step over a bare Megatron-Core loop", ours / bare, "x", target=1.03, at_most=True))
    emit(Row("speed", f"memory at its highest, {label}", torch.cuda.max_memory_allocated() / 2**30, "GiB"))
    return both


if __name__ == "__main__":
    distributed.init(Parallel(), seed=1)
    {"layers": layers, "curve": curve, "speed": speed}[sys.argv[1]]()
    distributed.shutdown()
