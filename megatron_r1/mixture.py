"""The problems of R1's second RL stage: reasoning alone at first, general prompts among them in its last steps.

General prompts are judged by reward models, and the policy learns to please those: the paper gives them the last 400 of 1,700
steps (Nature 645, 633; Methods). Which reward a prompt gets is decided by its `source`.
"""

from __future__ import annotations

from typing import Any

from megatron_r1.data import Dataset, jsonl_rows
from megatron_r1.problem import Problem


def load_general(path: str, *, first_id: int) -> list[Problem]:
    """General prompts of a JSONL file, {"prompt": "...", "source": "helpful"} a line; there is no reference answer.

    Raises ValueError with file and line for anything else.
    """
    problems = []
    for where, row in jsonl_rows(path):
        for name in ("prompt", "source"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{where}: {name!r} is {row.get(name)!r}; it must be text (the source decides the reward)")
        problems.append(Problem(id=first_id + len(problems), prompt=row["prompt"], answer="", source=row["source"]))
    return problems


class Mixture:
    """Batches of reasoning problems; from optimizer step `from_step` on, `general_count` of each are general ones.

    What comes depends on the two cursors and the step alone.
    """

    def __init__(self, reasoning: Dataset[Problem], general: Dataset[Problem] | None = None, *, general_count: int = 0, from_step: int = 0):
        """Raises ValueError for a batch's share of none, or of more than there are."""
        if general is not None and not 0 < general_count <= len(general):
            raise ValueError(
                f"general.share: makes {general_count} general prompts a batch of {len(general)} in general.jsonl; "
                "choose a share that gives one or more, and no more than there are"
            )
        self.reasoning, self.general = reasoning, general
        self.general_count, self.from_step = general_count, from_step

    def all(self) -> list[Problem]:
        """Every problem that may come."""
        return [*self.reasoning.items, *(self.general.items if self.general is not None else ())]

    def take(self, count: int, *, step: int) -> list[Problem]:
        """The batch of `count` that is trained on from optimizer step `step` on."""
        if self.general is None or step < self.from_step:
            return self.reasoning.take(count)
        general = self.general.take(self.general_count)
        return self.reasoning.take(count - self.general_count) + general if count > self.general_count else general

    def state_dict(self) -> dict[str, Any]:
        """Both cursors; that of reasoning problems alone where there are no others."""
        return self.reasoning.state_dict() | ({"general": self.general.state_dict()} if self.general is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the cursors were saved. Raises ValueError when data or seed are others than then."""
        if self.general is not None and "general" in state:
            self.general.load_state_dict(state["general"])
        elif "general" in state:
            raise ValueError("the checkpoint's data cursor has general prompts, this run none; set general.jsonl, or a new run.dir")
        self.reasoning.load_state_dict(state)
