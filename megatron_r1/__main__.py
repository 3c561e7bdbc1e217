"""The command line.

    python -m megatron_r1 demo                                            R1 in miniature, on this machine
    python -m megatron_r1 {sft,grpo,eval} CONFIG.toml [section.key=value ...]
    python -m megatron_r1 convert {hf-to-megatron,megatron-to-hf,fp8-cast,compare,verify} ...
    python -m megatron_r1 doctor                                          what is installed, and what is missing

Run by hand it starts the servers and ranks of this machine; run by srun or torchrun (RANK is set) it is one rank.
"""

from __future__ import annotations

import importlib
import os
import sys

USAGE_ERROR = 2  # exit code of every mistake a user can mend; its message is one line
COMMANDS = ("demo", "sft", "grpo", "eval", "convert", "doctor")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if argv else USAGE_ERROR
    try:
        return run(argv[0], argv[1:])
    except ValueError as error:
        if os.environ.get("MEGATRON_R1_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USAGE_ERROR


def run(command: str, arguments: list[str]) -> int:
    """Dispatch; heavy imports happen only in the process that needs them."""
    if command not in COMMANDS:
        raise ValueError(f"command {command!r}: no such command; use one of {', '.join(COMMANDS)}")
    if command == "doctor":
        from megatron_r1.doctor import doctor

        return doctor()
    if command == "convert":
        from megatron_r1 import convert_cli

        return convert_cli.main(arguments)
    if command == "demo":
        from megatron_r1.demo import demo

        return demo(arguments)
    if not arguments:
        raise ValueError(f"{command}: give a config file, as in: python -m megatron_r1 {command} configs/tiny_{command}.toml")
    from megatron_r1.config import load

    config = load(command, arguments[0], arguments[1:])
    if "RANK" in os.environ:
        module = {"eval": "evaluate"}.get(command, command)
        importlib.import_module(f"megatron_r1.stages.{module}").main(config)
        return 0
    from megatron_r1.checks import check
    from megatron_r1.launch import launch

    check(config)
    return launch(command, config)


if __name__ == "__main__":
    sys.exit(main())
