"""The GPU check: its sections in turn, each a process of its own so that one that fails takes no other with it, then table and JSON.

    layers    Transformer Engine's layers against Megatron's local ones, packed sequences against single ones, export, the FP8 quantiser
    curve     50 steps in FP8 against 50 in bf16, from the same weights on the same data
    speed     milliseconds of a step on V3's layers in bf16 and FP8, against a bare Megatron-Core loop and against one large matmul
    rollout   `megatron_r1 grpo` with a vLLM server on the same GPU: the sync, the log-probs' gap, with weights in bf16 and in block FP8

What is not installed is skipped, and the table says so.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_check.report import Row, as_json, collect, table
from megatron_r1.processes import free_port

LIMIT_SECONDS = 470.0  # for all of it
SECTIONS = {"layers": 120.0, "curve": 120.0, "speed": 150.0, "rollout": 240.0}  # the most that each may take
PACKAGES = ("torch", "transformer-engine", "megatron-core", "vllm", "flash-attn", "apex")
DEFAULT = "gpu_check.json"


def main(arguments: list[str]) -> int:
    """Run all sections and write the JSON to the file named first; 0 when every target was met, 1 when not, 2 without a GPU."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        print("error: make gpu-check: needs an NVIDIA GPU that torch sees, and there is none here", file=sys.stderr)
        return 2
    device, started = torch.cuda.get_device_properties(0), time.monotonic()
    about = {"device": f"{device.name} ({device.total_memory >> 30} GiB)", "date": datetime.date.today().isoformat()}
    about |= {"python": platform.python_version(), "cuda": torch.version.cuda} | versions()
    rows: list[Row] = []
    for name, limit in SECTIONS.items():
        left = LIMIT_SECONDS - (time.monotonic() - started)
        rows += run(name, limit=min(limit, left)) if left > 10 else [Row(name, "all", None, note="no time was left")]
        print(f"{name}: done after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    about["seconds"] = f"{time.monotonic() - started:.0f}"
    print(table(rows, about))
    file = Path(arguments[0] if arguments else DEFAULT)
    file.write_text(json.dumps(as_json(rows, about), indent=1) + "\n")
    print(f"\n{file}")
    return int(any(row.verdict == "MISSED" for row in rows))


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(section: str, *, limit: float) -> list[Row]:
    """One section as rank 0 of one; a failure or a limit that ran out is a row, after those that it had found."""
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join(sys.path)}
    module = "rollout" if section == "rollout" else "training"
    argv = [sys.executable, "-m", f"benchmarks.gpu_check.{module}", section]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # a run of rollout ends its own servers
        output, errors = process.communicate()
        return [*collect(output), Row(section, "the rest", None, note=f"not done within {limit:.0f} s")]
    rows = collect(output)
    if process.returncode:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
        rows.append(Row(section, "the rest", float("nan"), target=0.0, note=f"failed: {last.strip()[:200]}"))
        print(errors, file=sys.stderr)
    return rows
