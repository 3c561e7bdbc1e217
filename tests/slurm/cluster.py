"""A real Slurm with virtual nodes, for the tests: started once a module, jobs submitted as a user submits them."""

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
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")


def require_slurm() -> None:
    """Skip, saying why, where there can be none."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        why = f"{', '.join(missing)} missing (apt-get install slurm-wlm munge)" if missing else "not root"
        pytest.skip(f"SLURM SCRIPTS NOT TESTED: {why}")


def open_folder() -> Path:
    """A temporary folder that all may enter, as munged asks of its socket's."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    return folder


class Cluster:
    """`folder` holds its state; every job runs in ROOT, as from a clone, and writes to a folder of its own."""

    def __init__(self, folder: Path, *, nodes: int, gpus: int) -> None:
        self.folder, self.nodes, self.gpus = folder, nodes, gpus
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "SBATCH_GPUS_PER_NODE": str(gpus), "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Cluster:
        try:
            subprocess.run([HERE / "up.sh", self.folder, str(self.nodes), str(self.gpus)], check=True, timeout=120)
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

    def submit(self, run: Path, script: str, *arguments: str, nodes: int, **env: str) -> str:
        """sbatch; returns the job's id. `run` is the run's folder and its name the job's."""
        run.mkdir(parents=True, exist_ok=True)
        options = ["--parsable", "-J", run.name, f"--nodes={nodes}", f"--output={run}/%j.out"]
        return self.run("sbatch", *options, script, *arguments, RUN=str(run), SBATCH_OUTPUT=f"{run}/%j.out", **env)

    def jobs(self, name: str) -> list[str]:
        """Ids of the jobs of this name that are not over."""
        return self.run("squeue", "-h", "-n", name, "-o", "%i").split()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[1]

    def wait(self, condition: Callable[[], Any], what: str, *, seconds: float = 240.0) -> Any:
        """The first true value of `condition`."""
        limit = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < limit, f"not within {seconds:g} s: {what}\n{self.run('squeue')}\n{self.logs()}"
            time.sleep(0.2)
        return value

    def wait_end(self, name: str, *, seconds: float = 240.0) -> None:
        """Until the chain of this name is over."""
        self.wait(lambda: not self.jobs(name), f"the end of {name}", seconds=seconds)

    def logs(self) -> str:
        """The ends of all jobs' logs."""
        files = sorted(self.folder.rglob("*.out")) + sorted(self.folder.rglob("*.log"))
        return "\n".join(f"== {f}\n{f.read_text(errors='replace')[-1500:]}" for f in files if f.stat().st_size)


def output(run: Path) -> str:
    """What all jobs of a run said, in their order."""
    return "".join(f.read_text() for f in sorted(run.glob("*.out"), key=lambda f: int(f.stem)))


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Of each optimizer step: the loss and the gradient norm; of a step done twice, the last."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {r["step"]: (r["policy/loss"], r["policy/grad_norm"]) for r in records if "policy/loss" in r}
