"""SIGTERM and SIGUSR1 mean: save and end. Slurm sends them before a time limit."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Notes the signal on whichever rank got it; all ranks agree on the answer at the same point of the step."""

    def __init__(self) -> None:
        self.signal_name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. A collective: every rank calls it at the same place."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([float(bool(self.signal_name))], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
