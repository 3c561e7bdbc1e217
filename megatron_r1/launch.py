"""One machine: starts the vLLM servers and the trainer ranks, restarts a dead server, ends everything when a rank fails.

On a cluster srun or torchrun starts the ranks and the servers run on nodes of their own; nothing here is needed then.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

from megatron_r1 import cost, rank
from megatron_r1.chat_templates import server_flags
from megatron_r1.checks import has_gpu
from megatron_r1.config import dump
from megatron_r1.config_stages import RejectionConfig, RewardModelConfig, StageConfig
from megatron_r1.config_types import Rollout
from megatron_r1.processes import die_with_parent, free_port
from megatron_r1.rollout.server_process import ServerProcess, model_flags, placement_flags, reward_server_command, server_command

POLL_SECONDS = 0.1
STDOUT, STDERR = 1, 2
GRACE_SECONDS = 60.0  # a rank asked to stop saves a checkpoint first


def named_gpus() -> list[str]:
    """The GPUs that this process was given by name."""
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def all_gpus() -> list[str]:
    """The same; the machine's where none are named. Counted without torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or not has_gpu() or shutil.which("nvidia-smi") is None:
        return named_gpus()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(len(re.findall(r"^GPU \d+:", listed, re.MULTILINE)))]


def server_gpus(config: StageConfig) -> list[str]:
    """The GPUs that the servers beside a stage's ranks share: those after the ranks', where they are to have their own, else all.

    Raises ValueError where there are too few.
    """
    r, there = config.rollout, all_gpus()
    if r.placement == "colocated" or r.weight_transfer == "ipc" or not has_gpu() or not config.needs_rollouts or r.urls:
        return there
    ranks = 0 if config.serves_own_weights else config.parallel.world_size
    each = cost.workers(r.model_dump())
    needed = ranks + r.servers * each
    if len(there) < needed:
        sharing = 'set rollout.placement = "colocated" with rollout.weight_transfer = "ipc"'
        raise ValueError(
            f"rollout.servers = {r.servers}: of {each} GPUs each, beside {ranks} trainer ranks, they need {needed} GPUs, and there are "
            f"{len(there)}; lower {f'these, or {sharing}' if ranks else 'it'}"
        )
    return there[ranks:needed]


def devices(server: int, *, servers: int, gpus: list[str]) -> dict[str, str]:
    """The environment that gives one of some servers its share of these GPUs; empty where none are named."""
    share = len(gpus) // servers
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[server * share :][:share])} if share else {}


def spanning(rollout: Rollout) -> list[str]:
    """vLLM's flags for a server whose workers are on several nodes; its other nodes compute and answer no requests."""
    if rollout.nodes == 1:
        return []
    flags = ["--nnodes", str(rollout.nodes), "--node-rank", str(rollout.node_rank), "--master-addr", rollout.head]
    return [*flags, *(["--headless"] if rollout.node_rank else [])]


def own_weights(config: StageConfig) -> list[str]:
    """vLLM's flags for servers that load the folder's weights, where no trainer sends them any; rejection sampling asks by chat."""
    if not config.serves_own_weights:
        return []
    chats = ["--no-tokens-only", *server_flags(config.chat_template)] if isinstance(config, RejectionConfig) else []
    return ["--load-format", "auto", *chats]


class Servers:
    """The vLLM servers of this machine. They start in the background; the trainer waits for them when it first needs them.

    gpus    what they share; without it all that this process was given by name
    """

    def __init__(self, config: StageConfig, logs: Path, *, gpus: list[str] | None = None) -> None:
        r, gpus = config.rollout, named_gpus() if gpus is None else gpus
        self.max_restarts = r.max_restarts
        self.restarts = 0
        self.processes: list[ServerProcess] = []
        for i in range(self.count(config)):
            port = r.port + i if r.port else free_port()
            argv, env = self.command(config, port)
            env |= devices(i, servers=r.servers, gpus=gpus)
            self.processes.append(ServerProcess(argv, env, host=r.host, port=port, log_file=logs / f"server{i}.log"))
        self.urls = r.urls or [p.url for p in self.processes]

    def count(self, config: StageConfig) -> int:
        """How many start here."""
        return 0 if config.rollout.urls or not config.needs_rollouts else config.rollout.servers

    def command(self, config: StageConfig, port: int) -> tuple[list[str], dict[str, str]]:
        """The command line and environment of the one at a port."""
        r = config.rollout
        flags = model_flags(quantization=r.quantization, head_dtype=config.kernels.head_dtype) + placement_flags(r.placement)
        return server_command(
            config.model.path,
            port=port,
            dtype=config.model.dtype,
            max_model_len=config.longest_completion + r.max_prompt_tokens,
            max_num_seqs=r.max_num_seqs,
            kv_cache_bytes=r.kv_cache_mib << 20,
            tensor_parallel_size=r.tensor_parallel_size,
            weight_transfer=r.weight_transfer,
            extra=["--host", r.host, *spanning(r), *flags, *own_weights(config), *r.vllm_args],
        )

    def __enter__(self) -> Servers:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.stop()

    def keep_alive(self) -> None:
        """Restart what has died; raises ValueError with the log's end when it dies too often."""
        for process in self.processes:
            if process.alive:
                continue
            self.restarts += 1
            if self.restarts > self.max_restarts:
                raise ValueError(f"rollout.max_restarts = {self.max_restarts}: a vLLM server died once more; {process.last_words()}")
            print(f"{process.url}: a vLLM server died, restart {self.restarts} of {self.max_restarts}; {process.last_words()}", flush=True)
            process.restart()


class RewardServers(Servers):
    """The servers of the reward model that a finished `reward-model` run has exported."""

    def count(self, config: RewardModelConfig) -> int:
        return config.rollout.servers

    def command(self, config: RewardModelConfig, port: int) -> tuple[list[str], dict[str, str]]:
        r, folder = config.rollout, Path(config.run.dir) / "hf"
        if not (folder / "config.json").is_file():
            raise ValueError(f"run.dir = {config.run.dir!r}: no exported reward model in its hf; train it first (the command reward-model)")
        return reward_server_command(
            str(folder),
            port=port,
            dtype=config.model.dtype,
            max_model_len=config.max_length,
            kv_cache_bytes=r.kv_cache_mib << 20,
            tensor_parallel_size=r.tensor_parallel_size,
            extra=["--host", r.host, *spanning(r), *r.vllm_args],
        )


class Ranks:
    """The trainer ranks of this machine: each runs one command line of this program, RANK and WORLD_SIZE as torchrun sets them.

    They are forked from this process, which imports for all of them what costs each 5 s of a core. Where there is a GPU they are
    spawned: an import may look for one, and what CUDA has begun does not survive a fork.
    """

    def __init__(self, stage: str, config_file: Path, *, overrides: list[str], world_size: int, logs: Path) -> None:
        how = "spawn" if has_gpu() else "fork"
        if how == "fork":
            rank.stage(stage)
        context = get_context(how)
        environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.logs = [logs / f"{stage}.rank{rank}.log" for rank in range(world_size)]
        self.processes = []
        for number, log in enumerate(self.logs):
            own = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
            process = context.Process(target=be_rank, args=(stage, [str(config_file), *overrides]), kwargs={"environment": own, "log": log})
            process.start()
            self.processes.append(process)

    def poll(self) -> list[int | None]:
        return [p.exitcode for p in self.processes]

    def signal(self, number: int) -> None:
        for p in self.processes:
            if p.exitcode is None:
                os.kill(p.pid, number)

    def end(self) -> None:
        """Ask, wait, then kill."""
        self.signal(signal.SIGTERM)
        limit = time.monotonic() + (GRACE_SECONDS if all(code in (None, 0) for code in self.poll()) else 2.0)
        while None in self.poll() and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)
        self.signal(signal.SIGKILL)
        for p in self.processes:
            p.join()

    def failure(self, seen: list[int | None]) -> str:
        """Why the run ended, from the log of the rank that failed first: its one line, or the traceback's end.

        seen    the exit codes when the first had failed; those that come after are of ranks that it took along
        """
        codes = next((codes for codes in (seen, self.poll()) if 2 in codes), seen)
        first = codes.index(2) if 2 in codes else next(i for i, code in enumerate(codes) if code)
        lines = self.logs[first].read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if codes[first] == 2 and errors:
            return errors[-1]
        return "\n".join([*lines[-25:], f"error: rank {first} ended with code {codes[first]}; whole log: {self.logs[first]}"])


def be_rank(stage: str, arguments: list[str], *, environment: dict[str, str], log: Path) -> None:
    """In a new process: one rank. Rank 0 speaks for all; what the others say is in their logs, as everybody's warnings and errors."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the launcher too, which asks for a save
    os.environ.update(environment)
    with log.open("ab") as file:
        for stream in (STDERR,) if environment["RANK"] == "0" else (STDOUT, STDERR):
            os.dup2(file.fileno(), stream)
    if "OMP_NUM_THREADS" not in os.environ:  # ranks and servers share the cores; spinning threads cost tenfold
        import torch

        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    sys.exit(rank.exit_code(lambda: rank.run(stage, arguments)))


def run_ranks(stage: str, config: StageConfig, servers: Servers) -> int:
    """Run one stage to its end under supervision; returns its exit code (0 done or saved on request, 2 user's error)."""
    folder = Path(config.run.dir)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    config_file = folder / f"{stage}.toml"
    config_file.write_text(dump(config))
    overrides = [f"rollout.urls={list(servers.urls)!r}".replace("'", '"')] if servers.urls else []
    ranks = Ranks(stage, config_file, overrides=overrides, world_size=config.parallel.world_size, logs=folder / "logs")

    def forward(number: int, frame: FrameType | None) -> None:
        ranks.signal(signal.SIGTERM if number == signal.SIGINT else number)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        while None in (codes := ranks.poll()) and not any(codes):
            servers.keep_alive()
            time.sleep(POLL_SECONDS)
    finally:
        if None in ranks.poll():
            ranks.end()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if any(codes):
        print(ranks.failure(codes), file=sys.stderr, flush=True)
        return 2 if 2 in ranks.poll() else 1
    return 0


def launch(stage: str, config: StageConfig) -> int:
    """Servers and ranks of one stage on this machine; returns the exit code."""
    with Servers(config, Path(config.run.dir) / "logs", gpus=server_gpus(config)) as servers:
        return run_ranks(stage, config, servers)
