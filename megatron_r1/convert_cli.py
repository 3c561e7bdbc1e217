"""python -m megatron_r1 convert {hf-to-megatron,megatron-to-hf,fp8-cast,compare,verify} ...

Exit codes: 0 done; 1 what was compared differs; 2 a mistake of the user or a broken input, said in one line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run one of the commands; returns the exit code. Raises ValueError with one line for what a user can mend."""
    arguments = _parser().parse_args(argv)
    from megatron_r1.weights import conversion, plans  # torch, which -h can do without

    if arguments.command == "compare":
        from megatron_r1.weights.compare import compare

        return compare(arguments.a, arguments.b, tolerance=arguments.tolerance, side=arguments.hf, text=arguments.logits)
    if arguments.command == "verify":
        print(f"{arguments.folder}: {conversion.verify(arguments.folder)} tensors are what was written")
        return 0
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: use 1 or more")
    if arguments.command == "hf-to-megatron":
        plan = plans.hf_to_megatron(arguments.source)
    elif arguments.command == "megatron-to-hf":
        plan = plans.megatron_to_hf(arguments.source, to=arguments.to, side=arguments.hf)
    else:
        plan = plans.fp8_cast(arguments.source, to=arguments.to)
    print(plan.describe(arguments.workers))
    if arguments.dry_run:
        return 0
    options = {name: getattr(arguments, name) for name in ("workers", "resume", "overwrite", "allow_nan")}
    target = conversion.run(plan, arguments.target, **options)
    if arguments.verify:
        conversion.verify(target)
    print(f"{target}: done{' and verified' if arguments.verify else ''}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert", description="Checkpoints between Hugging Face and Megatron, in bounded memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="Hugging Face folder -> Megatron torch_dist checkpoint")
    to_hf = commands.add_parser("megatron-to-hf", help="Megatron torch_dist checkpoint -> Hugging Face folder")
    to_hf.add_argument("--hf", type=Path, help="folder with config.json and tokenizer, for a checkpoint that was not converted here")
    to_hf.add_argument("--to", choices=["same", "bf16", "fp8"], default="same", help="dtype of the weights (default: what they had)")
    cast = commands.add_parser("fp8-cast", help="Hugging Face folder: block FP8 -> bf16, or bf16 -> block FP8")
    cast.add_argument("--to", choices=["bf16", "fp8"], required=True)
    for command in (to_megatron, to_hf, cast):
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
        command.add_argument("--workers", type=int, default=2, help="threads (default 2)")
        command.add_argument("--dry-run", action="store_true", help="print tensors, bytes, memory and disk, and write nothing")
        command.add_argument("--resume", action="store_true", help="go on with a conversion that was interrupted")
        command.add_argument("--overwrite", action="store_true", help="replace what is at the target")
        command.add_argument("--verify", action="store_true", help="read the result again and check every tensor's hash")
        command.add_argument("--allow-nan", action="store_true", help="convert NaN and infinities instead of stopping")
    compare = commands.add_parser("compare", help="two checkpoints of any two formats: name, shape, dtype, hash, largest difference")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    compare.add_argument("--tolerance", type=float, help="count values as equal up to this difference, and dtypes as equal")
    compare.add_argument("--hf", type=Path, help="as for megatron-to-hf")
    compare.add_argument("--logits", metavar="TEXT", help="compare transformers' logits of this text with Megatron's instead")
    verify = commands.add_parser("verify", help="check a converted folder against its ledger")
    verify.add_argument("folder", type=Path)
    return parser


def tool(command: str) -> int:
    """The command line of one file in tools/convert/."""
    from megatron_r1.__main__ import main as program

    return program(["convert", command, *sys.argv[1:]])
