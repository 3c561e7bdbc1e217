"""Everything that can be wrong with a config and its files, said before a process starts or a byte is allocated."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from megatron_r1 import chat_templates, models, parallel, plugins
from megatron_r1.config_stages import EvalConfig, GRPOConfig, RejectionConfig, RewardModelConfig, SFTConfig, StageConfig
from megatron_r1.models import kernels
from megatron_r1.rollout.server_process import SENDING
from megatron_r1.verifying import scoring


def check(config: StageConfig) -> None:
    """Raise ValueError with one line for the first thing that cannot work."""
    if isinstance(config, RejectionConfig):
        check_rejection(config)
    has_model = config.model is not None and not (isinstance(config, RejectionConfig) and config.rollout.urls)
    hf = check_model(config) if has_model else {}
    chat_templates.chat_template(config.chat_template)
    if not config.serves_own_weights:
        check_layout(config, hf)
        check_kernels(config, hf)
    check_data(config)
    check_rollout(config, hf)
    check_run_folder(config)
    if config.needs_rollouts:
        check_rewards(config)
    if isinstance(config, GRPOConfig):
        check_batch(config)


def check_model(config: StageConfig) -> dict[str, Any]:
    """The config.json of the model folder, as the stage builds it: a family we have, with tokenizer and weights where asked for."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise ValueError(f"model.path = {config.model.path!r}: no such folder; give a Hugging Face model folder")
    hf = read_json(folder / "config.json", setting="model.path")
    if not config.serves_own_weights:  # else any family that vLLM knows will do
        models.family(hf).check(hf)
    if isinstance(config, RewardModelConfig):
        hf = models.reward_model(hf)
    elif models.is_reward_model(hf):
        raise ValueError(f"model.path = {config.model.path!r}: a reward model, which writes no text; give a language model")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"model.path = {config.model.path!r}: tokenizer_config.json is missing; copy the model's tokenizer there")
    is_needed = config.model.init == "weights" and not (config.serves_own_weights and config.rollout.urls)
    if is_needed and not any(folder.glob("*.safetensors")):
        raise ValueError(f'model.path = {config.model.path!r}: no *.safetensors there; convert the weights, or set model.init = "random"')
    return hf


def read_json(path: Path, *, setting: str) -> dict[str, Any]:
    """A JSON object from a file the user named."""
    if not path.is_file():
        raise ValueError(f"{setting}: {path} is missing")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def layout(config: StageConfig) -> parallel.Parallel:
    """The parallel sizes of the config."""
    return parallel.Parallel(**config.parallel.model_dump(exclude={"world_size", "timeout_minutes"}))


def check_layout(config: StageConfig, hf: dict[str, Any]) -> None:
    """Parallel sizes against the model's shapes and the number of ranks."""
    parallel.check(layout(config), config.parallel.world_size, hf)


def check_kernels(config: StageConfig, hf: dict[str, Any]) -> None:
    """What is asked of the GPU, Transformer Engine and their companions is here and goes together."""
    m, o = config.model, config.optimizer
    settings = kernels.Kernels(**config.kernels.model_dump())
    kernels.check(settings, hf, layout(config), dtype=m.dtype, recompute=m.recompute, has_gpu=has_gpu())
    kernels.check_optimizer(moments_dtype=o.moments_dtype, offload_fraction=o.offload_fraction, dtype=m.dtype, has_gpu=has_gpu())


def data_parallel_size(config: StageConfig) -> int:
    """Ranks that train on different data."""
    return layout(config).data_parallel_size(config.parallel.world_size)


def check_data(config: StageConfig) -> None:
    """One source of problems where problems are needed; files that are named exist."""
    d = config.data
    sources = {name: getattr(d, name) for name in ("jsonl", "huggingface", "reasoning_gym", "humaneval")}
    named = [name for name, value in sources.items() if value]
    if config.needs_rollouts and len(named) != 1:
        said = " and ".join(f"data.{n}" for n in named) or "none"
        raise ValueError(f"data: set exactly one of {', '.join(f'data.{n}' for n in sources)}; set are: {said}")
    if d.jsonl is not None and not Path(d.jsonl).is_file():
        raise ValueError(f"data.jsonl = {d.jsonl!r}: no such file")
    if d.reasoning_gym is not None and d.size is None:
        raise ValueError(f"data.size: required with data.reasoning_gym = {d.reasoning_gym!r}; how many problems to make")
    if config.evaluation.problems > d.held_out and (d.held_out or not isinstance(config, EvalConfig)):
        raise ValueError(f"evaluation.problems = {config.evaluation.problems}: more than data.held_out = {d.held_out}; raise data.held_out")
    if isinstance(config, SFTConfig) and d.conversations is None:
        raise ValueError('data.conversations: required for SFT; a JSONL file of {"messages": [...]} lines')
    if isinstance(config, SFTConfig) and not Path(d.conversations).is_file():
        raise ValueError(f'data.conversations = {d.conversations!r}: no such file; give a JSONL file of {{"messages": [...]}} lines')
    if isinstance(config, RewardModelConfig) and not Path(config.preferences).is_file():
        raise ValueError(f"preferences = {config.preferences!r}: no such file")
    if isinstance(config, GRPOConfig) and config.general.jsonl and not Path(config.general.jsonl).is_file():
        raise ValueError(f"general.jsonl = {config.general.jsonl!r}: no such file")


def check_rollout(config: StageConfig, hf: dict[str, Any]) -> None:
    """The lengths fit the model, the transfer backend exists on this device, and every url is one."""
    r, longest = config.rollout, config.longest_completion
    setting = "sampling.max_tokens" if longest == config.longest_sampled else "evaluation.max_tokens"
    limit = hf.get("max_position_embeddings", longest + r.max_prompt_tokens)
    if config.needs_rollouts and longest + r.max_prompt_tokens > limit:
        raise ValueError(
            f"{setting} + rollout.max_prompt_tokens = {longest} + {r.max_prompt_tokens}: "
            f"more than the model's max_position_embeddings ({limit}); lower one of them"
        )
    if r.weight_transfer in ("nccl", "ipc") and not has_gpu():
        raise ValueError(f'rollout.weight_transfer = {r.weight_transfer!r}: needs a GPU, and there is none; set "gloo" or "file"')
    if r.weight_senders != "stages" and r.weight_transfer not in SENDING:
        has = f'rollout.weight_transfer = "{r.weight_transfer}" has senders of its own; leave it out, or set "gloo" or "nccl" there'
        raise ValueError(f'rollout.weight_senders = "{r.weight_senders}": {has}')
    if r.placement == "colocated" and has_gpu() and r.weight_transfer != "ipc":
        fix = f'set rollout.weight_transfer = "ipc", not "{r.weight_transfer}"'
        raise ValueError(f'rollout.placement = "colocated": servers read weights where the trainer has them; {fix}')
    if r.quantization == "fp8" and not has_gpu():
        raise ValueError('rollout.quantization = "fp8": needs a GPU, for vLLM has no FP8 kernels for this CPU; set "none"')
    for url in r.urls:
        check_url(url, setting="rollout.urls")
    if config.needs_rollouts and not r.urls and importlib.util.find_spec("vllm") is None:
        raise ValueError("rollout.servers: vLLM is not installed here; install the cpu or gpu extra, or set rollout.urls")


def check_url(url: str, *, setting: str) -> None:
    """A server's address."""
    parts = urlparse(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{setting} = {url!r}: not a server's address; write it as http://host:port")


def check_rewards(config: StageConfig) -> None:
    """The rewards exist, and one of them says what is correct where that is counted."""
    r, judges = config.rewards, config.evaluation.judges
    scoring.check(r.weights, r.options, by_source=r.by_source)
    names = {name for weights in (r.weights, *r.by_source.values()) for name in weights}
    if (config.evaluation.problems or isinstance(config, EvalConfig)) and not names & set(judges):
        raise ValueError(f"evaluation.judges = {judges}: none of them is among rewards.weights; name one that is, or give one a weight")


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA driver, and torch is a build that uses it; asked without importing torch."""
    return torch_uses_cuda() and (Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None)


def torch_uses_cuda() -> bool:
    """Whether the torch that is installed is no CPU build."""
    torch = importlib.util.find_spec("torch")
    return torch is not None and runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] is not None


def check_run_folder(config: StageConfig) -> None:
    """The run's folder can be made and written."""
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"run.dir = {config.run.dir!r}: cannot be written: {error.strerror}") from None


def check_rejection(config: RejectionConfig) -> None:
    """A judge with an address and a key where they are named, and no template that nobody applies."""
    if config.rollout.urls and config.chat_template is not True:
        raise ValueError(
            f"chat_template = {config.chat_template!r}: the servers of rollout.urls apply their own; start them with --chat-template, "
            "and leave chat_template out"
        )
    if config.judge.url:
        check_url(config.judge.url, setting="judge.url")
    for setting, name in (("api_key_env", config.api_key_env), ("judge.api_key_env", config.judge.api_key_env)):
        if name and not os.environ.get(name):
            raise ValueError(f"{setting} = {name!r}: no such variable in the environment; export it, or leave the setting out")


def check_batch(config: GRPOConfig) -> None:
    """The algorithm exists and every data-parallel rank gets work."""
    algorithm = plugins.load("algorithms", config.algorithm.name)
    for part in ("Options", "advantages", "loss"):
        if not hasattr(algorithm, part):
            raise ValueError(f"algorithm.name = {config.algorithm.name!r}: has no {part}, which the stage calls; use one that has, as grpo")
    plugins.options(algorithm.Options, config.algorithm.options, where="algorithm.options")
    b, dp = config.batch, data_parallel_size(config)
    if b.problems < dp:
        raise ValueError(f"batch.problems = {b.problems}: fewer than the {dp} data-parallel ranks; raise it or lower parallel.world_size")
    if b.problems * b.completions // b.minibatches < dp:
        raise ValueError(f"batch.minibatches = {b.minibatches}: leaves fewer outputs a step than the {dp} data-parallel ranks; lower it")
    longest = config.longest_sampled + config.rollout.max_prompt_tokens
    if b.chunk_tokens < longest:
        raise ValueError(
            f"batch.chunk_tokens = {b.chunk_tokens}: a prompt and its completion have up to {longest} tokens "
            "(rollout.max_prompt_tokens + sampling.max_tokens); raise it"
        )
