"""A real Slurm with virtual nodes, for the tests: started once, jobs submitted as a user submits them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_r1.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PACKAGES = "apt-get install slurm-wlm munge shellcheck gcc libslurm-dev"
STUB = str(HERE / "stub.sh")


def require(*programs: str, root: bool = True) -> None:
    """Skip, saying why, where there can be no Slurm; fail where there must be one, as in .ci/run."""
    missing = [name for name in programs if shutil.which(name) is None]
    if not missing and (os.geteuid() == 0 or not root):
        return
    why = f"SLURM SCRIPTS NOT TESTED: {', '.join(missing)} missing ({PACKAGES})" if missing else "SLURM SCRIPTS NOT TESTED: not root"
    (pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip)(why)


class Update(NamedTuple):
    """One line of a run's metrics that an optimizer step wrote."""

    step: int
    loss: float
    grad_norm: float


class Cluster:
    """Every job runs in ROOT, as from a clone, and writes to a folder of its own below `folder`."""

    def __init__(self, *, nodes: int, gpus: int) -> None:
        self.folder, self.size = Path(tempfile.mkdtemp(prefix="slurm-")), (nodes, gpus)
        self.folder.chmod(0o755)  # munged asks it of its socket's folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "NODE_GBPS": "0", "PRIVATE_API_KEY": "secret"}
        self.env |= {"PORT": str(free_port()), "SHM_MIB": "1"}  # by itself preflight wants 1 GiB; Docker gives a container 64 MiB
        (self.folder / "bin").mkdir()
        shutil.copy(HERE / "nvidia-smi", self.folder / "bin")
        self.env["PATH"] = f"{self.folder / 'bin'}:{self.env['PATH']}"

    def __enter__(self) -> Cluster:
        ports = [free_port() for _ in range(1 + self.size[0])]
        try:
            subprocess.run([HERE / "up.sh", self.folder, *map(str, (*self.size, *ports))], check=True, timeout=120)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run([HERE / "down.sh", self.folder], check=False, capture_output=True, timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *argv: str, check: bool = True, **env: str) -> str:
        """The output of a command on the login node."""
        found = subprocess.run(argv, cwd=ROOT, env=self.env | env, capture_output=True, text=True, check=False, timeout=60)
        assert not check or found.returncode == 0, f"{argv}: {found.stdout}{found.stderr}"
        return (found.stdout + found.stderr).strip()

    def wait(self, condition: Callable[[], Any], what: str, *, seconds: float = 400.0) -> Any:
        """The first true value of `condition`."""
        limit = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < limit, f"not within {seconds:g} s: {what}\n{self.run('squeue')}\n{self.logs()}"
            time.sleep(0.2)
        return value

    def wait_idle(self) -> None:
        """Until every node waits for work: what is submitted then starts at once."""
        self.wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(self.size[0]), "all nodes idle")

    def lose_node(self, name: str) -> None:
        """Slurm takes a node for dead: it kills what runs there and tells the jobs. The node's daemon answers, so it is soon back."""
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def logs(self) -> str:
        """The ends of all jobs' logs."""
        files = [f for pattern in ("*.out", "*.log") for f in sorted((self.folder / "runs").rglob(pattern))]
        return "\n".join(f"== {f}\n{f.read_text(errors='replace')[-1500:]}" for f in files if f.stat().st_size)


class Run:
    """A run's folder and the jobs of its name."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name, self.folder = cluster, name, cluster.folder / "runs" / name
        self.folder.mkdir(parents=True)

    def submit(self, script: str, *arguments: str, nodes: int, gpus: int = 1, **env: str) -> str:
        """sbatch; the job's id."""
        outputs = {"RUN": str(self.folder), "SBATCH_OUTPUT": f"{self.folder}/%j.out", "SBATCH_GPUS_PER_NODE": str(gpus)}
        return self.cluster.run("sbatch", "--parsable", "-J", self.name, f"--nodes={nodes}", script, *arguments, **(outputs | env))

    def jobs(self, *, state: str = "PD,CF,R,CG") -> list[str]:
        """Ids of the jobs that are not over."""
        return self.cluster.run("squeue", "-h", "-n", self.name, "-t", state, "-o", "%i").split()

    def wait_end(self) -> None:
        """Until the chain is over."""
        self.cluster.wait(lambda: not self.jobs(), f"the end of {self.name}")

    def wait_text(self, text: str, job: str | None = None) -> None:
        self.cluster.wait(lambda: text in self.output(job), f"{text!r} of {self.name}")

    def successor_of(self, job: str) -> str | None:
        """The job that runs after this one; None when the chain is over instead."""

        def found() -> list[str]:
            running = [j for j in self.jobs(state="running") if int(j) > int(job)]
            return running or ([] if self.jobs() else ["none"])

        [after] = self.cluster.wait(found, f"what comes after job {job} of {self.name}")
        return None if after == "none" else after

    def end_of(self, job: str) -> str:
        """How a job ended, as `FAILED 75`: its state, once its nodes are free, and the batch script's code."""

        def state() -> str | None:
            text = self.cluster.run("scontrol", "show", "job", job)
            found = " ".join(re.search(rf"{field}=(\w+)", text)[1] for field in ("JobState", "ExitCode"))
            return None if found.startswith("COMPLETING") else found

        return self.cluster.wait(state, f"the end of job {job}")

    def output(self, job: str | None = None) -> str:
        """What one job said, or all of them in their order."""
        files = [self.folder / f"{job}.out"] if job else sorted(self.folder.glob("*.out"), key=lambda f: int(f.stem))
        return "".join(f.read_text() for f in files if f.is_file())

    def hosts(self, job: str) -> list[str]:
        """The nodes that a job had."""
        nodes = re.search(r"^ +NodeList=(\S+)", self.cluster.run("scontrol", "show", "job", job), re.MULTILINE)[1]
        return self.cluster.run("scontrol", "show", "hostnames", nodes).split()

    def nodes(self, job: str) -> dict[str, list[str]]:
        """What a job's nodes are for: train, rollout, spare."""
        line = self.cluster.wait(lambda: re.search(r"train (.*) \| rollout (.*) \| spare(.*)", self.output(job)), f"the start of job {job}")
        return dict(zip(("train", "rollout", "spare"), map(str.split, line.groups()), strict=True))

    def saved(self) -> int:
        """Step of the last checkpoint, or 0."""
        latest = self.folder / "checkpoints/latest"
        return int(latest.read_text().strip().removeprefix("step-")) if latest.is_file() else 0

    def wait_save(self) -> int:
        """Until there is another checkpoint; its step."""
        before = self.saved()
        self.cluster.wait(lambda: self.saved() > before, f"a checkpoint of {self.name} after step {before}")
        return self.saved()

    def updates(self) -> list[Update]:
        """All optimizer steps in the order in which they were done, those done twice among them."""
        file = self.folder / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []
        return [Update(r["step"], r["policy/loss"], r["policy/grad_norm"]) for r in records if "policy/loss" in r]
