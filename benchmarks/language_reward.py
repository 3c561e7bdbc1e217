"""R1's language reward on a policy whose reasoning mixes English and Chinese: with it the target language's share rises and stays,
without it not (Nature 645, equation 7; arXiv 2501.12948v2, B.6 has the ablation on a model of 7B parameters).

    python -m benchmarks.language_reward [FOLDER [SEED]]

One cold start, then the same GRPO with weight 1 and weight 0 of the reward; ends with a table and a page of both runs' curves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from megatron_r1 import config as configuration
from megatron_r1 import report, runs
from megatron_r1.__main__ import run
from megatron_r1.demo import CONFIGS, write_examples
from megatron_r1.run_folder import DONE
from megatron_r1.worked_examples import ADD

WEIGHTS = {"with": 1.0, "without": 0.0}
SHARE = "reward/language"
LAST = 5  # rollouts


def main(folder: str = "runs/language", seed: str = "1") -> int:
    """Run what is not done; returns the exit code."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    sft_file, grpo_file = (str(CONFIGS / "tiny" / f"bilingual_{stage}.toml") for stage in ("sft", "grpo"))
    cold_start = [f"run.seed={seed}", f"data.conversations={root}/cold_start.jsonl"]
    write_examples(configuration.load("sft", sft_file, cold_start), terse=0.0, words=ADD)
    code = once("sft", sft_file, folder=root / "sft", settings=cold_start)
    for name, weight in WEIGHTS.items():
        settings = [f"run.seed={seed}", f"model.path={root}/sft/hf", f"rewards.weights.language={weight}"]
        code = code or once("grpo", grpo_file, folder=root / name, settings=settings)
    if code == 0:
        Console().print(table(root, seed))
        print(f"curves: {report.write([root / name for name in WEIGHTS])}")
    return code


def once(stage: str, file: str, *, folder: Path, settings: list[str]) -> int:
    """Run a stage that is not done; its exit code."""
    return 0 if (folder / DONE).exists() else run(stage, [file, f"run.dir={folder}", *settings])


def table(root: Path, seed: str) -> Table:
    """English words over words of the reasoning, as sampled for training."""
    result = Table("language reward", "first rollout", f"least of the last {LAST}", f"mean of the last {LAST}", title=f"share, seed {seed}")
    for name, weight in WEIGHTS.items():
        shares = [record[SHARE] for record in runs.read(root / name).records if SHARE in record]
        last = shares[-LAST:]
        result.add_row(f"weight {weight:g}", *(f"{value:.3f}" for value in (shares[0], min(last), fmean(last))))
    return result


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
