"""A model as it is, on a benchmark: k samples of each problem by vLLM servers that hold its weights themselves.

The servers are those at `rollout.urls` (this project's or a plain `vllm serve`), or are started with the folder `model.path`. One
process asks them; neither trainer ranks nor Megatron take part. A Megatron checkpoint is converted first (`convert`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from rich.console import Console

from megatron_r1 import evaluation
from megatron_r1.chat import Chat
from megatron_r1.config_stages import EvalConfig
from megatron_r1.metrics import Stopwatch, progress
from megatron_r1.rollout.sampling import sample_groups
from megatron_r1.rollout.vllm_server import VLLMServers
from megatron_r1.run_folder import DONE, hold
from megatron_r1.sample_file import SampleFile
from megatron_r1.stages import inputs
from megatron_r1.types import Problem, Sample
from megatron_r1.verifying.scoring import Scorer

WIDTH = 140  # columns of the table
BACKLOG = 64  # groups of completions whose verdicts are awaited while others are sampled


def main(config: EvalConfig) -> None:
    """Sample, verify and count once; ends with the table, metrics at step 0, and <run.dir>/eval/samples.jsonl."""
    folder, e, watch = Path(config.run.dir), config.evaluation, Stopwatch()
    lock = hold(folder)
    metrics = inputs.make_metrics(config, steps=0)
    chat, problems = Chat(config.model.path, chat_template=config.chat_template), chosen(config)
    chat.check_prompts(problems, limit=config.rollout.max_prompt_tokens)
    prompts = [(problem, chat.prompt_ids(problem)) for problem in problems]
    sampling = inputs.evaluation_sampling(config, eos_id=chat.eos_id)
    with (
        closing(connect(config)) as servers,
        inputs.make_scorer(config) as scorer,
        SampleFile(folder / "eval" / "samples.jsonl") as file,
        progress("evaluation", len(prompts), shown=True) as advance,
    ):
        servers.wait_ready(config.rollout.start_timeout_seconds)
        groups = sample_groups(servers, prompts, sampling, seed=config.run.seed, restart_seconds=config.rollout.start_timeout_seconds)
        attempts = []
        for group in verified(groups, chat, scorer):
            attempts += [file.write(sample, evaluation.attempt(sample, judges=e.judges)) for sample in group]
            advance(1)
        assert len(attempts) == len(problems) * e.samples, f"{len(attempts)=} {len(problems)=} {e.samples=}"
        rows = evaluation.scores(attempts, k=e.samples, pass_at=e.pass_at, equal=scorer.equal)
    metrics.log(0, {**evaluation.record(rows), "time/evaluation": watch.record()["time/step"]}, console=False)
    metrics.close()
    title = f"{config.model.path}, T = {e.temperature:g}, top-p {e.top_p:g}, at most {sampling.max_tokens} tokens, 95% intervals"
    console = Console()
    console.width = max(console.width, WIDTH)  # a log is 80 wide, and would cut the figures
    console.print(evaluation.table(rows, title=title))
    console.print(f"samples: {file.path}", soft_wrap=True)
    (folder / DONE).write_text("0\n")
    lock.close()


def chosen(config: EvalConfig) -> list[Problem]:
    """The problems that training held out, so that both evaluate the same; all of them where none are."""
    everything, held_out = inputs.load_problems(config)
    problems = held_out or everything.all()
    return problems[: config.evaluation.problems or None]


def connect(config: EvalConfig) -> VLLMServers:
    """A client of the servers behind `rollout.urls`, which sample from the weights they have."""
    r = config.rollout
    return VLLMServers(r.urls, max_num_seqs=r.max_num_seqs, request_limit_seconds=r.request_timeout_seconds, own_weights=True)


def verified(groups: Iterable[list[Sample]], chat: Chat, scorer: Scorer) -> Iterator[list[Sample]]:
    """The groups with their verdicts, while others are sampled."""
    waiting: deque[list[Sample]] = deque()
    for group in groups:
        for sample in group:
            sample.text = chat.completion(sample.completion_ids)
            scorer.submit(sample)
        waiting.append(group)
        if len(waiting) > BACKLOG:
            scorer.collect(waiting[0])
            yield waiting.popleft()
    for group in waiting:
        scorer.collect(group)
        yield group
