"""Where the servers run: on GPUs of their own, or on the trainer's, where the one makes room for the other. Every rank makes each call.

    sending    the policy is in its place and the servers have room for weights
    sampling   the servers have all their memory
    training   the policy is in its place

R1's own way is "colocated": each phase loads what it needs and gives the memory back (arXiv:2501.12948v2, B.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from megatron_r1.mcore import distributed
from megatron_r1.rollout.engine import RolloutEngine


class Movable(Protocol):
    """What can leave the GPU and come back: mcore/offload.py."""

    @property
    def is_out(self) -> bool: ...

    def trim(self) -> None: ...

    def move_out(self) -> None: ...

    def move_in(self) -> None: ...


class Dedicated:
    """Servers on GPUs of their own: nobody has to move."""

    keeps_weights = True  # whether servers still have what they were sent when they sample again

    def sending(self) -> None: ...

    def sampling(self) -> None: ...

    def training(self) -> None: ...


class Colocated:
    """Servers on the trainer's GPUs, asleep when this begins. They sleep without their weights: new ones come before they sample again."""

    keeps_weights = False

    def __init__(self, engine: RolloutEngine, policy: Movable) -> None:
        self.engine, self.policy = engine, policy
        self.phase: Literal["sending", "sampling", "training"] = "training"

    def sending(self) -> None:
        """Wake the servers' weights beside the policy."""
        if self.phase == "sampling":  # a server came back in the middle of a rollout
            self.training()
        self.policy.trim()  # the activations of the last phase
        tell(self.engine.wake, "weights")
        self.phase = "sending"

    def sampling(self) -> None:
        """Move the policy out and wake the rest."""
        self.policy.move_out()
        tell(self.engine.wake, "kv_cache")
        self.phase = "sampling"

    def training(self) -> None:
        """Put the servers to sleep and move the policy back in; where that is so already, nothing."""
        if self.phase != "sampling":
            return
        tell(self.engine.sleep)
        self.policy.move_in()
        self.phase = "training"


def put_to_sleep(engine: RolloutEngine) -> None:
    """Servers on the trainer's GPUs, once they are up; what they need to start must be free, so before there is a policy. Collective."""
    tell(engine.sleep)


def tell(call: Callable[..., None], *tags: str) -> None:
    """Rank 0 tells the servers once every rank has made room; no rank goes on before they have done it, however long they start."""
    distributed.together()
    if distributed.rank() == 0:
        call(*tags)
    distributed.together()
