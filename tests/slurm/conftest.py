"""One Slurm for all tests of slurm/; the modules beside this file can be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cluster import Cluster, require


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """64 virtual nodes of 8 GPUs: what a job takes of them is its own business."""
    require("slurmctld", "slurmd", "munged", "sbatch", "gcc")
    with Cluster(nodes=64, gpus=8) as cluster:
        yield cluster
