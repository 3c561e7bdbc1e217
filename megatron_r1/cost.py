"""What a run costs, in the form of the paper's table (arXiv 2501.12948v2, table 7): GPU hours a stage, and US$ at a price an hour.

Every device that a run holds is paid while it lasts, whether it works or waits: the trainer's GPUs through the rollout, the servers'
through the training. So a phase costs its seconds times all of them. On a CPU a trainer rank and a server's worker count as devices.
A step that was done again after a crash was paid twice. What a run did after its last record is in no record and not in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

Record = Mapping[str, float]

STEP = "time/step"
APART = ("time/evaluation", "time/between_steps")  # what time/step leaves out: start, checkpoints and what else no phase covers
WORKERS = ("tensor", "pipeline", "data")  # the parallel sizes of a vLLM server
SHORT = {"-tp": "tensor", "-pp": "pipeline", "-dp": "data"}


def devices(config: Mapping[str, Any], *, trainer: bool, rollouts: bool) -> int:
    """The devices that a run of this effective config holds: the trainer's where it trains, the servers' where it samples.

    Servers that take a trainer's weights by `ipc` live on its own GPUs. A config without these sections holds none.
    """
    ranks, r = config.get("parallel", {}).get("world_size", 0) if trainer else 0, config.get("rollout")
    if not rollouts or r is None or (trainer and r["weight_transfer"] == "ipc"):
        return ranks
    return ranks + (len(r["urls"]) or r["servers"]) * workers(r)


def workers(rollout: Mapping[str, Any]) -> int:
    """The devices of one vLLM server, all its nodes together."""
    sizes = {"tensor": rollout["tensor_parallel_size"]}
    arguments = [part for argument in rollout["vllm_args"] for part in argument.split("=", 1)]
    for flag, value in pairwise(arguments):
        name = SHORT.get(flag) or flag.removeprefix("--").removesuffix("-parallel-size")
        if name in WORKERS and value.isdigit():
            sizes[name] = int(value)
    return prod(sizes.values())


def phases(record: Record) -> dict[str, float]:
    """Seconds of each phase of a record; "other" is what of its step no phase covers."""
    timed = {name: seconds for name, seconds in record.items() if name.startswith("time/") and name != STEP}
    within = sum(seconds for name, seconds in timed.items() if name not in APART)
    other = max(0.0, record.get(STEP, within) - within)
    found = {name.removeprefix("time/"): seconds for name, seconds in timed.items()}
    return {**found, "other": other} if other else found


def seconds(record: Record) -> float:
    """Wall-clock seconds of a record; 0 for one of the optimizer steps within a rollout, whose time is in the last one's."""
    return sum(phases(record).values())


@dataclass
class Meter:
    """The running total of a run, as cost/ figures."""

    devices: int
    price: float  # US$ a device-hour
    device_seconds: float = 0.0

    def resume(self, records: Iterable[Record]) -> None:
        """Go on from what the run's earlier starts cost."""
        self.device_seconds = sum(device_seconds(r, otherwise=self.devices) for r in records)

    def add(self, record: Record) -> dict[str, float]:
        """cost/devices, and the totals including this record."""
        self.device_seconds += self.devices * seconds(record)
        hours = self.device_seconds / 3600
        return {"cost/devices": float(self.devices), "cost/gpu_hours": hours, "cost/usd": hours * self.price}

    def line(self) -> str:
        """The total so far, for a run's last words."""
        hours = self.device_seconds / 3600
        return f"cost: {number(hours)} GPU hours of {self.devices} devices, US$ {number(hours * self.price)} at {self.price:.2f} an hour"


def device_seconds(record: Record, *, otherwise: int) -> float:
    """A record's seconds times the devices it names; `otherwise` is for records that name none."""
    return seconds(record) * record.get("cost/devices", otherwise)


@dataclass(frozen=True)
class Cost:
    """A row of the table."""

    name: str
    devices: int  # the most that were held at once
    price: float  # US$ a device-hour
    wall_seconds: float
    phases: dict[str, float] = field(default_factory=dict)  # device-seconds a phase, the largest first

    @property
    def gpu_hours(self) -> float:
        return sum(self.phases.values()) / 3600

    @property
    def usd(self) -> float:
        return self.gpu_hours * self.price


def of_run(name: str, config: Mapping[str, Any], records: Iterable[Record]) -> Cost:
    """What the records of one run come to, by the effective config it left."""
    records = list(records)
    trained = any("policy/loss" in r for r in records)
    sampled = not trained or any("time/rollout" in r or "time/evaluation" in r for r in records)
    otherwise = devices(config, trainer=trained, rollouts=sampled)
    held = int(max((r.get("cost/devices", otherwise) for r in records), default=otherwise))
    sums: dict[str, float] = {}
    for r in records:
        for phase, value in phases(r).items():
            sums[phase] = sums.get(phase, 0.0) + value * r.get("cost/devices", otherwise)
    ordered = dict(sorted(sums.items(), key=lambda item: -item[1]))
    return Cost(name, held, config["run"].get("gpu_hour_price", 2.0), sum(seconds(r) for r in records), ordered)


def total(costs: list[Cost]) -> tuple[float, float]:
    """GPU hours and US$ of all rows."""
    return sum(c.gpu_hours for c in costs), sum(c.usd for c in costs)


def number(value: float) -> str:
    """Hours or US$ with as many digits as say something: 101,376  12.35  0.0041."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
