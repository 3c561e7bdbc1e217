"""One `vllm serve` process on this machine: its command line, its log, its start, end and restart. Imports neither torch nor vllm."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_r1.processes import die_with_parent

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for a server asked to stop

COMMON_ENV = {
    "VLLM_SERVER_DEV_MODE": "1",  # registers /pause, /update_weights and their like
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a local folder
}
# rollout.weight_transfer -> vLLM's name of the backend, where many ranks send (vllm_engines.py); its own "nccl" has one sender
SENDING = {"gloo": "gloo", "nccl": "nccl_senders"}
# weights/fp8.py's QUANTIZATION; this file imports no torch
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
CPU_ENV = {
    "OMP_NUM_THREADS": "1",  # two threads a server spin against each other on shared cores: 50 tok/s instead of 4,000
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default wants a NUMA node for each worker
    "TORCHDYNAMO_DISABLE": "1",  # or the first request compiles gather_logprobs, with a C++ compiler
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets the worker live in the engine's process
    # glibc would give a step's activations back to the kernel and ask for them again: 600 page faults a step, 2% of its time
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}
# A prompt in chunks is sampled from at each, and vLLM takes back what that drew of its seed; torch's CPU generators cannot, and the engine
# dies. MLA has no chunks on a CPU anyway.
CPU_SWITCHES = ["--enforce-eager", "--no-enable-chunked-prefill"]


def is_cpu_build() -> bool:
    """Whether the vLLM installed here is the CPU build."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def server_command(
    model_folder: str,
    *,
    port: int,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_bytes: int | None = None,
    tensor_parallel_size: int = 1,
    weight_transfer: str = "gloo",
    extra: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of one server of the model in `model_folder` (config.json is enough: weights come later).

    It listens on 127.0.0.1 with vLLM's unauthenticated development endpoints; `extra` is appended and wins, for example
    ("--host", "10.0.0.7") on a private network or ("--load-format", "auto") to serve the folder's own weights.
    """
    config_file = Path(model_folder) / "config.json"
    if not config_file.is_file():
        raise ValueError(f"model.path = {model_folder!r}: no config.json there; give a Hugging Face model folder")
    hf = json.loads(config_file.read_text())
    flags: dict[str, object] = {
        "host": "127.0.0.1",
        "port": port,
        "dtype": dtype,
        "load-format": "dummy",
        "max-model-len": max_model_len,
        "max-num-seqs": max_num_seqs,
        "tensor-parallel-size": tensor_parallel_size,
        "served-model-name": "policy",
        "generation-config": "vllm",  # the folder's generation_config.json must not change how requests sample
        "logprobs-mode": "processed_logprobs",
        "weight-transfer-config": json.dumps({"backend": SENDING.get(weight_transfer, weight_transfer)}),
    }
    if kv_cache_bytes is not None:
        flags["kv-cache-memory-bytes"] = kv_cache_bytes
    env = dict(COMMON_ENV)
    if is_cpu_build():
        env |= CPU_ENV
        flags |= cpu_flags(hf, tensor_parallel_size)
    if weight_transfer == "ipc":
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # CUDA handles travel pickled
    switches = ["--tokens-only", "--disable-log-stats", "--disable-uvicorn-access-log", *(CPU_SWITCHES if is_cpu_build() else [])]
    pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "megatron_r1.rollout.vllm_serve", model_folder, *pairs, *switches, *extra], env


def reward_server_command(
    model_folder: str,
    *,
    port: int,
    dtype: str,
    max_model_len: int,
    kv_cache_bytes: int | None = None,
    tensor_parallel_size: int = 1,
    extra: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """The same of a server of a reward model's folder, with the folder's own weights: it answers /classify (rewards/reward_model.py)."""
    hf = json.loads((Path(model_folder) / "config.json").read_text())
    flags: dict[str, object] = {"host": "127.0.0.1", "port": port, "runner": "pooling", "dtype": dtype, "max-model-len": max_model_len}
    flags["tensor-parallel-size"] = tensor_parallel_size
    if kv_cache_bytes is not None:
        flags["kv-cache-memory-bytes"] = kv_cache_bytes
    env = {name: value for name, value in COMMON_ENV.items() if name != "VLLM_SERVER_DEV_MODE"}
    switches = ["--disable-log-stats", "--disable-uvicorn-access-log"]
    if is_cpu_build():
        env |= CPU_ENV
        flags |= cpu_flags(hf, tensor_parallel_size)
        switches.append("--enforce-eager")
    pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "megatron_r1.rollout.vllm_serve", model_folder, *pairs, *switches, *extra], env


def placement_flags(placement: str) -> list[str]:
    """Flags by which a server can give its memory back; the CPU build takes /sleep as it is, and keeps its memory."""
    if placement != "colocated" or is_cpu_build():
        return []
    # how much of the GPU must be free for it to start or start again; the cache has its size from rollout.kv_cache_mib
    return ["--enable-sleep-mode", "--gpu-memory-utilization", "0.01"]


def model_flags(*, quantization: str, head_dtype: str) -> list[str]:
    """Flags by which a server computes what the trainer sends and as the trainer does: what config.json, the trainer's, does not say."""
    overrides: dict[str, object] = {}
    if quantization == "fp8":
        overrides["quantization_config"] = FP8
    if head_dtype != "model":
        overrides["head_dtype"] = head_dtype
    return ["--hf-overrides", json.dumps(overrides)] if overrides else []


def cpu_flags(hf: dict[str, object], tensor_parallel_size: int) -> dict[str, object]:
    """What the CPU build needs; raises ValueError for shapes its attention kernel lacks."""
    flags: dict[str, object] = {"distributed-executor-backend": "uni" if tensor_parallel_size == 1 else "mp"}
    if hf.get("kv_lora_rank"):
        shape = (hf["kv_lora_rank"], hf["qk_rope_head_dim"])
        if shape != (512, 64):
            raise ValueError(f"kv_lora_rank, qk_rope_head_dim = {shape}: vLLM's CPU kernel takes only (512, 64); set these in config.json")
        flags["attention-backend"] = "CPU_MLA"  # an AMX machine would pick a bfloat16-only one by itself
    return flags


class ServerProcess:
    """A server under supervision. `start` returns at once; errors carry the line of the log that says why."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], *, host: str = "127.0.0.1", port: int, log_file: Path) -> None:
        self.argv, self.env, self.host, self.port, self.log_file = list(argv), env, host, port, log_file
        self.url = f"http://{host}:{port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.log_start = 0  # where this start's lines begin in the log
        self.started = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the server in a process group of its own; ValueError if the port is taken."""
        assert not self.alive, f"{self.url=} runs already"
        if error := self.port_error():
            raise ValueError(f"port {self.port}: in use ({error}); end the process that holds it or take another")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self.log_start = log.tell()
            env = {**os.environ, **self.env}
            self.process = subprocess.Popen(
                self.argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent
            )
        self.started = time.monotonic()

    def port_error(self) -> str | None:
        """Why the port cannot be taken now, or None."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of a dead server's connections is no hindrance
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                return error.strerror
        return None

    def wait_ready(self, limit_seconds: float) -> float:
        """Block until /health answers; returns the seconds since `start`. ValueError if the server ends or the limit runs out."""
        while True:
            seconds = time.monotonic() - self.started
            if not self.alive:
                assert self.process is not None, f"{self.url=} was never started"
                raise ValueError(f"{self.url}: the vLLM server ended with code {self.process.returncode} at start; {self.last_words()}")
            if self.healthy():
                return seconds
            if seconds > limit_seconds:
                raise ValueError(
                    f"{self.url}: the vLLM server is not ready after {limit_seconds:g} s "
                    f"(rollout.start_timeout_seconds: raise it); {self.last_words()}"
                )
            time.sleep(POLL_SECONDS)

    def healthy(self) -> bool:
        """One request to /health."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=2.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the server and all it started; returns when they are gone."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it had its time
            self.process.wait(GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the whole process group at once: an engine can outlive its killed server and hold the memory."""
        assert self.process is not None, f"{self.url=} was never started"
        with contextlib.suppress(ProcessLookupError):  # all of it is gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        """Start again on the same port; the new server has no weights until the trainer sends them."""
        self.stop()
        limit = time.monotonic() + GRACE_SECONDS
        while self.port_error() and time.monotonic() < limit:  # the engine has the port too, and ends a moment later
            time.sleep(POLL_SECONDS)
        self.start()

    def last_words(self) -> str:
        """The log's line that says most about a failure, and where the log is. One line."""
        with self.log_file.open("rb") as log:
            log.seek(self.log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\b\w*(Error|Exception): ", line) and " WARNING " not in line]
        words = (errors or lines[-1:] or ["nothing"])[0]
        words = re.sub(r"^(\(.*?\) )?\w+ \d\d-\d\d [\d:]+ \[[^]]*\] ", "", words)  # vLLM's prefix: process, level, time, line
        return f"its log says {words.strip()!r} ({self.log_file})"
