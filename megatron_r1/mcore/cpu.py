"""What Megatron-Core assumes of CUDA, and what takes its place on a CPU: the only file that knows.

`install` runs before the first import of Megatron, and only where CUDA is absent. It makes `torch.cuda` answer for the
CPU, so it must never be imported into a vLLM process. Each adaptation is a row of PATCHES with its reason; a test leaves
out one at a time and fails when training still works without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
FACTORIES = ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randint", "randn", "tensor", "zeros", "zeros_like")
REAL_HAS_CUDA = torch.cuda.is_available()
_installed = False


def has_cuda() -> bool:
    """Whether there is a real GPU, whatever `torch.cuda` says after `install`."""
    return REAL_HAS_CUDA


class NoStream:
    """A stream or event where everything happens at once and in order: all its methods do nothing."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., NoStream]:
        return lambda *args, **kwargs: NoStream()


def is_cuda(device: Any) -> bool:
    """Whether a `device` argument names a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _dynamo() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch._dynamo.config

    torch._dynamo.config.disable = True


def _device_calls() -> None:
    for name in ("synchronize", "set_device", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "nvtx"):
        setattr(torch.cuda, name, NoStream() if name == "nvtx" else lambda *args, **kwargs: None)
    torch.cuda.current_device = lambda: CPU
    torch.cuda.device_count = lambda: 1
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *args: 0
    torch.cuda.get_device_capability = lambda *args: (0, 0)


def _streams() -> None:
    torch.cuda.Stream = torch.cuda.Event = NoStream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args: NoStream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _factories() -> None:
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.to = _on_cpu(torch.Tensor.to)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return function(*(CPU if is_cuda(a) else a for a in args), **kwargs)

    return wrapped


def _cuda_methods() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _tensor_type() -> None:
    original = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_of


def _generators() -> None:
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    # torch.manual_seed calls torch.cuda.manual_seed, so that one must not call back
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)


def _rng_tracker() -> None:
    module = importlib.import_module("megatron.core.tensor_parallel.random")
    module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _all_to_all() -> None:
    original = dist.all_to_all_single

    def all_to_all_single(output: torch.Tensor, input: torch.Tensor, *splits: Any, **kwargs: Any) -> Any:
        as_lists = [s.tolist() if isinstance(s, torch.Tensor) else s for s in splits]
        for name in ("output_split_sizes", "input_split_sizes"):
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].tolist()
        return original(output, input, *as_lists, **kwargs)

    dist.all_to_all_single = torch.distributed.distributed_c10d.all_to_all_single = all_to_all_single


def _no_te_in_mla() -> None:
    importlib.import_module("megatron.core.transformer.multi_latent_attention").HAVE_TE = False


def _no_te_in_router() -> None:
    importlib.import_module("megatron.core.transformer.moe.moe_utils").te_general_gemm = None


def _optimizer_step() -> None:
    from megatron_r1.mcore.adamw import AdamW

    module = importlib.import_module("megatron.core.optimizer")
    module.Adam, module.USING_PYTORCH_OPTIMIZER = AdamW, False
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    module.HAVE_APEX_OR_TE = module.USING_TE_OPTIMIZER = True


@dataclass(frozen=True)
class Patch:
    """One adaptation."""

    name: str
    why: str
    apply: Callable[[], None]


PATCHES: tuple[Patch, ...] = (
    Patch("dynamo", "fused helpers are torch.compiled, and dynamo recurses through the replaced torch.cuda", _dynamo),
    Patch("device calls", "current_device, synchronize and memory calls raise without a CUDA build", _device_calls),
    Patch("streams", "the MoE dispatcher and DDP order their copies with CUDA streams and events", _streams),
    Patch("factories", "buffers are made with device='cuda' or current_device()", _factories),
    Patch("cuda methods", "tensors and modules are moved with .cuda()", _cuda_methods),
    Patch("tensor type", "the distributed optimizer takes only parameters whose type is torch.cuda.*Tensor", _tensor_type),
    Patch("generators", "seeds and RNG states go through CUDA generators", _generators),
    Patch("rng tracker", "the tensor-parallel RNG tracker reads CUDA's generator table directly", _rng_tracker),
    Patch("all-to-all", "the MoE dispatcher's split sizes are tensors, and gloo takes lists", _all_to_all),
    Patch("no TE in MLA", "HAVE_TE is True without Transformer Engine, then isinstance(x, None) raises", _no_te_in_mla),
    Patch("no TE in router", "te_general_gemm is an unbound name without Transformer Engine", _no_te_in_router),
    Patch("optimizer step", "torch's AdamW keeps a step a parameter, which Megatron saves but cannot load", _optimizer_step),
)


def install(*, without: Iterable[str] = ()) -> None:
    """Apply every patch, once. `without` names those to leave out; only the tests use it."""
    global _installed
    if _installed:
        return
    _installed = True
    for patch in PATCHES:
        if patch.name not in without:
            patch.apply()
