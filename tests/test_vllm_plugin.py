"""Each mend of vLLM is needed, and right. A mend whose stock function is right too must go: its test then fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from servers import checkpoint_weights, logprobs, save, tiny_model

from megatron_r1.rollout import vllm_plugin
from megatron_r1.rollout.server_process import CPU_ENV

SCRIPT = Path(__file__).with_name("vllm_defects.py")


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, dict[str, float]]:
    """Of stock and mended vLLM, from a process that loads no plug-in."""
    folder = tmp_path_factory.mktemp("defects")
    save(tiny_model(1), folder / "old")
    new = tiny_model(2)
    save(new, folder / "new")
    token_ids = torch.randint(3, 320, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "expected.json").write_text(json.dumps({"token_ids": token_ids, "logprobs": logprobs(new, token_ids)}))
    env = {**os.environ, **CPU_ENV, "VLLM_PLUGINS": "none", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, SCRIPT, folder], env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mend", [*vllm_plugin.MENDS, *vllm_plugin.CPU_MENDS], ids=lambda mend: mend.name)
def test_a_mend_is_needed_and_right(errors, mend):
    assert errors[mend.name]["stock"] > 0.05, f"stock vLLM is right now: drop the mend {mend.name!r}"
    assert errors[mend.name]["mended"] <= 1e-4


def test_a_mend_is_applied_once_and_keeps_the_stock_function():
    calls = []
    mend = vllm_plugin.Mend("x", "y", f"{__name__}:Stock.double", lambda stock: lambda self, x: calls.append(x) or stock(self, x) + 1)
    vllm_plugin.apply(mend)
    vllm_plugin.apply(mend)
    assert Stock().double(3) == 7
    assert calls == [3]
    assert Stock.double.__wrapped__(Stock(), 3) == 6


class Stock:
    def double(self, x: int) -> int:
        return 2 * x


def gather_and_scatter(store: dist.Store, rank: int) -> tuple[list, list]:
    """Rank r holds r + 1 rows of value r + 1; then both hold all three rows, and the ranks' sum is scattered back."""
    group = dist.ProcessGroupGloo(store, rank, 2)
    communicator = SimpleNamespace(world_size=2, rank_in_group=rank, device_group=group)
    mine = torch.full((rank + 1, 2), float(rank + 1))
    gathered = vllm_plugin._all_gatherv(None)(communicator, mine, 0, [1, 2])
    scattered = vllm_plugin._reduce_scatterv(None)(communicator, gathered * (rank + 1), 0, [1, 2])
    return gathered.tolist(), scattered.tolist()


def test_uneven_gather_and_scatter_put_each_rank_s_rows_in_place(monkeypatch):
    # torch's functions want a registered group; vLLM's is one, these two ranks are threads
    monkeypatch.setattr(dist, "all_gather", lambda out, x, group: group.allgather([out], [x]).wait())
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: group.allreduce([x]).wait())
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as ranks:
        (gathered, first), (same, second) = ranks.map(gather_and_scatter, [store] * 2, range(2))
    assert gathered == same == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert first == [[3.0, 3.0]]
    assert second == [[6.0, 6.0], [6.0, 6.0]]


def test_checkpoint_names_of_the_tests_are_those_of_the_saved_file(tmp_path):
    from safetensors import safe_open

    model = tiny_model(1)
    with safe_open(save(model, tmp_path) / "model.safetensors", framework="pt") as file:
        assert {name for name, _ in checkpoint_weights(model)} == set(file.keys())
