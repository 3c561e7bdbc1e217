"""R1's stages as one graph (Nature 645, Fig. 2): each is a run of its own, and what one leaves in its folder the next begins from.

    base ---------------------------------------> r1_zero
    base -> cold_start -> rl_stage1 (Dev2) -> rejection
    base -> sft on rejection's conversations (Dev3) -> rl_stage2 (R1)
    student -> distill on the same conversations

A stage whose folder says `done` is passed over and one that is half done resumes, so a pipeline that was killed is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config_stages import PipelineConfig

MODEL, CONVERSATIONS = "hf", "conversations.jsonl"  # what a stage leaves in its folder


@dataclass(frozen=True)
class Stage:
    """One node: the model it begins from and the conversations it learns, each a file of the pipeline's or another stage's."""

    name: str  # also its folder in the pipeline's, and its key in the config
    command: str
    model: str  # "base", "student", or a stage
    conversations: str = ""  # a stage; "" = the stage's own config says, if it learns any


# The paper's order. Base begins both SFT stages: Dev2 only generates data (arXiv 2501.12948v2, B.4.2).
GRAPH = (
    Stage("r1_zero", "grpo", model="base"),
    Stage("r1_cold_start_sft", "sft", model="base"),
    Stage("r1_rl_stage1", "grpo", model="r1_cold_start_sft"),
    Stage("r1_rejection", "reject", model="r1_rl_stage1"),
    Stage("r1_sft", "sft", model="base", conversations="r1_rejection"),
    Stage("r1_rl_stage2", "grpo", model="r1_sft"),
    Stage("r1_distill", "sft", model="student", conversations="r1_rejection"),
)
NAMES = tuple(stage.name for stage in GRAPH)


@dataclass(frozen=True)
class Job:
    """One command line of the pipeline: `command config overrides...`, which writes `folder`."""

    name: str
    command: str
    config: str
    overrides: tuple[str, ...]
    folder: Path


def jobs(config: PipelineConfig) -> Iterator[Job]:
    """The stages that the config names, in the paper's order, each with the edges of the graph as overrides.

    Raises ValueError for a stage that begins from one that the config leaves out and that has not run.
    """
    root = Path(config.dir)
    models = {"base": config.base, "student": config.student or config.base}
    for stage in GRAPH:
        if stage.name not in config.stages:
            continue
        folder = root / stage.name
        edges = [f"run.dir={folder}", f"run.seed={config.seed}", f"model.path={models.get(stage.model, root / stage.model / MODEL)}"]
        if stage.conversations:
            edges.append(f"data.conversations={root / stage.conversations / CONVERSATIONS}")
        for source in (stage.model, stage.conversations):
            if source in NAMES and source not in config.stages and not (root / source / "done").exists():
                raise ValueError(f"stages.{stage.name}: begins from {source}, which is not in [stages] and has not run in {root}; add it")
        yield Job(stage.name, stage.command, config.stages[stage.name], tuple(edges), folder)


def selected(config: PipelineConfig) -> list[Job]:
    """The jobs between `first` and `last`, both included."""
    found = list(jobs(config))
    names = [job.name for job in found]
    for setting, name in (("first", config.first), ("last", config.last)):
        if name and name not in names:
            raise ValueError(f"{setting} = {name!r}: no such stage here; use one of {', '.join(names)}")
    start = names.index(config.first) if config.first else 0
    end = names.index(config.last) + 1 if config.last else len(found)
    return found[start:end]


def main(config: PipelineConfig, run: Callable[[Job], int], *, say: Callable[[str], None] = print) -> int:
    """Run what is not done, in order, by `run`; returns the exit code of the first that failed or was asked to end."""
    for job in selected(config):
        if (job.folder / "done").exists():
            say(f"--- {job.name}: done")
            continue
        say(f"--- {job.name}: {job.command} {job.config} {' '.join(job.overrides)}")
        code = run(job)
        if code or not (job.folder / "done").exists():
            return code
    return 0
