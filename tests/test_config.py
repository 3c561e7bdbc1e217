"""The config is strict, merges its bases, and survives a round trip through TOML."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1 import config
from megatron_r1.config_stages import GRPOConfig

MINIMAL = '[model]\npath = "m"\n'


def written(folder: Path, text: str, name: str = "a.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_of_grpo_are_the_papers(tmp_path):
    c = config.load("grpo", written(tmp_path, MINIMAL))
    assert isinstance(c, GRPOConfig)
    outputs = c.batch.problems * c.batch.completions
    assert (outputs, outputs // c.batch.minibatches, c.batch.inner_epochs) == (8192, 512, 1)
    assert (c.optimizer.lr, c.sampling.temperature, c.sampling.max_tokens) == (3e-6, 1.0, 32_768)
    assert (c.steps, c.reference_refresh_steps) == (10_400, 400)


def test_what_is_dumped_loads_to_the_same_config(tmp_path):
    text = MINIMAL + "[sampling]\nmax_tokens_schedule = [[8200, 65536]]\n[rewards.options.language]\ntarget = 'zh'\n"
    first = config.load("grpo", written(tmp_path, text), ["optimizer.lr=1e-5", "run.dir=runs/x", "parallel.expert_model_parallel_size=2"])
    again = config.load("grpo", written(tmp_path, config.dump(first), "b.toml"))
    assert again == first
    assert again.optimizer.lr == 1e-5


def test_patterns_of_sources_survive_the_round_trip_in_their_order(tmp_path):
    by_source = '[rewards.by_source]\n"math*" = {accuracy = 1.0}\n"a/b [c].d" = {"my.reward" = 2.0}\n"*" = {format = 1.0}\n'
    first = config.load("grpo", written(tmp_path, MINIMAL + by_source))
    again = config.load("grpo", written(tmp_path, config.dump(first), "b.toml"))
    assert list(again.rewards.by_source.items()) == list(first.rewards.by_source.items()), "their order counts"
    assert again.rewards.by_source["a/b [c].d"] == {"my.reward": 2.0}


def test_a_table_that_was_emptied_stays_empty(tmp_path):
    first = config.load("reject", written(tmp_path, MINIMAL + "[required]\n[quota]\nper_problem = 2\n"))
    again = config.load("reject", written(tmp_path, config.dump(first), "b.toml"))
    assert again == first
    assert (again.required, again.quota.per_source, again.quota.per_problem) == ({}, None, 2)


def test_a_base_file_is_overlaid_key_by_key(tmp_path):
    written(tmp_path, MINIMAL + "[optimizer]\nlr = 1e-3\nclip_grad = 0.5\n", "base.toml")
    c = config.load("grpo", written(tmp_path, 'base = "base.toml"\n[optimizer]\nlr = 2e-3\n'))
    assert (c.optimizer.lr, c.optimizer.clip_grad, c.model.path) == (2e-3, 0.5, "m")


def test_an_override_wins_over_the_file(tmp_path):
    c = config.load("grpo", written(tmp_path, MINIMAL + "[run]\nseed = 3\n"), ["run.seed=4"])
    assert c.run.seed == 4


def test_a_circle_of_bases_is_an_error_not_a_hang(tmp_path):
    written(tmp_path, 'base = "b.toml"\n')
    written(tmp_path, 'base = "a.toml"\n', "b.toml")
    with pytest.raises(ValueError, match="circle"):
        config.load("grpo", tmp_path / "a.toml")
