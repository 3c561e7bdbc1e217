"""`make demo`: R1 in miniature on this machine. A cold start on worked examples, then GRPO, on the same two trainer ranks and
vLLM servers that the stages use anywhere; ends with held-out pass@1 before, after SFT and after GRPO.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1 import config as configuration
from megatron_r1 import data
from megatron_r1.checks import check
from megatron_r1.config_stages import StageConfig
from megatron_r1.launch import Servers, run_ranks, server_gpus
from megatron_r1.worked_examples import conversations

STAGES = ("sft", "grpo")
CONFIGS = Path("configs")
TERSE = 0.6  # of the worked examples: a cold start on them is right one time in three, and has seen that one can show one's work


def demo(overrides: list[str]) -> int:
    """Run both stages with the `run.*` overrides given; returns the exit code."""
    root, rest = run_folder(overrides)
    sft = load("sft", root, rest)
    Path(root).mkdir(parents=True, exist_ok=True)
    print(f"R1 in miniature, seed {sft.run.seed}, in {root}", flush=True)
    started = time.time()
    with Servers(sft, Path(root, "logs"), gpus=server_gpus(sft)) as servers:  # they start while the first stage builds its model
        write_examples(sft, terse=TERSE)
        for stage in STAGES:
            settings = sft if stage == "sft" else load(stage, root, rest)
            check(settings)
            ranks = settings.parallel.world_size
            print(f"\n--- {stage}: {ranks} trainer ranks, {len(servers.urls)} vLLM servers, {settings.run.dir}", flush=True)
            code = run_ranks(stage, settings, servers)
            if code or not Path(settings.run.dir, "hf").is_dir():  # failed, or ended on request
                return code
    report(root, seconds=time.time() - started)
    return 0


def run_folder(overrides: list[str]) -> tuple[str, list[str]]:
    """The folder of this demo (a new one unless run.dir names it), and the other overrides."""
    settings = dict(o.partition("=")[::2] for o in overrides)
    wrong = [key for key in settings if not key.startswith("run.")]
    if wrong:
        raise ValueError(f"demo: {wrong[0]} cannot be set here, for it has two stages; run sft and grpo with configs/tiny_*.toml instead")
    root = settings.pop("run.dir", None) or time.strftime("runs/demo-%Y%m%d-%H%M%S")
    return root, [f"{key}={value}" for key, value in settings.items()]


def load(stage: str, root: str, overrides: list[str]) -> StageConfig:
    """The stage's tiny config, in the demo's folder."""
    own = {"sft": f"data.conversations={root}/cold_start.jsonl", "grpo": f"model.path={root}/sft/hf"}[stage]
    return configuration.load(stage, CONFIGS / f"tiny_{stage}.toml", [own, f"run.dir={root}/{stage}", *overrides])


def worked_examples(arguments: list[str]) -> int:
    """Write `data.conversations` of an SFT config whose problems are sums, as the demo has them; returns the exit code."""
    if not arguments:
        raise ValueError("worked-examples: give an SFT config, as in: worked-examples configs/tiny_sft.toml")
    sft = configuration.load("sft", arguments[0], arguments[1:])
    if sft.data.conversations is None:
        raise ValueError("data.conversations: required, and not set; give the file to write")
    if Path(sft.data.conversations).exists():
        raise ValueError(f"data.conversations = {sft.data.conversations!r}: is there already; delete it, or name another file")
    Path(sft.data.conversations).parent.mkdir(parents=True, exist_ok=True)
    write_examples(sft, terse=TERSE)
    print(sft.data.conversations)
    return 0


def write_examples(sft: StageConfig, *, terse: float, size: int | None = None, words: Sequence[str] = ()) -> None:
    """Worked examples of the training problems, for data.conversations; the held-out ones stay unseen."""
    problems = data.load_problems(**sft.data.problems(), seed=sft.run.seed)
    train, _ = data.split_held_out(problems, sft.data.held_out, seed=sft.run.seed)
    lines = [json.dumps({"messages": c.messages}) for c in conversations(train[:size], terse=terse, words=words, seed=sft.run.seed)]
    Path(sft.data.conversations).write_text("\n".join(lines) + "\n")


def records(root: str, stage: str) -> list[dict[str, Any]]:
    """The stage's metrics."""
    return [json.loads(line) for line in Path(root, stage, "metrics.jsonl").read_text().splitlines()]


def report(root: str, *, seconds: float) -> None:
    """The table, the exported model and how to look at the curves."""
    logs = {stage: records(root, stage) for stage in STAGES}
    tested = {stage: [r for r in logs[stage] if "eval/pass@1" in r] for stage in STAGES}
    rows = (
        ("random initial weights", tested["sft"][0]),
        ("after the cold start (SFT)", tested["sft"][-1]),
        ("after GRPO", tested["grpo"][-1]),
    )
    title = f"{int(rows[0][1]['eval/problems'])} held-out problems, sampled at T = 1"
    table = Table("policy", "held-out pass@1", "format", "tokens", title=title)
    for name, r in rows:
        table.add_row(name, f"{r['eval/pass@1']:.3f}", f"{r.get('eval/format', 0.0):.3f}", f"{r['eval/length_mean']:.1f}")
    phases = Table("phase", "seconds", title=f"{seconds:.0f} s in all")
    sums: dict[str, float] = {}
    for stage in STAGES:
        for r in logs[stage]:
            for name, value in r.items():
                if name.startswith("time/") and name != "time/step":
                    key = f"{stage}: {name.removeprefix('time/')}"
                    sums[key] = sums.get(key, 0.0) + value
    for name, value in sums.items():
        phases.add_row(name, f"{value:.1f}")
    console = Console()
    console.print(table, phases)
    failures = sum(r.get("reward/verifier_failures", 0.0) for r in logs["grpo"])
    console.print(f"verifier failures: {failures:.0f}\nmodel: {root}/grpo/hf\ncurves: tensorboard --logdir {root}", soft_wrap=True)
