"""The command line.

    python -m megatron_r1 demo                                            R1 in miniature, on this machine
    python -m megatron_r1 r1-tiny                                         all of R1's stages in miniature
    python -m megatron_r1 worked-examples configs/tiny_sft.toml           the conversations that the miniature's cold start learns
    python -m megatron_r1 {sft,grpo,reject,eval,reward-model} CONFIG.toml [section.key=value ...]
    python -m megatron_r1 pipeline PIPELINE.toml [key=value ...]          R1's stages one after the other; --list prints them
    python -m megatron_r1 convert {hf-to-megatron,megatron-to-hf,fp8-cast,compare,verify} ...
    python -m megatron_r1 plan {sft,grpo,...} CONFIG.toml ...             check a config; print what it comes to
    python -m megatron_r1 serve {grpo,...} CONFIG.toml rollout.host=NODE  a cluster node's vLLM servers
    python -m megatron_r1 serve reward-model CONFIG.toml rollout.port=9000    the reward model that a run has trained
    python -m megatron_r1 allreduce NODE_GBPS PAIR_GBPS NODE ...          measure a cluster's links (slurm/env.sh runs it)
    python -m megatron_r1 status RUN                                      where a run stands, and what it cost
    python -m megatron_r1 report RUN [RUN2 ...]                           its figures as one HTML page
    python -m megatron_r1 doctor                                          what is installed, and what is missing

Run by hand it starts the servers and ranks of this machine; run by srun or torchrun (RANK is set) it is one rank.
"""

from __future__ import annotations

import importlib
import os
import sys

from megatron_r1 import rank
from megatron_r1.processes import importing

TOOLS = {  # command -> module and its function of the arguments, which returns the exit code
    "demo": ("demo", "demo"),
    "r1-tiny": ("r1_tiny", "r1_tiny"),
    "worked-examples": ("demo", "worked_examples"),
    "convert": ("convert_cli", "main"),
    "plan": ("cluster", "plan"),
    "serve": ("cluster", "serve"),
    "status": ("status", "status"),
    "report": ("report", "report"),
    "allreduce": ("allreduce", "allreduce"),
    "doctor": ("doctor", "doctor"),
}
EXAMPLES = {  # command -> a config that it runs
    "sft": "configs/tiny_sft.toml",
    "grpo": "configs/tiny_grpo.toml",
    "eval": "configs/tiny_eval.toml",
    "reject": "configs/tiny/r1_rejection.toml",
    "reward-model": "configs/tiny_reward_model.toml",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else rank.USAGE_ERROR
    return rank.exit_code(lambda: run(argv[0], argv[1:]))


def run(command: str, arguments: list[str]) -> int:
    """Dispatch; heavy imports happen only in the process that needs them."""
    if command in TOOLS:
        module, function = TOOLS[command]
        return getattr(importlib.import_module(f"megatron_r1.{module}"), function)(arguments)
    if command == "pipeline":
        return run_pipeline(arguments)
    if command not in rank.STAGES:
        raise ValueError(f"command {command!r}: no such command; use one of {', '.join([*TOOLS, 'pipeline', *rank.STAGES])}")
    if not arguments:
        raise ValueError(f"{command}: give a config file, as in: python -m megatron_r1 {command} {EXAMPLES[command]}")
    if "RANK" in os.environ:
        return rank.run(command, arguments)
    from megatron_r1.checks import check
    from megatron_r1.config import load
    from megatron_r1.launch import launch

    config = load(command, arguments[0], arguments[1:])
    with importing():  # the algorithm's module checks its options, and needs torch
        check(config)
    return launch(command, config)


def run_pipeline(arguments: list[str]) -> int:
    """R1's stages, each as if it had been typed."""
    from megatron_r1.config import load
    from megatron_r1.stages import pipeline

    listed, rest = "--list" in arguments, [a for a in arguments if a != "--list"]
    if not rest:
        raise ValueError("pipeline: give a config file, as in: python -m megatron_r1 pipeline configs/tiny/pipeline.toml")
    config = load("pipeline", rest[0], rest[1:])
    if listed:
        print(pipeline.listing(config))
        return 0
    return pipeline.main(config, lambda job: run(job.command, [job.config, *job.overrides]))


if __name__ == "__main__":
    sys.exit(main())
