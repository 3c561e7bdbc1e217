"""`make r1-tiny`: all of R1's stages in miniature on this machine, from a base model that is made first to a distilled student.

The base model imitates worked examples of which four in ten show their work; the cold start learns a few that all do. Then the
pipeline of configs/tiny/pipeline.toml runs, and its figures become a page. Started again it goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1 import config as configuration
from megatron_r1 import data, report, runs
from megatron_r1.__main__ import run
from megatron_r1.demo import CONFIGS, TERSE, write_examples
from megatron_r1.run_folder import DONE

COLD_START = 512  # conversations; the paper has "thousands" for 671B parameters


def r1_tiny(overrides: list[str]) -> int:
    """Run it all in the pipeline's `dir`; overrides are the pipeline's. Returns the exit code."""
    file, base_file = (str(CONFIGS / "tiny" / name) for name in ("pipeline.toml", "base.toml"))
    pipeline = configuration.load("pipeline", file, overrides)
    root, seed = Path(pipeline.dir), pipeline.seed
    runs.check_seed(root / "base", seed)
    root.mkdir(parents=True, exist_ok=True)
    problems, cold_start = root / "problems.jsonl", root / "cold_start.jsonl"
    write_problems(problems, seed=seed)
    base = [f"run.dir={root}/base", f"run.seed={seed}", f"data.jsonl={problems}", f"data.conversations={root}/base.jsonl"]
    settings = configuration.load("sft", base_file, base)
    write_examples(settings, terse=TERSE)
    own = settings.data.model_copy(update={"conversations": str(cold_start)})
    write_examples(settings.model_copy(update={"data": own}), terse=0.0, size=COLD_START)
    if not (root / "base" / DONE).exists():
        print(f"R1 in miniature, seed {seed}, in {root}\n\n--- base: sft {base_file}", flush=True)
        code = run("sft", [base_file, *base])
        if code or not (root / "base" / DONE).exists():
            return code
    given = [f"base_model={root}/base/hf", f"problems={problems}", f"cold_start={cold_start}"]
    code = run("pipeline", [file, *overrides, *given])
    if code == 0:
        print(f"report: {report.write([root])}\ncurves: tensorboard --logdir {root}", flush=True)
    return code


def write_problems(file: Path, *, seed: int) -> None:
    """The demo's problems, as the JSONL that every stage reads."""
    source = configuration.load("sft", CONFIGS / "tiny_sft.toml").data
    made = data.load_problems(**source.problems(), seed=seed)
    file.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in made))
