"""SIGTERM, SIGUSR1 and a file named `stop` in the run's folder mean: save and end. Slurm sends signals before a time limit."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    """Notes what was asked of this rank; all ranks agree on the answer at the same point of the step.

    `file` is looked for by one rank, which has one; the others give None.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._noted = False
        self._file = file
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def is_noted(self) -> bool:
        """Whether this rank was asked to stop; what was asked once stays asked."""
        self._noted = self._noted or (self._file is not None and self._file.exists())
        return self._noted

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        from megatron_r1.mcore import distributed  # a stage without ranks asks is_noted, and needs no Megatron

        return distributed.any_rank(self.is_noted())
