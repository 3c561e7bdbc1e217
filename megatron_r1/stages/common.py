"""What the stages share: their parts made from the config, and a step's beginning and end. The loops are the stages' own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_r1 import checks, cost, data, evaluation
from megatron_r1.chat import Chat
from megatron_r1.config_stages import GRPOConfig, StageConfig
from megatron_r1.conversations import Batches
from megatron_r1.mcore import checkpoint, distributed
from megatron_r1.mcore.offload import Offload
from megatron_r1.mcore.optimizer import Training
from megatron_r1.mcore.policy import Policy
from megatron_r1.metrics import Metrics, Record, Stopwatch, progress
from megatron_r1.mixture import Mixture
from megatron_r1.models.kernels import Kernels
from megatron_r1.packing import TokenSequence, plan
from megatron_r1.problem import Problem
from megatron_r1.rollout.engine import SamplingParams, never
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.placement import Colocated, Dedicated, put_to_sleep
from megatron_r1.rollout.server_process import SENDING
from megatron_r1.rollout.vllm_server import VLLMServers
from megatron_r1.run_folder import DONE, STOP, hold
from megatron_r1.sample_file import SampleFile
from megatron_r1.signals import StopRequest
from megatron_r1.stages.inputs import evaluation_sampling, load_problems, make_scorer
from megatron_r1.types import Microbatch, Sample
from megatron_r1.verifying.scoring import Scorer
from megatron_r1.watchdog import Watchdog
from megatron_r1.weights import exporter

Cursor = data.Dataset | Batches | Mixture
CANARY_TOKENS = 48


@dataclass
class Parts:
    """The run's standing parts. `fleet` and `scorer` are None in a stage without rollouts."""

    folder: Path
    lock: TextIO | None  # rank 0's, held while the run lasts
    policy: Policy
    chat: Chat
    metrics: Metrics
    stop: StopRequest
    watchdog: Watchdog
    fleet: Fleet | None
    scorer: Scorer | None  # on the leader of each model-parallel group
    problems: Mixture | None
    held_out: list[Problem]


def make(config: StageConfig, *, steps: int, train_mtp: bool = False) -> Parts:
    """Join the ranks and build every part; weights are the config's, not yet a checkpoint's."""
    started = time.perf_counter()
    hf = checks.check_model(config)
    parallel = checks.layout(config)
    distributed.init(parallel, seed=config.run.seed, timeout_minutes=config.parallel.timeout_minutes)
    watchdog = Watchdog(config.run.stall_minutes)
    folder = Path(config.run.dir)
    stop = StopRequest(folder / STOP if distributed.rank() == 0 else None)
    lock = None
    if distributed.rank() == 0:
        lock = hold(folder)
        (folder / DONE).unlink(missing_ok=True)
    engine = make_engine(config) if config.needs_rollouts else None  # before the policy, beside which servers on its GPUs cannot start
    policy = Policy(hf, parallel, training=training(config, steps=steps, train_mtp=train_mtp), seed=config.run.seed)
    if config.model.init == "weights":
        policy.load_hf(config.model.path)
    else:
        policy.init_random()
    chat = Chat(config.model.path, chat_template=config.chat_template)
    meter = cost.Meter(cost.devices(config.model_dump(), trainer=True, rollouts=config.needs_rollouts), config.run.gpu_hour_price)
    log_folder = folder if distributed.rank() == 0 else None
    metrics = Metrics(log_folder, steps=steps, tensorboard=config.logging.tensorboard, meter=meter, started=started)
    fleet = scorer = problems = None
    held_out: list[Problem] = []
    if engine is not None:
        problems, held_out = load_problems(config)
        asked = [*(problems.all() if isinstance(config, GRPOConfig) else ()), *held_out[: config.evaluation.problems]]
        chat.check_prompts(asked, limit=config.rollout.max_prompt_tokens)
        fleet = make_fleet(config, engine, policy)
        if distributed.is_model_parallel_leader():
            scorer = make_scorer(config)
    return Parts(folder, lock, policy, chat, metrics, stop, watchdog, fleet, scorer, problems, held_out)


def training(config: StageConfig, *, steps: int, train_mtp: bool) -> Training:
    """The optimizer's and the model's training settings as the policy takes them."""
    o, m = config.optimizer, config.model
    settings = o.model_dump(exclude={"lr_decay_steps"}) | m.model_dump(exclude={"path", "init"})
    decay = o.lr_decay_steps or (None if o.lr_decay_style == "constant" else steps)
    return Training(**settings, lr_decay_steps=decay, train_mtp=train_mtp, kernels=Kernels(**config.kernels.model_dump()))


def make_engine(config: StageConfig) -> VLLMServers:
    """A client of the servers behind `rollout.urls`; those on the trainer's GPUs are asleep. Collective."""
    r = config.rollout
    if not r.urls:
        raise ValueError("rollout.urls: empty, and this process was not started by the launcher; give the servers' addresses")
    engine = VLLMServers(
        r.urls,
        weight_transfer=r.weight_transfer,
        ranks=distributed,
        max_num_seqs=r.max_num_seqs,
        request_limit_seconds=r.request_timeout_seconds,
        start_limit_seconds=r.start_timeout_seconds,
        transfer_folder=Path(config.run.dir) / "transfer",
    )
    engine.buckets.quantization = r.quantization
    if r.placement == "colocated":
        put_to_sleep(engine)
    return engine


def make_fleet(config: StageConfig, engine: VLLMServers, policy: Policy) -> Fleet:
    """The servers as one, with a canary of tokens that differ from run to run only in the vocabulary."""
    r = config.rollout
    ids = [(7919 * i + 17) % policy.hf["vocab_size"] for i in range(CANARY_TOKENS)]
    [canary] = policy.pack([TokenSequence(ids=ids, learned=[1] * len(ids))], [[0]])
    placement = Colocated(engine, Offload(policy.chunks, policy.optimizer)) if r.placement == "colocated" else Dedicated()
    scope = r.weight_senders if r.weight_transfer in SENDING else "all"
    return Fleet(engine, policy, canary=canary, tolerance=r.canary_tolerance, seed=config.run.seed, placement=placement, scope=scope)


def roll_out(
    parts: Parts, problems: list[Problem], sampling: SamplingParams, *, watch: Stopwatch, turn: int = 0, stop: Callable[[], bool] = never
) -> list[Sample]:
    """`sampling.n` scored completions of each problem, in the problems' order; all of them on every rank. Collective.

    Once `stop` says so on a rank, only those that had arrived, and not all of them scored; ask whether all agreed before using them.
    """
    mine = problems[distributed.dp_rank() :: distributed.dp_size()]
    prompts = [(problem, parts.chat.prompt_ids(problem)) for problem in mine]

    with watch.phase("rollout"), progress("rollout", len(mine) * sampling.n, shown=distributed.rank() == 0) as advance:

        def on_sample(sample: Sample) -> None:
            sample.text = parts.chat.completion(sample.completion_ids)
            parts.scorer.submit(sample)
            advance(1)

        with ExitStack() as after_error:
            if parts.scorer is not None:  # else this rank would verify what waits before it ends, and the others wait for that
                after_error.callback(parts.scorer.close)
            samples = parts.fleet.generate(prompts, sampling, on_sample=on_sample, turn=turn, stop=stop)
            after_error.pop_all()
    with watch.phase("verify"):
        if parts.scorer is not None and not stop():
            parts.scorer.collect(samples)
        distributed.together()
        samples = distributed.gather_from_leaders(samples)
    place = {problem.id: i for i, problem in enumerate(problems)}
    return sorted(samples, key=lambda s: (place[s.problem.id], s.group_index))


def packed(policy: Policy, sequences: list[TokenSequence], *, chunk_tokens: int) -> list[Microbatch]:
    """This data-parallel rank's microbatches of one optimizer step."""
    lengths = [len(s.ids) for s in sequences]
    chunks = plan(lengths, chunk_tokens=chunk_tokens, num_groups=distributed.dp_size(), count_multiple=policy.count_multiple)
    return policy.pack(sequences, chunks[distributed.dp_rank()])


def held_out_record(config: StageConfig, parts: Parts) -> Record:
    """eval/ figures of the policy as it is, and the seconds they took; the samples go to <run.dir>/eval. Collective; rank 0's."""
    e, watch = config.evaluation, Stopwatch()
    sampling = evaluation_sampling(config, eos_id=parts.chat.eos_id)
    samples = roll_out(parts, parts.held_out[: e.problems], sampling, watch=watch)
    if distributed.rank() != 0:
        return {}
    with SampleFile(parts.folder / "eval" / f"step_{parts.policy.step:06d}.jsonl") as file:
        attempts = [file.write(sample, evaluation.attempt(sample, judges=e.judges)) for sample in samples]
    rows = evaluation.scores(attempts, k=e.samples, pass_at=e.pass_at, equal=parts.scorer.equal)
    return {**evaluation.record(rows), "time/evaluation": watch.record()["time/step"]}


def is_due(every: int, step: int, previous: int) -> bool:
    """Whether a multiple of `every` lies in (previous, step]; never for every = 0."""
    return every > 0 and step // every > previous // every


def resume(config: StageConfig, parts: Parts, cursor: Cursor) -> bool:
    """Continue from the run's latest checkpoint, if there is one. Collective."""
    latest = checkpoint.latest(parts.folder / "checkpoints") if config.checkpoint.resume else None
    if latest is None:
        return False
    extra = checkpoint.load(parts.policy, latest)
    cursor.load_state_dict(extra["cursor"])
    say(f"resumed at step {parts.policy.step} from {latest}")
    return True


def save(config: StageConfig, parts: Parts, cursor: Cursor) -> None:
    """Write a checkpoint and drop old ones. Collective."""
    checkpoint.save(
        parts.policy,
        parts.folder / "checkpoints",
        step=parts.policy.step,
        extra={"cursor": cursor.state_dict()},
        keep=config.checkpoint.keep,
    )


def finish(config: StageConfig, parts: Parts, cursor: Cursor, *, done: bool) -> None:
    """Save where the run stands, export the model and mark the run `done` if it is, and let go of everything. Collective."""
    if checkpoint.latest_step(parts.folder / "checkpoints") != parts.policy.step:
        save(config, parts, cursor)
    if done and config.checkpoint.export:
        target = parts.folder / "hf"
        exporter.save(parts.policy.chunks, parts.policy.hf, folder=target, source_folder=config.model.path, overwrite=True)
        if isinstance(config.chat_template, str) and distributed.rank() == 0:
            shutil.copyfile(config.chat_template, target / "chat_template.jinja")  # over the tokenizer's own, for whoever serves it
        say(f"exported {target}")
    if done and distributed.rank() == 0:
        (parts.folder / DONE).write_text(f"{parts.policy.step}\n")
    if not done:
        first = f"delete {parts.folder / STOP}, then " if (parts.folder / STOP).exists() else ""
        say(f"saved at step {parts.policy.step} and ended on request; {first}start the same command again to go on")
    say(parts.metrics.meter.line())
    close(parts)


def close(parts: Parts) -> None:
    """Let go of the verifiers, the servers' connections, the log and the ranks."""
    if parts.scorer is not None:
        parts.scorer.close()
    if parts.fleet is not None:
        parts.fleet.engine.close()
    parts.metrics.close()
    parts.watchdog.close()
    distributed.shutdown()


def say(text: str) -> None:
    """One line on the console, from one rank."""
    if distributed.rank() == 0:
        print(text, flush=True)
