"""The cluster presets fit the model they are for; what a job's plan says and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1 import checks, cluster, config, models

ROOT = Path(__file__).resolve().parents[1]
V3 = json.loads((ROOT / "configs/models/deepseek_v3/config.json").read_text())
TINY = ROOT / "configs/models/tiny_v3"
PRESETS = {"grpo": (256, 32 * 8), "sft": (512, 64 * 8)}


def tiny_plan(*overrides: str) -> int:
    config = str(ROOT / "configs/tiny_grpo.toml")
    return cluster.plan(["--gpus", "8", "grpo", config, f"model.path={TINY}", "model.init=random", *overrides])


def test_deepseek_v3_is_a_model_this_builds():
    models.family(V3).check(V3)
    assert (V3["num_hidden_layers"], V3["n_routed_experts"], V3["vocab_size"]) == (61, 256, 129280)


@pytest.mark.parametrize("stage", PRESETS)
def test_a_preset_of_64_nodes_fits_deepseek_v3(stage):
    settings = config.load(stage, ROOT / f"configs/v3_671b_{stage}.toml")
    checks.check_layout(settings, V3)
    checks.check_rollout(settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"weight_transfer": "gloo"})}), V3)
    ranks, gpus = PRESETS[stage]
    assert settings.parallel.world_size == ranks == gpus
    if stage == "grpo":
        checks.check_batch(settings)


def test_a_plan_prints_the_effective_config_under_what_it_comes_to(tmp_path, capsys):
    assert tiny_plan(f"run.dir={tmp_path}") == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "# 2 trainer ranks = 1 tensor x 1 context x 1 pipeline x 2 data; 2 expert\n# a rollout: 32 problems x 16 = 512 outputs"
    )
    (tmp_path / "again.toml").write_text(said)
    assert config.load("grpo", tmp_path / "again.toml").run.dir == str(tmp_path)


SAMPLES = [("reject", "tiny/r1_rejection", 2, 4), ("reject", "r1_rejection", 1, 16), ("eval", "eval_aime", 1, 64)]


@pytest.mark.parametrize(("stage", "file", "servers", "samples"), SAMPLES)
def test_a_plan_says_how_many_completions_of_a_problem_are_sampled(stage, file, servers, samples):
    said = cluster.layout(config.load(stage, ROOT / f"configs/{file}.toml"))
    assert said == [f"no trainer ranks; {servers} servers sample {samples} completions a problem"]


def test_a_plan_refuses_a_layout_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"parallel\.expert_model_parallel_size = 2.*not 3"):
        tiny_plan(f"run.dir={tmp_path}", "parallel.world_size=3")


@pytest.mark.parametrize(
    ("sizes", "fix"),
    [
        (("rollout.tensor_parallel_size=8", 'rollout.vllm_args=["--pipeline-parallel-size", "2"]'), "SERVER_NODES=2 SERVERS=1"),
        (("rollout.tensor_parallel_size=8", "rollout.servers=2"), "SERVER_NODES=1 SERVERS=1"),
        (("rollout.tensor_parallel_size=2", "rollout.servers=8"), "SERVER_NODES=1 SERVERS=4"),
    ],
)
def test_a_plan_refuses_a_server_larger_than_its_share_of_the_nodes(sizes, fix, tmp_path):
    with pytest.raises(ValueError, match=rf"rollout\.tensor_parallel_size = .*; set {fix}"):
        tiny_plan(*sizes, f"run.dir={tmp_path}")


def test_a_reward_model_is_served_once_it_has_been_trained(tmp_path):
    file = tmp_path / "helpful.toml"
    file.write_text(f'kind = "pairwise"\npreferences = "p.jsonl"\nrun = {{ dir = "{tmp_path}" }}\nmodel = {{ path = "m" }}\n')
    with pytest.raises(ValueError, match=f"run.dir = '{tmp_path}': no exported reward model"):
        cluster.serve(["reward-model", str(file)])
