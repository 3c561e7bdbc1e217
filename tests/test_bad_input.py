"""Whatever a user can get wrong is answered with exit code 2 and one line that names the setting and the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1 import config, rank
from megatron_r1.__main__ import EXAMPLES, main

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "models" / "tiny_v3"

GRPO = """
steps = 4
reference_refresh_steps = 4
[run]
dir = "{root}/run"
[model]
path = "{root}/model"
init = "random"
[data]
reasoning_gym = "chain_sum"
size = 64
held_out = 8
[batch]
problems = 4
completions = 4
minibatches = 2
chunk_tokens = 512
[rollout]
max_prompt_tokens = 32
[sampling]
max_tokens = 32
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "grpo.toml").write_text(GRPO.format(root=tmp_path))
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that must fail."""
    code = main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, f"{code=} {lines=}"
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    return lines[0]


# override -> words the line must have: the setting, and what to do about it
OVERRIDES = {
    "optimizer.lrr=1e-4": ("optimizer.lrr", "did you mean 'lr'"),
    "optimiser.lr=1e-4": ("optimiser", "did you mean 'optimizer'"),
    "optimizer.lr=fast": ("optimizer.lr", "'fast'", "number"),
    "optimizer.lr=-1.0": ("optimizer.lr", "greater than 0"),
    "run.seed=1.5": ("run.seed", "1.5", "integer"),
    "chat_template=r1.jinja": ("chat_template = 'r1.jinja'", "no such file", "configs/templates"),
    "kernels.fp8=blockwise": ("kernels.fp8", "GPU"),
    "kernels.fp9=blockwise": ("kernels.fp9", "did you mean 'fp8'"),
    "optimizer.moments_dtype=bfloat16": ("optimizer.moments_dtype", "GPU"),
    "model.dtype=float16": ("model.dtype", "float16", "bfloat16"),
    "model.path=/nowhere/at/all": ("model.path", "/nowhere/at/all", "no such folder"),
    'model.init="weights"': ("model.path", "safetensors", "model.init"),
    "batch.minibatches=3": ("batch.minibatches = 3", "divide", "16"),
    "batch.completions=1": ("batch.completions = 1", "2 or more"),
    "steps=0": ("steps = 0", "greater than or equal to 1"),
    "reference_refresh_steps=3": ("reference_refresh_steps = 3", "multiple"),
    "batch.problems=1": ("batch.problems = 1", "data-parallel"),
    "batch.chunk_tokens=63": ("batch.chunk_tokens = 63", "up to 64 tokens", "rollout.max_prompt_tokens + sampling.max_tokens"),
    "algorithm.name=gropo": ("gropo", "did you mean 'grpo'"),
    "algorithm.name=sft": ("algorithm.name = 'sft'", "Options", "grpo"),
    "algorithm.options.clip_epsilom=3.0": ("algorithm.options.clip_epsilom", "did you mean 'clip_epsilon'"),
    "algorithm.options.ratio=word": ("algorithm.options", "ratio"),
    "algorithm.name=dr_grpo": ("constant_tokens = None", "sampling.max_tokens"),
    "algorithm.options.dual_clip=0.5": ("dual_clip = 0.5", "above 1"),
    "algorithm.options.correction=tiss": ("algorithm.options.correction", "tiss", "'tis'"),
    "algorithm.options.correction_high=2.0": ("correction_high = 2.0", "no effect", "remove it"),
    "batch.dynamic_sampling=-1": ("batch.dynamic_sampling", "greater than or equal to 0"),
    "batch.overlong_tokens=33": ("batch.overlong_tokens = 33", "sampling.max_tokens = 32"),
    "rewards.weights.acuracy=1.0": ("acuracy", "did you mean 'accuracy'"),
    "rewards.weights.accuracy=high": ("rewards.weights.accuracy", "high", "number"),
    'rewards.by_source={"math*"={acuracy=1.0}}': ("acuracy", "did you mean 'accuracy'"),
    'rewards.by_source={"math*"=1.0}': ("rewards.by_source.math*", "dictionary"),
    "rewards.options.language.tongue='en'": ("rewards.options.language", "rewards.weights has no 'language'"),
    "data.humaneval=true": ("data.humaneval", "data.reasoning_gym", "exactly one of"),
    "rollout.quantization=fp8": ("rollout.quantization", "GPU"),
    "rollout.weight_transfer=nccl": ("rollout.weight_transfer", "nccl", "gloo"),
    "rollout={max_prompt_tokens=64, weight_transfer='file', weight_senders='experts'}": ("rollout.weight_senders", "experts", "file"),
    'rollout.urls=["localhost:8000"]': ("rollout.urls", "http://"),
    "data.jsonl=/nowhere.jsonl": ("data", "exactly one of"),
    "data.size=0": ("data.size", "greater than or equal to 1"),
    "evaluation.problems=9": ("evaluation.problems = 9", "data.held_out = 8"),
    "parallel.tensor_model_parallel_size=3": ("tensor_model_parallel_size", "3"),
    "parallel.expert_model_parallel_size=3": ("expert_model_parallel_size", "3"),
    "parallel.pipeline_model_parallel_size=8": ("pipeline_model_parallel_size", "8"),
    "parallel.world_size=3": ("world_size", "3"),
    "parallel.world_size=zwei": ("parallel.world_size", "zwei", "integer"),
    "evaluation.max_tokens=2017": ("evaluation.max_tokens + rollout.max_prompt_tokens = 2017 + 32", "max_position_embeddings (2048)"),
    "sampling.max_tokens=2048": ("sampling.max_tokens", "max_position_embeddings (2048)"),
    "sampling.top_p=1.5": ("sampling.top_p", "1.5", "less than or equal to 1"),
    "sampling.temperature=0": ("sampling.temperature", "greater than 0"),
    "nothing": ("'nothing'", "section.key=value"),
    "run=3": ("run",),
    "run.seed.x=3": ("run.seed",),
}
NEEDS = {  # what else must be set for the case to be the first mistake met
    "batch.problems=1": ("parallel.world_size=2",),
    "parallel.tensor_model_parallel_size=3": ("parallel.world_size=3",),
    "parallel.expert_model_parallel_size=3": ("parallel.world_size=3",),
    "parallel.pipeline_model_parallel_size=8": ("parallel.world_size=8",),
    "parallel.world_size=3": ("parallel.tensor_model_parallel_size=2",),
    "run.seed.x=3": ("run.seed=1",),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_setting_gets_one_line_with_its_name_and_the_fix(override, root, capsys):
    line = complaint(capsys, "grpo", str(root / "grpo.toml"), *NEEDS.get(override, ()), override)
    for words in OVERRIDES[override]:
        assert words in line, line


def broken_model(root: Path, **changes: object) -> None:
    path = root / "model" / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


FILES = {
    "config.json that is not JSON": (lambda r: (r / "model/config.json").write_text("{"), "not valid JSON"),
    "config.json that is a list": (lambda r: (r / "model/config.json").write_text("[]"), "not an object"),
    "no config.json": (lambda r: (r / "model/config.json").unlink(), "config.json is missing"),
    "no model_type": (lambda r: broken_model(r, model_type=None), "model_type is missing"),
    "a family that is not built": (lambda r: broken_model(r, model_type="gpt2"), "model_type = 'gpt2'"),
    "no tokenizer": (lambda r: (r / "model/tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
    "a config that is not TOML": (lambda r: (r / "grpo.toml").write_text("steps = = 3"), "not valid TOML"),
    "no config": (lambda r: (r / "grpo.toml").unlink(), "no such config file"),
    "a base that is missing": (lambda r: (r / "grpo.toml").write_text('base = "x.toml"'), "no such config file"),
    "no model section": (lambda r: (r / "grpo.toml").write_text("steps = 4"), "required, and not set"),
    "a run folder that is a file": (lambda r: (r / "run").write_text(""), "run.dir"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_gets_one_line_with_its_name(case, root, capsys):
    breaks, words = FILES[case]
    breaks(root)
    assert words in complaint(capsys, "grpo", str(root / "grpo.toml"))


def test_a_missing_jsonl_is_named(root, capsys):
    (root / "grpo.toml").write_text(GRPO.format(root=root).replace('reasoning_gym = "chain_sum"', 'jsonl = "/nowhere.jsonl"'))
    assert "/nowhere.jsonl" in complaint(capsys, "grpo", str(root / "grpo.toml"))


def test_sft_without_conversations_says_what_it_needs(root, capsys):
    (root / "sft.toml").write_text(f'steps = 1\n[run]\ndir = "{root}/run"\n[model]\npath = "{root}/model"\ninit = "random"\n')
    assert "data.conversations" in complaint(capsys, "sft", str(root / "sft.toml"))
    line = complaint(capsys, "sft", str(root / "sft.toml"), "data.conversations=/nowhere.jsonl")
    assert "data.conversations = '/nowhere.jsonl': no such file" in line


@pytest.mark.parametrize("arguments", [("gpro", "x.toml"), ("grpo",)])
def test_a_wrong_command_line_is_explained(arguments, capsys):
    complaint(capsys, *arguments)


@pytest.mark.parametrize("command", rank.STAGES)
def test_a_stage_without_a_config_names_one_that_is_there(command, capsys):
    assert complaint(capsys, command).endswith(f"{command} {EXAMPLES[command]}")
    config.load(command, ROOT / EXAMPLES[command])


def test_nothing_is_written_before_the_checks_have_passed(root, capsys):
    complaint(capsys, "grpo", str(root / "grpo.toml"), "parallel.tensor_model_parallel_size=3", "parallel.world_size=3")
    assert not (root / "run").exists()
