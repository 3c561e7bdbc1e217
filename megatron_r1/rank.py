"""One rank of a stage, whoever started it: the launcher on one machine, srun or torchrun on a cluster."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

from megatron_r1.processes import importing

USAGE_ERROR = 2  # exit code of every mistake a user can mend; its message is one line
STAGES = {  # command -> file in stages/
    "sft": "sft",
    "grpo": "grpo",
    "reject": "rejection",
    "eval": "evaluate",
    "reward-model": "reward_model",
}


def exit_code(run: Callable[[], int]) -> int:
    """What `run` returns, or USAGE_ERROR for a ValueError, whose message goes to standard error as one line."""
    try:
        return run()
    except ValueError as error:
        if os.environ.get("MEGATRON_R1_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USAGE_ERROR


def stage(command: str) -> ModuleType:
    """The module of a stage, with all that it computes with: seconds of a core."""
    with importing():
        return importlib.import_module(f"megatron_r1.stages.{STAGES[command]}")


def run(command: str, arguments: list[str]) -> int:
    """Be one of the ranks of `command CONFIG.toml overrides...`, as RANK, WORLD_SIZE and MASTER_ADDR say."""
    from megatron_r1.config import load

    config = load(command, arguments[0], arguments[1:])
    started = int(os.environ["WORLD_SIZE"])
    if started != (world_size := config.parallel.world_size):
        raise ValueError(f"parallel.world_size = {world_size}: {started} ranks were started; set it to {started} or start {world_size}")
    stage(command).main(config)
    return 0
