"""One GRPO run that everything happens to, with the real trainer and real vLLM servers: 2 nodes train, 1 serves, 1 is spare.

Each fault ends a job or does not; the run goes on from its last checkpoint and, at the end, has the losses of a run that nothing
disturbed, on one node with its server beside it, in the time in which this one hangs.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field

from cluster import ROOT, Cluster, Run

CONFIG = """
steps = {steps}
reference_refresh_steps = 4
[model]
path = "{model}"
init = "random"
[kernels]
transformer_impl = "local"  # though a driver is there, for preflight
[parallel]
expert_model_parallel_size = 2
timeout_minutes = 5
[optimizer]
lr = 1e-3
[data]
jsonl = "{folder}/problems.jsonl"
[batch]
problems = 2
completions = 4
minibatches = 2
chunk_tokens = 512
[rollout]
max_prompt_tokens = 96
kv_cache_mib = 64
max_num_seqs = 16
start_timeout_seconds = 300.0
[sampling]
max_tokens = 16
[rewards]
weights = {{ "tests.slurm.length_reward" = 1.0 }}
[checkpoint]
every = 2
"""
STEPS = 28
STALL_MINUTES = 0.5
SAME, SUCCESSOR, OVER = "the job goes on", "its successor goes on", "the chain is over"


@dataclass
class End:
    """What became of a job, and of the run after it; `first` is the first of the run's updates that came after the fault."""

    job: str
    then: str
    first: int


@dataclass
class Story:
    """All runs, and the end of each fault."""

    cluster: Cluster
    run: Run
    unbroken: Run
    ends: dict[str, End] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)  # what the job of each fault said
    bad: list[str] = field(default_factory=list)  # the first job's bad node, and that of the job without a spare
    nodes: list[dict[str, list[str]]] = field(default_factory=list)  # what became of the others, in that and the successor of this
    stacks: str = ""  # what the ranks of the run that hung wrote

    def submit(self, run: Run, *overrides: str, **settings: str) -> str:
        sizes = {"TRAIN_NODES": "2", "ROLLOUT_NODES": "1"} | settings
        return run.submit("slurm/grpo.sh", f"{self.cluster.folder}/grpo.toml", *overrides, nodes=int(sizes.pop("NODES", "4")), **sizes)

    def note(self, fault: str, job: str) -> str | None:
        """Wait for what comes after a fault's job and keep both; the next job."""
        after = self.run.successor_of(job)
        self.keep(fault, job, SUCCESSOR if after else OVER)
        return after

    def keep(self, fault: str, job: str, then: str) -> None:
        self.ends[fault] = End(self.run.end_of(job), then, len(self.run.updates()))
        self.outputs[fault] = self.run.output(job)

    def wait_for(self, job: str, log: str, text: str = "") -> None:
        """Until a task of the job has written this."""
        file = self.run.folder / "logs" / job / log
        self.cluster.wait(lambda: file.is_file() and text in file.read_text(errors="replace"), f"{text!r} in {file}")

    def signal_ranks(self, signal: str, *options: str) -> bool:
        """To the trainer's ranks, and to no srun that names their command; whether there are any."""
        command = f"^[^ ]*/python -m megatron_r1 grpo .*run.dir={self.run.folder} "
        return subprocess.run(["pkill", f"-{signal}", *options, "-f", command], check=False).returncode == 0

    def signal_server(self, signal: str, job: str) -> None:
        [node] = self.run.nodes(job)["rollout"]
        subprocess.run(["pkill", f"-{signal}", "-f", f"^[^ ]*/python -m megatron_r1.rollout.vllm_serve .*--host {node}( |$)"], check=True)


def tell(cluster: Cluster) -> Story:
    """Everything that happens, in its order."""
    (cluster.folder / "problems.jsonl").write_text("".join(f'{{"prompt": "{i} + {i}", "answer": "{2 * i}"}}\n' for i in range(64)))
    (cluster.folder / "grpo.toml").write_text(CONFIG.format(folder=cluster.folder, model=ROOT / "configs/models/tiny_v3", steps=STEPS))
    story = Story(cluster, Run(cluster, "faulty"), Run(cluster, "unbroken"))
    job = signals(story)
    job = lost_nodes(story, job)
    job = time_limit(story, job)
    crash_loop(story, job)
    stall(story)
    ending(story)
    story.unbroken.wait_end()
    return story


def signals(story: Story) -> str:
    """A bad node in the first job, which USR1 ends; a rank of the second is killed."""
    run = story.run
    (run.folder / "bad").touch()
    job = story.submit(run)
    story.nodes.append(run.nodes(job))
    story.bad.append((run.folder / "bad").read_text().strip())
    (run.folder / "bad").unlink()
    run.wait_save()
    story.keep("bad node, a spare", job, SAME)
    story.cluster.run("scancel", "--batch", "--signal=USR1", job)
    job = story.note("USR1", job)
    run.wait_save()
    story.signal_ranks("KILL", "--newest")
    return story.note("trainer rank killed", job)


def lost_nodes(story: Story, job: str) -> str:
    """The batch host as soon as there are ranks, a trainer's other node in the middle of the work, the servers' as soon as it serves."""
    run = story.run
    story.wait_for(job, "grpo-0000.log")
    story.cluster.lose_node(run.nodes(job)["train"][0])
    job = story.note("batch host down", job)
    run.wait_save()
    story.cluster.lose_node(run.nodes(job)["train"][1])
    job = story.note("trainer node down", job)
    story.wait_for(job, "rollout-0000.log", "serving")
    story.cluster.lose_node(run.nodes(job)["rollout"][0])
    return story.note("rollout node down", job)


def time_limit(story: Story, job: str) -> str | None:
    """The server dies and is restarted. Then the limit is near: Slurm looks every 30 s, and the ranks wait for it."""
    run = story.run
    run.wait_save()
    story.signal_server("KILL", job)
    story.wait_for(job, "rollout-0000.log", "restart 1 of 3")
    run.wait_save()
    story.keep("server killed", job, SAME)
    story.signal_ranks("STOP")
    story.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=15")
    run.wait_text("USR1: save and end", job)
    story.signal_ranks("CONT")
    return story.note("time limit near", job)


def crash_loop(story: Story, job: str | None) -> None:
    """Jobs whose ranks die as soon as they are there."""
    while job is not None:
        story.cluster.wait(lambda job=job: story.signal_ranks("KILL") or job not in story.run.jobs(), f"ranks of {job}")
        last, job = job, story.run.successor_of(job)
    story.keep("crash loop", last, OVER)


def stall(story: Story) -> None:
    """Started by hand with no node to spare and a bad one; then a server that hangs; then everything is cancelled."""
    run = story.run
    (run.folder / "bad").touch()
    job = story.submit(run, f"run.stall_minutes={STALL_MINUTES}", NODES="3")
    job = story.note("bad node, no spare", job)
    story.bad.append((run.folder / "bad").read_text().strip())
    (run.folder / "bad").unlink()
    story.nodes.append(run.nodes(job))
    run.wait_save()
    story.signal_server("STOP", job)
    alone = {"PLACEMENT": "colocated", "TRAIN_NODES": "1", "SBATCH_GPUS_PER_NODE": "2", "NODES": "1"}
    story.submit(story.unbroken, **alone, PATH=os.environ["PATH"])  # without a driver, with which colocated servers take weights by ipc
    after = story.note("stall", job)
    story.stacks = "".join((run.folder / f"logs/{job}/grpo-000{rank}.log").read_text() for rank in (0, 1))
    story.wait_for(after, "grpo-0000.log")
    story.cluster.run("scancel", "-n", run.name)
    story.note("scancel of the name", after)


def ending(story: Story) -> None:
    """Started by hand once more, to its end."""
    job = story.submit(story.run)
    story.run.wait_end()
    story.keep("nothing", job, OVER)
