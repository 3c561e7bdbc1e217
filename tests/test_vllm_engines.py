"""What a worker hands to vLLM of the weights that it receives; in a process of its own, for pytest's never imports vLLM."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BUCKET = 64 << 10  # bytes, in a buffer of its own


def bucket(layer: int, experts: int) -> list[tuple[str, torch.Tensor]]:
    """A layer's norm, and of each expert a weight and its scale, as views of one buffer."""
    names = [f"model.layers.{layer}.mlp.experts.{i}.up_proj.{kind}" for i in range(experts) for kind in ("weight", "weight_scale_inv")]
    views = torch.arange(BUCKET // 4, dtype=torch.float32).chunk(len(names) + 1)
    return list(zip([f"model.layers.{layer}.input_layernorm.weight", *names], views, strict=True))


def held(ep: tuple[int, int], *, eplb: bool = False) -> tuple[dict[str, Any], int]:
    """The names and values that vLLM is handed of two buckets by rank ep[0] of ep[1], and the bytes that stay as long as it has them."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from megatron_r1.rollout.vllm_engines import CheckpointEngine

    class Experts(RoutedExperts):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            _, where, _ = determine_expert_map(ep[1], ep[0], 4)
            local = [i for i in range(4) if where is None or where[i] >= 0]
            self.expert_map_manager = SimpleNamespace(get_local_expert_ids=lambda: local)

    class Engine(CheckpointEngine):
        def tensors(self, update_info: int) -> Any:
            return iter(bucket(update_info, 4))

        def init_transfer_engine(self, init_info: None) -> None: ...

        def shutdown(self) -> None: ...

    kept: list[tuple[str, torch.Tensor]] = []
    model = torch.nn.Sequential(Experts())
    model.load_weights = kept.extend
    config = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=eplb), model_config=None)
    engine = Engine(None, config, torch.device("cpu"), model)
    engine.start_weight_update()
    for layer in range(2):
        engine.receive_weights(layer)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in kept}
    return {name: tensor.tolist() for name, tensor in kept}, sum(storages.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_holds_its_own_experts_alone_and_no_bucket_for_their_sake(in_engine, rank):
    found, held_bytes = in_engine(held, (rank, 2))
    sent = dict(bucket(0, 4) + bucket(1, 4))
    others = [f"experts.{i}.up_proj.weight" for i in range(4) if i // 2 != rank]
    assert found == {name: tensor.tolist() for name, tensor in sent.items() if not name.endswith(tuple(others))}
    assert held_bytes == sum(sent[name].nbytes for name in found) < 2 * BUCKET


@pytest.mark.parametrize(("ep", "eplb"), [((0, 1), False), ((1, 2), True)], ids=["no expert parallelism", "experts that move"])
def test_a_worker_that_may_need_any_expert_is_given_all(in_engine, ep, eplb):
    found, _ = in_engine(held, ep, eplb=eplb)
    assert found == {name: tensor.tolist() for name, tensor in bucket(0, 4) + bucket(1, 4)}


def what_is_left(works: list[bool]) -> tuple[list[str], list[int], str]:
    """Of a bucket of each sender, of whose broadcasts `works` says which ends: names loaded, groups aborted, the error."""
    from megatron_r1.rollout import wire
    from megatron_r1.rollout.vllm_engines import GroupUpdate, GroupWeightTransferEngine

    class Group:
        options = SimpleNamespace(_timeout=timedelta(seconds=0.1))

        def __init__(self, sender: int) -> None:
            self.sender = sender

        def broadcast(self, tensors: list[torch.Tensor], options: Any) -> SimpleNamespace:
            return SimpleNamespace(is_completed=lambda: works[self.sender], wait=self.wait)

        def wait(self) -> None:
            if not works[self.sender]:
                raise RuntimeError(f"sender {self.sender} is gone")

        def abort(self) -> None:
            aborted.append(self.sender)

    loaded, aborted = [], []
    model = torch.nn.Module()
    model.load_weights = lambda weights: loaded.extend(name for name, _ in weights)
    config = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=False), model_config=None)
    engine = GroupWeightTransferEngine(None, config, torch.device("cpu"), model)
    engine.start_weight_update()
    engine.groups = [Group(sender) for sender in range(len(works))]
    try:
        engine.receive_weights(GroupUpdate([wire.describe([(f"of {sender}", torch.ones(3))]) for sender in range(len(works))]))
    except RuntimeError as error:
        return loaded, aborted, str(error)
    return loaded, aborted, ""


def test_a_worker_that_waits_for_a_lost_sender_in_vain_ends_what_the_others_send(in_engine):
    assert in_engine(what_is_left, [True, True]) == (["of 0", "of 1"], [], "")
    assert in_engine(what_is_left, [True, False, True]) == (["of 0"], [0, 1, 2], "sender 1 is gone")
