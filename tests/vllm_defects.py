"""Run as a script, in a process without our plug-in: what stock vLLM computes, and what it computes with each mend applied.

Prints one JSON object: mend -> {"stock": error, "mended": error}. pytest's own process never imports vLLM.
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_r1.rollout import vllm_plugin

MENDS = {mend.name: mend for mend in (*vllm_plugin.MENDS, *vllm_plugin.CPU_MENDS)}


def both(name: str, error: Callable[[], float]) -> dict[str, float]:
    """`error()` before and after the mend."""
    stock = error()
    vllm_plugin.apply(MENDS[name])
    return {"stock": stock, "mended": error()}


def attribute(name: str) -> Callable:
    """The function a mend replaces, as it is now."""
    module, _, path = MENDS[name].target.partition(":")
    found = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def all_answers() -> float:
    """The share of wrong answers to a call of two workers, after one in which the first of them has failed."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

    done, failed = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE
    said = [deque([(failed, "no"), (done, "second")]), deque([(done, "first"), (done, "second")])]
    executor = object.__new__(MultiprocExecutor)
    executor.is_failed, executor.futures_queue = False, deque()
    executor.rpc_broadcast_mq = SimpleNamespace(enqueue=lambda call: None)
    executor.response_mqs = [
        SimpleNamespace(dequeue=lambda timeout, answers=answers: answers.popleft(), answers=answers) for answers in said
    ]
    with suppress(RuntimeError):
        executor.collective_rpc("update_weights")
    assert [queue.answers for queue in executor.response_mqs] == said, "the executor has its own queues again"
    answers = executor.collective_rpc("start_weight_update")
    return sum(answer != "second" for answer in answers) / len(answers)


def rope_3d() -> float:
    """MLA's own call: a 3-D query and key of one head; the reference is vLLM's PyTorch form."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        rope = RotaryEmbedding(64, 64, 128, base=10000, is_neox_style=False, dtype=torch.float32)
    positions, query, key = torch.arange(8), torch.randn(8, 4, 64), torch.randn(8, 1, 64)
    right = rope.forward_native(positions, query.clone(), key.clone())
    found = rope.forward_cpu(positions, query.clone(), key.clone())
    return max((a - b).abs().max().item() for a, b in zip(found, right, strict=True))


def speculative_expand() -> float:
    temperature = torch.tensor([0.5, 0.7, 0.9])
    found = attribute("speculative_expand")(temperature, torch.tensor([2, 5, 6], dtype=torch.int32), 6)
    gap = (found - temperature.repeat_interleave(torch.tensor([2, 3, 1]))).abs().max().item()
    return gap if math.isfinite(gap) else 1.0


def expert_map() -> float:
    """Two local experts of four, numbered 2 and 3 globally; a token routed to experts 0 and 2 gets only local expert 0's share."""
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    torch.manual_seed(0)
    experts = object.__new__(CPUUnquantizedExperts)
    experts.__dict__.update(_use_zentorch=False, quant_config=FUSED_MOE_UNQUANTIZED_CONFIG)
    x, w13, w2 = torch.randn(4, 64), torch.randn(2, 128, 64) / 8, torch.randn(2, 64, 64) / 8
    gate, up = (x @ w13[0].T).chunk(2, dim=-1)
    right = 0.25 * (torch.nn.functional.silu(gate) * up) @ w2[0].T
    packed = [cpu_prepack_moe_weight(w, "vec") for w in (w13, w2)]
    weights, ids = torch.tensor([[0.75, 0.25]]).repeat(4, 1), torch.tensor([[0, 2]], dtype=torch.int32).repeat(4, 1)
    if not hasattr(CPUUnquantizedExperts.apply, "is_mended"):
        ids = ids.clamp(max=1)  # the stock kernel would read beyond its weights; that it runs at all for expert 0 is the error
    out = torch.empty_like(x)
    map_ = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    experts.apply(out, x, *packed, weights, ids, MoEActivation.SILU, 4, map_, None, None, x, x, None, False)
    return (out - right).abs().max().item()


def missing(name: str) -> float:
    """1 where the CPU communicator only inherits the base class's refusal."""
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

    return float(attribute(name) is getattr(DeviceCommunicatorBase, name))


def moe_reload(folder: Path) -> dict[str, float]:
    """A whole weight update, `old` to `new`, through the native API with our file engine; errors are in log-probs."""
    WeightTransferEngineFactory.register_engine("file", "megatron_r1.rollout.vllm_engines", vllm_plugin.ENGINES["file"])
    llm = LLM(
        str(folder / "old"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=8 << 20,
        skip_tokenizer_init=True,
        attention_backend="CPU_MLA",
        weight_transfer_config={"backend": "file"},
    )
    llm.init_weight_transfer_engine({"init_info": {"root": str(folder / "new")}})
    expected = json.loads((folder / "expected.json").read_text())

    def error() -> float:
        llm.start_weight_update()
        llm.update_weights({"update_info": {"file": "model.safetensors"}})
        llm.finish_weight_update()
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        rows = llm.generate([{"prompt_token_ids": expected["token_ids"]}], sampling, use_tqdm=False)[0].prompt_logprobs[1:]
        found = [row[token].logprob for row, token in zip(rows, expected["token_ids"][1:], strict=True)]
        return max(abs(a - b) for a, b in zip(found, expected["logprobs"], strict=True))

    return both("moe_reload", error)


def main(folder: Path) -> None:
    errors = {
        "all_answers": both("all_answers", all_answers),
        "rope_3d": both("rope_3d", rope_3d),
        "moe_reload": moe_reload(folder),  # makes an engine, which puts the CPU kernels in place that the next ones call
        "speculative_expand": both("speculative_expand", speculative_expand),
        "expert_map": both("expert_map", expert_map),
        "all_gatherv": both("all_gatherv", lambda: missing("all_gatherv")),
        "reduce_scatterv": both("reduce_scatterv", lambda: missing("reduce_scatterv")),
    }
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
