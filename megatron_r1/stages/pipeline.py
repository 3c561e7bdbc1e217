"""R1's stages as one graph (Nature 645, Fig. 2): each is a run of its own, and what one leaves in its folder the next begins from.

    base ---------------------------------------------> R1-Zero
    base -> cold start: Dev1 -> RL stage 1: Dev2 -> rejection sampling
    base -> SFT on what that kept: Dev3 -> RL stage 2: R1
    student -> SFT on the same conversations

A stage whose folder says `done` is passed over and one that is half done goes on, so a pipeline that was killed is started again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_r1 import runs, status
from megatron_r1.config_stages import PipelineConfig
from megatron_r1.run_folder import DONE

MODEL, CONVERSATIONS = "hf", "conversations.jsonl"  # what a stage leaves in its folder


@dataclass(frozen=True)
class Stage:
    """One node of the graph; `model` and `conversations` are its edges: a stage, or a folder that the pipeline is given."""

    name: str  # its folder in the pipeline's, and its key in [stages]
    command: str
    model: str  # what it begins from: "base", "student", or a stage
    makes: str = ""  # the paper's name of the model that comes out; "" = no model
    conversations: str = ""  # what it learns: "cold_start", or the stage that wrote it; "" = it learns from problems


# Base begins both SFT stages: Dev2 only makes data (arXiv 2501.12948v2, B.4.2).
GRAPH = (
    Stage("r1_zero", "grpo", model="base", makes="R1-Zero"),
    Stage("r1_cold_start_sft", "sft", model="base", conversations="cold_start", makes="Dev1"),
    Stage("r1_rl_stage1", "grpo", model="r1_cold_start_sft", makes="Dev2"),
    Stage("r1_rejection", "reject", model="r1_rl_stage1"),
    Stage("r1_sft", "sft", model="base", conversations="r1_rejection", makes="Dev3"),
    Stage("r1_rl_stage2", "grpo", model="r1_sft", makes="R1"),
    Stage("r1_distill", "sft", model="student", conversations="r1_rejection", makes="student"),
)
NAMES = tuple(stage.name for stage in GRAPH)


@dataclass(frozen=True)
class Job:
    """One run: `command config overrides...`, which leaves `folder`."""

    name: str
    command: str
    config: str
    overrides: tuple[str, ...]
    folder: Path
    measures: str = ""  # of an evaluation: the model's name


def main(config: PipelineConfig, run: Callable[[Job], int]) -> int:
    """Run what is not done, in order, by `run`; then print the table. Returns the exit code of the first that did not end well."""
    chosen = jobs(config)
    for job in chosen:
        if (job.folder / DONE).exists():
            print(f"--- {job.name}: done", flush=True)
            continue
        print(f"\n--- {job.name}: {job.command} {job.config} {' '.join(job.overrides)}", flush=True)
        code = run(job)
        if code or not (job.folder / DONE).exists():  # failed, or saved and ended on request
            return code
    tested = [job for job in chosen if job.measures]
    if tested:
        Console().print(table(tested), status.costs(runs.find(Path(config.dir))))
    return 0


def jobs(config: PipelineConfig) -> list[Job]:
    """The runs from `first` to `last`, in the paper's order; raises ValueError for a stage that is unknown, begins from nothing or has run
    with another seed."""
    for setting, names in (("stages", config.stages), ("first", [config.first]), ("last", [config.last])):
        for name in names:
            if name and name not in NAMES:
                raise ValueError(f"{setting}: {name!r} is no stage of R1; use one of {', '.join(NAMES)}")
    begin = NAMES.index(config.first) if config.first else 0
    end = NAMES.index(config.last) + 1 if config.last else len(NAMES)
    found = [evaluation(config, "base", config.base_model, measures="Base")] if config.evaluation and not begin else []
    for stage in GRAPH[begin:end]:
        if stage.name in config.stages:
            found += of_stage(config, stage)
    for job in found:
        runs.check_seed(job.folder, config.seed)
    return found


def of_stage(config: PipelineConfig, stage: Stage) -> Iterator[Job]:
    """The stage's run, with the edges of the graph as overrides, and the evaluation of what it makes."""
    root = Path(config.dir)
    given = {"base": config.base_model, "student": config.student, "cold_start": config.cold_start}
    for source in (stage.model, stage.conversations):
        if source in NAMES and source not in config.stages and not (root / source / DONE).exists():
            raise ValueError(f"stages.{stage.name}: begins from {source}, which is not among [stages] and not done in {root}; add it")
    model = given.get(stage.model, str(root / stage.model / MODEL))
    if not model:
        raise ValueError(f"{stage.model}: required by stages.{stage.name}; give a model folder")
    edges = [f"run.dir={root / stage.name}", f"run.seed={config.seed}", f"model.path={model}"]
    if conversations := given.get(stage.conversations, stage.conversations and str(root / stage.conversations / CONVERSATIONS)):
        edges.append(f"data.conversations={conversations}")
    if config.problems:
        edges.append(f"data.jsonl={config.problems}")
    yield Job(stage.name, stage.command, config.stages[stage.name], tuple(edges), root / stage.name)
    if stage.makes and config.evaluation:
        yield evaluation(config, stage.name, str(root / stage.name / MODEL), measures=stage.makes)


def evaluation(config: PipelineConfig, name: str, model: str, *, measures: str) -> Job:
    """The evaluation of one model."""
    folder = Path(config.dir) / "evaluation" / name
    overrides = [f"run.dir={folder}", f"run.seed={config.seed}", f"model.path={model}"]
    if config.problems:
        overrides.append(f"data.jsonl={config.problems}")
    return Job(f"evaluation of {measures}", "eval", config.evaluation, tuple(overrides), folder, measures)


def table(tested: list[Job]) -> Table:
    """Held-out accuracy by checkpoint."""
    rows = [(job.measures, json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[-1])) for job in tested]
    result = Table("checkpoint", "pass@1", "+-", "tokens", title=f"{int(rows[0][1]['eval/problems'])} held-out problems")
    for name, r in rows:
        error = 1.96 * r.get("eval/pass@1_stderr", 0.0)
        result.add_row(name, f"{r['eval/pass@1']:.3f}", f"{error:.3f}", f"{r['eval/length_mean']:.1f}")
    return result


def listing(config: PipelineConfig) -> str:
    """A line a run for slurm/pipeline.sh: name, stage, settings of the job, config, overrides."""
    lines = []
    for job in jobs(config):
        name = job.name.replace(" ", "_")
        settings = f"RUN={job.folder.resolve()} {config.job.get(job.name) or config.job.get(job.command, '')}".strip()
        lines.append(f"{name} {job.command} {settings} {job.config} {' '.join(o for o in job.overrides if not o.startswith('run.dir='))}")
    return "\n".join(lines)
