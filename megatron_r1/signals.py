"""SIGTERM and SIGUSR1 mean: save and end. Slurm sends them before a time limit."""

from __future__ import annotations

import signal
from types import FrameType

from megatron_r1.mcore import distributed


class StopRequest:
    """Notes the signal on whichever rank got it; all ranks agree on the answer at the same point of the step."""

    def __init__(self) -> None:
        self._noted = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def is_noted(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._noted

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return distributed.any_rank(self._noted)
