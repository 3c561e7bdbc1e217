"""Where Megatron-Core assumes CUDA, and what stands there on a machine without it: the only file that knows.

`install()` changes `torch.cuda` and some of Megatron's own modules for the whole process, so it must never run in one
that serves vLLM. Each patch names the Megatron code that needs it; tests/test_cpu.py takes each away and fails when
nothing breaks, so that none outlives its reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_r1.mcore.adamw import AdamW

CPU = torch.device("cpu")
MISSING = object()
# glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes
KEPT_MEMORY = {-1: (1 << 31) - 1, -3: 1 << 30}


@dataclass(frozen=True)
class Patch:
    """One assumption and its replacement: every target becomes `replace(what stood there)`."""

    name: str
    why: str
    targets: tuple[str, ...]  # dotted names: the attribute of a module or a class
    replace: Callable[[Any], Any]

    def apply(self) -> list[tuple[Any, str, Any]]:
        """Patch, and return (owner, attribute, what stood there) for each target."""
        saved = []
        for target in self.targets:
            path, attribute = target.rsplit(".", 1)
            owner = pkgutil.resolve_name(path)
            original = getattr(owner, attribute, MISSING)
            setattr(owner, attribute, self.replace(original))
            saved.append((owner, attribute, original))
        return saved


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.device(kwargs.get("device") or CPU).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _itself(_: Any) -> Callable[..., Any]:
    return lambda tensor_or_module, *args, **kwargs: tensor_or_module


class _Stream:
    """A stream or an event: on CPU everything has happened when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args, **kwargs: _Stream()


def _cuda_type(type_method: Callable[..., Any]) -> Callable[..., Any]:
    def type_of(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is None:
            return type_method(tensor).replace("torch.", "torch.cuda.", 1)
        return type_method(tensor, dtype, **kwargs)

    return type_of


def _splits_as_lists(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    def single(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def plain(value: Any) -> Any:
            return value.tolist() if hasattr(value, "tolist") and not isinstance(value, torch.distributed.ProcessGroup) else value

        return all_to_all(output, input, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return single


def _uneven_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    def gather(outputs: list[torch.Tensor], input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len({output.shape for output in outputs}) == 1:
            return all_gather(outputs, input, *args, **kwargs)
        padded = input.new_zeros(max(len(output) for output in outputs), *input.shape[1:])
        padded[: len(input)] = input
        received = [torch.empty_like(padded) for _ in outputs]
        all_gather(received, padded, *args, **kwargs)
        for output, value in zip(outputs, received, strict=True):
            output.copy_(value[: len(output)])
        return None

    return gather


def _set_rng_state(_: Any) -> Callable[..., None]:
    return lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """In torch.compile's place: Megatron compiles small functions as it is imported, seconds and a C++ compiler for no gain here."""
    return function if function is not None else lambda decorated: decorated


TORCH_PATCHES = (
    Patch(
        "current device",
        "buffers and parameters are made on torch.cuda.current_device() (tensor_parallel, p2p_communication, DDP, router)",
        ("torch.cuda.current_device",),
        lambda _: lambda: CPU,
    ),
    Patch(
        "device literals",
        'device="cuda" in the token count of the schedules, the scaler and the norm of the gradients',
        ("torch.tensor", "torch.zeros", "torch.ones", "torch.empty", "torch.empty_like"),
        _on_cpu,
    ),
    Patch(
        "moves to the device",
        ".cuda() on the shared embedding of pipeline stages and on loaded checkpoint shards",
        ("torch.Tensor.cuda", "torch.nn.Module.cuda"),
        _itself,
    ),
    Patch(
        "streams",
        "the all-to-all dispatcher makes a stream for its copies to the host",
        ("torch.cuda.Stream", "torch.cuda.Event"),
        lambda _: _Stream,
    ),
    Patch(
        "current stream",
        "the dispatcher and the gradient buffers order their work on torch.cuda.current_stream()",
        ("torch.cuda.current_stream", "torch.cuda.default_stream"),
        lambda _: lambda *args: _Stream(),
    ),
    Patch(
        "synchronize",
        "pipeline sends and receives end in torch.cuda.synchronize()",
        ("torch.cuda.synchronize",),
        lambda _: lambda device=None: None,
    ),
    Patch(
        "random state",
        "CudaRNGStatesTracker keeps states of the CUDA generator; here they are those of the CPU generator",
        ("torch.cuda.get_rng_state", "torch.cuda.random.get_rng_state"),
        lambda _: lambda device=None: torch.get_rng_state(),
    ),
    Patch(
        "random seed",
        "torch.cuda.manual_seed must seed the CPU generator, and not through torch.manual_seed, which calls it",
        ("torch.cuda.manual_seed",),
        lambda _: lambda seed: torch.default_generator.manual_seed(seed),
    ),
    Patch(
        "tensor type names",
        "the optimizers take parameters whose type() is torch.cuda.FloatTensor and no others",
        ("torch.Tensor.type",),
        _cuda_type,
    ),
    Patch(
        "all-to-all splits",
        "the dispatcher passes split sizes as tensors or arrays; gloo takes lists",
        ("torch.distributed.all_to_all_single",),
        _splits_as_lists,
    ),
    Patch(
        "uneven all-gather",
        "expert tensor parallelism gathers parts of different length; gloo takes equal ones",
        ("torch.distributed.all_gather",),
        _uneven_all_gather,
    ),
)
MEGATRON_PATCHES = (
    Patch(
        "setting the random state",
        "the tracker sets a CUDA generator's state directly",
        ("megatron.core.tensor_parallel.random._set_cuda_rng_state",),
        _set_rng_state,
    ),
    Patch(
        "Transformer Engine is absent in MLA",
        "HAVE_TE is True there without Transformer Engine, and isinstance(x, None) raises",
        ("megatron.core.transformer.multi_latent_attention.HAVE_TE",),
        lambda _: False,
    ),
    Patch(
        "Transformer Engine is absent in the router",
        "moe_utils asks whether te_general_gemm is None, but does not define it without Transformer Engine",
        ("megatron.core.transformer.moe.moe_utils.te_general_gemm",),
        lambda _: None,
    ),
    Patch(
        "recompute without Transformer Engine",
        "CheckpointWithoutOutput takes fp8=False for FP8, and then calls Transformer Engine",
        ("megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",),
        lambda init: lambda self, fp8=False: init(self, fp8 or None),
    ),
)
OPTIMIZER_PATCHES = (
    Patch(
        "optimizer",
        "fused optimizers keep `step` in the param group; of torch's AdamW, a tensor a parameter, Megatron saves what it cannot load",
        ("megatron.core.optimizer.Adam", "megatron.core.optimizer.distrib_optimizer.Adam"),
        lambda _: AdamW,
    ),
    Patch(
        "optimizer without torch's step",
        "with torch's optimizers the param groups get `eps` and the state a `step` of its own",
        ("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER",),
        lambda _: False,
    ),
    Patch(
        "optimizer like Transformer Engine's",
        "the distributed optimizer reads `step` from the param groups only of Apex's and Transformer Engine's",
        (
            "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
            "megatron.core.optimizer.distrib_optimizer.USING_TE_OPTIMIZER",
        ),
        lambda _: True,
    ),
)
PATCHES = TORCH_PATCHES + MEGATRON_PATCHES + OPTIMIZER_PATCHES
_originals: dict[str, list[tuple[Any, str, Any]]] = {}


def has_cuda() -> bool:
    """Whether the model runs on GPUs; otherwise on CPU, with the patches of this file."""
    return torch.cuda.is_available()


def install() -> None:
    """Adapt this process to a machine without CUDA; before the first import of Megatron. Safe to call again."""
    if _originals:
        return
    torch.compile = _uncompiled
    for parameter, size in KEPT_MEMORY.items():  # or activations go back to the kernel, for new ones at a fault a page: 7% of a GRPO step
        ctypes.CDLL(None).mallopt(parameter, size)
    for missing in ("Apex", "Transformer Engine"):
        warnings.filterwarnings("ignore", message=f".*{missing}.* not installed")  # on every import of Megatron
    for patch in PATCHES:
        _originals[patch.name] = patch.apply()


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Take the patch `name` away: for the test that it is still needed."""
    for owner, attribute, original in _originals[name]:
        if original is MISSING:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, original)
    try:
        yield
    finally:
        next(patch for patch in PATCHES if patch.name == name).apply()
