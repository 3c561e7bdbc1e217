"""The presets against the papers' numbers, written out here a second time: Nature 645, 633 and arXiv 2501.12948v2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import checks, config
from megatron_r1.config_stages import GRPOConfig, StageConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TINY_V3 = checks.read_json(CONFIGS / "models/tiny_v3/config.json", setting="model.path")
OWN_RUN = re.findall(r"^python -m megatron_r1 (sft|grpo|eval) +(configs/\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
RL = {  # Nature, Methods: of R1-Zero and of both RL stages of R1
    "optimizer.lr": 3e-6,
    "algorithm.name": "grpo",
    "algorithm.options.kl_coefficient": 0.001,
    "algorithm.options.clip_epsilon": 10.0,
    "batch.problems": 512,  # 8,192 outputs a rollout / 16 a question
    "batch.completions": 16,
    "batch.minibatches": 16,
    "batch.inner_epochs": 1,
    "reference_refresh_steps": 400,
    "sampling.max_tokens": 32768,
}
SFT = {  # B.4.2
    "batch_size": 128,
    "chunk_tokens": 32768,
    "optimizer.lr": 5e-5,
    "optimizer.min_lr": 5e-6,
    "optimizer.lr_decay_style": "cosine",
}
PAPER: dict[str, tuple[str, dict[str, Any]]] = {
    "r1_zero": (
        "grpo",
        RL
        | {
            "steps": 10400,
            "sampling.temperature": 1.0,
            "sampling.max_tokens_schedule": [[8200, 65536]],
            "rewards.weights": {"accuracy": 1.0, "format": 1.0},
        },
    ),
    "r1_cold_start_sft": ("sft", SFT),
    "r1_rl_stage1": (
        "grpo",
        RL
        | {
            "sampling.temperature": 1.0,
            "sampling.max_tokens_schedule": [],
            "rewards.weights": {"accuracy": 1.0, "format": 1.0, "language": 1.0},
        },
    ),
    "r1_rejection": ("reject", {"required": {"accuracy": 1.0}, "filters.allows_code_blocks": False}),
    "r1_sft": ("sft", SFT | {"steps": 2 * 804_745 // 128 + 2}),  # two epochs of Table 5, in whole steps
    "r1_rl_stage2": ("grpo", RL | {"steps": 1700, "sampling.temperature": 0.7, "general.from_step": 1300}),
}
RL_STAGES = [name for name, (stage, _) in PAPER.items() if stage == "grpo"]
STUDENTS = {  # Table 6: the initial learning rate
    "qwen_1_5b": ("Qwen2.5-Math-1.5B", 1e-4),
    "qwen_7b": ("Qwen2.5-Math-7B", 8e-5),
    "qwen_14b": ("Qwen2.5-14B", 7e-5),
    "qwen_32b": ("Qwen2.5-32B", 6e-5),
    "llama_8b": ("Llama-3.1-8B", 5e-5),
    "llama_70b": ("Llama-3.3-70B-Instruct", 2e-5),
}
KV_BYTES = {  # of a token in bfloat16: keys and values of the largest model that a preset serves
    "V3": 61 * (512 + 64) * 2,  # MLA: the latent and the rotary key of each layer
    "Llama-3.3-70B": 80 * 2 * 8 * 128 * 2,
}
SERVED = {
    **{f"eval_{name}": ("eval", "Llama-3.3-70B") for name in ("aime", "math500", "gpqa")},
    **dict.fromkeys(("r1_zero", "r1_rl_stage1", "r1_rl_stage2", "v3_671b_grpo"), ("grpo", "V3")),
    "r1_rejection": ("reject", "V3"),
}
TINY = {"base": "sft", "r1_distill": "sft"} | {name: stage for name, (stage, _) in PAPER.items()}


def value(settings: StageConfig, path: str) -> Any:
    """What is at a dotted path."""
    found: Any = settings
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_the_papers_numbers(name: str):
    stage, numbers = PAPER[name]
    settings = config.load(stage, CONFIGS / f"{name}.toml")
    assert {path: value(settings, path) for path in numbers} == numbers


@pytest.mark.parametrize("name", ["v3_671b_grpo", "tiny_grpo", "tiny/bilingual_grpo", *RL_STAGES, *(f"tiny/{name}" for name in RL_STAGES)])
def test_a_microbatch_holds_the_longest_prompt_and_completion(name: str):
    checks.check_batch(config.load("grpo", CONFIGS / f"{name}.toml"))


@pytest.mark.parametrize("student", STUDENTS)
def test_a_students_preset_has_the_papers_numbers(student: str):
    base, lr = STUDENTS[student]
    settings = config.load("sft", CONFIGS / f"r1_distill_{student}.toml")
    assert settings.model.path.endswith(base)
    assert (settings.batch_size, settings.chunk_tokens, settings.optimizer.lr_decay_style) == (64, 32768, "cosine")
    assert settings.optimizer.lr == lr
    assert settings.optimizer.min_lr == pytest.approx(lr / 10)


def test_every_number_of_a_preset_says_where_it_is_from():
    """In a comment on its line, or on a line above that says it speaks for the next ones; how it is served needs no source."""
    for name in PAPER:
        table, covered = "", 0
        for line in (CONFIGS / f"{name}.toml").read_text().splitlines():
            table = line if line.startswith("[") else table
            setting, _, rest = line.partition(" = ")
            if table == "[rollout]" or not rest[:1].isdigit():
                continue
            assert covered or any(tag in line for tag in ("[N]", "[A2]", "[V3]", "[ours]")), f"{name}: {setting}"
            covered = 3 if "next three" in line else 2 if "next two" in line else max(0, covered - 1)


@pytest.mark.parametrize("name", SERVED)
def test_a_presets_servers_have_room_for_the_longest_answer(name: str):
    """vLLM does not start where one request of its longest length would not fit."""
    stage, model = SERVED[name]
    settings = config.load(stage, CONFIGS / f"{name}.toml")
    longest = max([settings.sampling.max_tokens, *(tokens for _, tokens in settings.sampling.max_tokens_schedule)])
    assert settings.rollout.kv_cache_mib << 20 >= (longest + settings.rollout.max_prompt_tokens) * KV_BYTES[model]


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_scale_is_the_same_recipe_by_one_base_line(name: str):
    file = CONFIGS / "tiny" / f"{name}.toml"
    settings = config.load(TINY[name], file)
    assert settings.parallel.world_size == (1 if TINY[name] == "reject" else 2)
    if isinstance(settings, GRPOConfig):
        whole = config.load("grpo", CONFIGS / f"{name}.toml")
        assert settings.algorithm == whole.algorithm
        assert settings.rewards.weights == whole.rewards.weights
        assert settings.sampling.temperature == whole.sampling.temperature
        assert settings.batch.completions == whole.batch.completions


@pytest.mark.parametrize(("stage", "file"), OWN_RUN)
def test_the_readmes_own_run_fits_the_tiny_model(stage: str, file: str):
    settings = config.load(stage, ROOT / file, [f"data.conversations={__file__}"])
    checks.check_data(settings)
    checks.check_rollout(settings, TINY_V3)
