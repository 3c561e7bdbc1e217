"""What slurm/*.sh ask of the program beside the ranks: a checked plan before anything starts, and a node's vLLM servers.

    python -m megatron_r1 plan  {grpo,sft} CONFIG.toml [section.key=value ...]    check; print the effective config
    python -m megatron_r1 plan  --gpus 8 ...                                      and check the servers against GPUs a node
    python -m megatron_r1 serve {grpo,...} CONFIG.toml rollout.host=NODE rollout.port=8000   run this node's servers of the stage
    python -m megatron_r1 serve reward-model CONFIG.toml rollout.port=9000                   of the reward model that it has trained
"""

from __future__ import annotations

import signal
import time
from math import ceil
from pathlib import Path
from types import FrameType

from megatron_r1 import config as configuration
from megatron_r1 import cost
from megatron_r1.checks import check, data_parallel_size
from megatron_r1.config_stages import STAGES, GRPOConfig, RejectionConfig, RewardModelConfig, StageConfig
from megatron_r1.launch import POLL_SECONDS, RewardServers, Servers


def plan(arguments: list[str]) -> int:
    """Print the effective config as TOML, headed by what it comes to; raises ValueError with one line where it cannot work."""
    gpus, arguments = (arguments[1], arguments[2:]) if arguments[:1] == ["--gpus"] and len(arguments) > 1 else ("", arguments)
    config = load("plan", arguments)
    check(config)
    if gpus:
        check_servers(config, gpus=int(gpus))
    print("\n".join(f"# {line}" for line in layout(config)), configuration.dump(config), sep="\n", end="")
    return 0


def load(command: str, arguments: list[str]) -> StageConfig:
    """The config that follows a stage's name; ValueError for a stage that does not exist."""
    if len(arguments) < 2 or arguments[0] not in STAGES:
        raise ValueError(f"{command}: give a stage ({', '.join(STAGES)}) and a config file, as in: {command} grpo configs/tiny_grpo.toml")
    stage, file, *overrides = arguments
    return configuration.load(stage, file, overrides)


def check_servers(config: StageConfig, *, gpus: int) -> None:
    """Raise ValueError where a server's share of nodes of so many GPUs is too small for it."""
    r = config.rollout
    needed, share = cost.workers(r.model_dump()), max(1, gpus // r.servers) * r.nodes
    if config.needs_rollouts and not r.urls and needed > share:
        raise ValueError(
            f"rollout.tensor_parallel_size = {r.tensor_parallel_size}, rollout.vllm_args = {r.vllm_args}: a server takes {needed} GPUs and "
            f"would have {share}; set SERVER_NODES={ceil(needed / gpus)} SERVERS={max(1, gpus // needed)}, or lower these"
        )


def layout(config: StageConfig) -> list[str]:
    """The sizes that follow from the config, one line each."""
    if config.serves_own_weights:
        servers = len(config.rollout.urls) or config.rollout.servers
        samples = config.samples if isinstance(config, RejectionConfig) else config.evaluation.samples
        return [f"no trainer ranks; {servers} servers sample {samples} completions a problem"]
    p, data_parallel = config.parallel, data_parallel_size(config)
    stages = p.virtual_pipeline_model_parallel_size
    lines = [
        f"{p.world_size} trainer ranks = {p.tensor_model_parallel_size} tensor x {p.context_parallel_size} context x "
        f"{p.pipeline_model_parallel_size} pipeline"
        f"{f' ({stages} chunks each)' if stages else ''} x {data_parallel} data; {p.expert_model_parallel_size} expert"
    ]
    if isinstance(config, GRPOConfig):
        b = config.batch
        outputs = b.problems * b.completions
        lines.append(
            f"a rollout: {b.problems} problems x {b.completions} = {outputs} outputs -> {b.minibatches} optimizer steps of "
            f"{outputs // b.minibatches}; {config.steps} steps = {config.steps // b.minibatches} rollouts"
        )
    return lines


def serve(arguments: list[str]) -> int:
    """Run a node's vLLM servers until SIGTERM, restarting those that die; exits with 2 when one dies too often."""
    config = load("serve", arguments)
    kind = RewardServers if isinstance(config, RewardModelConfig) else Servers
    servers = kind(config, Path(config.run.dir) / "logs" / config.rollout.host)
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    with servers:
        print("serving", *servers.urls, flush=True)
        while not asked:
            servers.keep_alive()
            time.sleep(POLL_SECONDS)
    return 0
