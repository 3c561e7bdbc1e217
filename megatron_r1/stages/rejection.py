"""Rejection sampling: many completions of each problem, of which the correct and readable ones become conversations for SFT.

    sample -> verify, or ask a judge where no rule can check -> filter -> quotas -> one line each, with where it comes from
                                                                             (arXiv 2501.12948v2, B.3.2 and B.3.3)

The sampler is R1's own checkpoint, served by this machine, or any OpenAI-compatible server: a teacher, for distillation.
One process, without Megatron. Problems stream; the output keeps their order, so a run that was killed continues to the byte as
far as the servers sample the same for the same seed.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from megatron_r1 import data
from megatron_r1.config_stages import RejectionConfig
from megatron_r1.metrics import Record, Stopwatch, progress
from megatron_r1.problem import Problem
from megatron_r1.rejection.drawing import REASONS, Drawer, Drawn
from megatron_r1.rejection.filters import Filters
from megatron_r1.rejection.judge import Judge
from megatron_r1.rejection.resumable_jsonl import ResumableJsonl
from megatron_r1.rollout.chat_servers import ChatServers
from megatron_r1.rollout.engine import SamplingParams
from megatron_r1.run_folder import DONE, STOP, hold
from megatron_r1.signals import StopRequest
from megatron_r1.stages.inputs import make_metrics, make_scorer

OUTPUT = "conversations.jsonl"  # in the run's folder
STOP_SECONDS = 1.0  # how often to ask whether to stop
# What a conversation depends on. Not the servers' addresses or how many requests they take: another start may find others.
CONTENT = ("data", "sampling", "rewards", "chat_template", "samples", "required", "filters", "quota", "judge")
T = TypeVar("T")


def main(config: RejectionConfig) -> None:
    """Sample until every problem is done, or a signal asks to end; the same command goes on from there."""
    folder = Path(config.run.dir)
    with hold(folder), ExitStack() as parts:
        stop = StopRequest(folder / STOP)
        total, problems = load_problems(config)
        output = parts.enter_context(closing(ResumableJsonl(folder / OUTPUT, settings(config))))
        if output.problems < total:
            drawer = make_drawer(config, parts)
            output.begin(drawer.servers.wait_ready(config.rollout.start_timeout_seconds))
            metrics = parts.enter_context(closing(make_metrics(config, steps=total)))
            advance = parts.enter_context(progress("problems", total))
            advance(output.problems)

            def start(problem: Problem) -> Future[list[Drawn]]:
                return nothing() if is_full(config, output, problem) else drawer.servers.submit(drawer.draw(problem))

            rest, watch = itertools.islice(problems, output.problems, None), Stopwatch()
            for problem, drawn in in_order(rest, start, window=config.window, stop=stop.is_noted):
                add(config, output, problem=problem, drawn=drawn)
                advance(1)
                is_last = output.problems == total
                if is_last or (drawn and output.problems % config.logging.console_every == 0):  # thousands may be skipped in a second
                    metrics.log(output.problems, {**record(output, by_source=is_last), "time/rollout": watch.record()["time/step"]})
                    watch = Stopwatch()
        conclude(folder, output, total)


def load_problems(config: RejectionConfig) -> tuple[int, Iterator[Problem]]:
    """How many there are, and the problems, one at a time; those that are held out stay out."""
    fields = config.data.problems()
    total = sum(1 for _ in data.stream_problems(**fields, seed=config.run.seed))
    held_out = data.held_out_places(total, min(config.data.held_out, total), seed=config.run.seed)
    every = data.stream_problems(**fields, seed=config.run.seed)
    return total - len(held_out), (problem for problem in every if problem.id not in held_out)


def settings(config: RejectionConfig) -> dict[str, Any]:
    """What the output depends on, by the config's names."""
    tree = config.model_dump(include=set(CONTENT))
    for name in ("url", "api_key_env", "in_flight"):
        del tree["judge"][name]
    for name in ("workers", "timeout_seconds"):
        del tree["rewards"][name]
    return {**tree, "run.seed": config.run.seed}


def make_drawer(config: RejectionConfig, parts: ExitStack) -> Drawer:
    """The sampler's servers, the verifiers and the judge, closed with `parts`."""
    r, s, j = config.rollout, config.sampling, config.judge
    if not r.urls:
        raise ValueError("rollout.urls: empty, and this process was not started by the launcher; give the servers' addresses")

    def servers(urls: list[str], *, model: str, api_key_env: str, in_flight: int) -> ChatServers:
        made = ChatServers(
            urls,
            model=model,
            api_key=os.environ.get(api_key_env, ""),
            in_flight=in_flight,
            limit_seconds=r.request_timeout_seconds,
            retry_seconds=r.start_timeout_seconds,
        )
        return parts.enter_context(closing(made))

    sampler = servers(r.urls, model=config.served_model, api_key_env=config.api_key_env, in_flight=config.in_flight)
    judge = None
    if j.url:
        judge = Judge(servers([j.url], model=j.model, api_key_env=j.api_key_env, in_flight=j.in_flight), j.sources, j.max_tokens, j.tries)
        judge.servers.wait_ready(r.start_timeout_seconds)
    return Drawer(
        sampler,
        scorer=parts.enter_context(make_scorer(config)),
        judge=judge,
        sampling=SamplingParams(max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p),
        samples=config.samples,
        required=config.required,
        filters=Filters(**config.filters.model_dump()),
        per_problem=config.quota.per_problem,
        seed=config.run.seed,
    )


def in_order(
    problems: Iterable[Problem], start: Callable[[Problem], Future[T]], *, window: int, stop: Callable[[], bool]
) -> Iterator[tuple[Problem, T]]:
    """Each problem with its result, in the problems' order; at most `window` are under way or wait for an earlier one."""
    waiting: deque[tuple[Problem, Future[T]]] = deque()
    for problem in itertools.chain(problems, itertools.repeat(None)):
        if problem is not None:
            waiting.append((problem, start(problem)))
        if not waiting:
            return
        if problem is None or len(waiting) == window:
            first, result = waiting.popleft()
            while not wait([result], STOP_SECONDS).done and not stop():
                pass
            if stop():
                return
            yield first, result.result()


def nothing() -> Future[list[Drawn]]:
    """The result for a problem that is not sampled."""
    empty: Future[list[Drawn]] = Future()
    empty.set_result([])
    return empty


def is_full(config: RejectionConfig, output: ResumableJsonl, problem: Problem) -> bool:
    """Whether the problem's source has its quota."""
    kept = output.counts.get(problem.source, Counter())["kept"]
    return config.quota.per_source is not None and kept >= config.quota.per_source


def add(config: RejectionConfig, output: ResumableJsonl, *, problem: Problem, drawn: list[Drawn]) -> None:
    """Write what is kept of one problem. One that the source's quota leaves no place for counts as skipped, sampled or not: what
    had been sampled when the quota was reached depends on the window and on restarts."""
    if is_full(config, output, problem):
        output.add(problem.source, [], {"problems": 1, "skipped": 1})
        return
    kept = output.counts.get(problem.source, Counter())["kept"]
    counts, lines = Counter(problems=1), []
    for d in drawn:
        if not d.dropped and kept + len(lines) == config.quota.per_source:
            d.dropped = "source_quota"
        counts.update({"samples": 1, d.dropped or "kept": 1, "judge_unread": d.verdict.unread})
        if not d.dropped:
            counts["kept_tokens"] += d.tokens
            lines.append(conversation(config, output, d))
    counts["solved"] = int(bool(lines))
    output.add(problem.source, lines, counts)


def conversation(config: RejectionConfig, output: ResumableJsonl, drawn: Drawn) -> dict[str, Any]:
    """A line of the output: what SFT reads (`messages`), and where it comes from."""
    sample, problem, s = drawn.sample, drawn.sample.problem, config.sampling
    return {
        "messages": [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": sample.text}],
        "source": problem.source,
        "problem_id": problem.id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "rewards": sample.rewards,
        "judged": bool(drawn.verdict.correct),
        "tokens": drawn.tokens,
        "sampler": {
            "model": output.sampler,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "seed": drawn.seed,
            "sample": sample.group_index,
        },
    }


def record(output: ResumableJsonl, *, by_source: bool) -> Record:
    """reject/ counts so far: of all sources, and of each."""
    everything = sum(output.counts.values(), Counter())
    found = {f"reject/{name}": float(everything[name]) for name in ("samples", "kept", "solved", "skipped", "judge_unread", *REASONS)}
    if by_source:
        for source, counts in output.counts.items():
            found |= {f"reject/{source.strip('/')}/{name}": float(count) for name, count in counts.items()}
    return found


def conclude(folder: Path, output: ResumableJsonl, total: int) -> None:
    """Print the table and mark the run done if it is. Raises ValueError for a run that is done and has kept nothing."""
    Console().print(table(output.counts))
    if output.problems < total:
        print(f"ended on request after {output.problems} of {total} problems; start the same command again to go on", flush=True)
        return
    if not any(counts["kept"] for counts in output.counts.values()):
        raise ValueError(f"run.dir = {str(folder)!r}: nothing was kept of {total} problems; see the table for the reasons")
    (folder / DONE).write_text(f"{total}\n")
    print(f"conversations: {folder / OUTPUT}", flush=True)


def table(counts: dict[str, Counter[str]]) -> Table:
    """Kept and dropped, by reason and source; reasons that never applied are left out."""
    everything = sum(counts.values(), Counter())
    sources = [*counts.items(), ("all", everything)]
    made = Table("", title="rejection sampling")
    for source, _ in sources:
        made.add_column(source, justify="right", overflow="fold")
    for name in ("problems", "solved", "skipped", "samples", "kept", *REASONS, "judge_unread"):
        if everything[name] or name in ("problems", "samples", "kept"):
            made.add_row(name.replace("_", " "), *(f"{one[name]:,}" for _, one in sources))
    made.add_row("tokens a kept one", *(f"{one['kept_tokens'] / max(1, one['kept']):,.1f}" for _, one in sources))
    return made
