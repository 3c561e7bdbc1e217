"""The worker's side of our weight-transfer backends, for vLLM's native API; loaded by vLLM in each worker process.

A bucket is one `update_weights` call. vLLM collects a layer's tensors over the buckets, then rebuilds the layer in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_r1.rollout import wire


class CheckpointEngine(WeightTransferEngine):
    """Loads (checkpoint name, tensor) pairs as vLLM's own engines do; subclasses say where the pairs come from."""

    def start_weight_update(self) -> None:
        self.local_experts = self._local_experts()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises the accelerator, and a CPU worker has none
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:
        with disable_mtp_completeness_check():  # a bucket is never the whole MTP layer
            self.model.load_weights(self._mine(update_info))

    def _mine(self, update_info: WeightTransferUpdateInfo) -> Iterator[wire.Named]:
        """What this worker loads of a bucket. vLLM holds all that it is handed until the layer is whole, other workers' experts too, and
        a view holds the whole bucket.
        """
        for name, tensor in self.tensors(update_info):
            if not should_skip_weight(name, self.local_experts):
                yield name, tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    def _local_experts(self) -> set[int] | None:
        """The experts that the layers' own loaders take, in every layer the same; None: any."""
        if self.parallel_config.enable_eplb:  # each layer has its own, and copies of some
            return None
        layers = (module for module in self.model.modules() if isinstance(module, RoutedExperts))
        return next((set(layer.expert_map_manager.get_local_expert_ids()) for layer in layers), None)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)


@dataclass
class FileInit(WeightTransferInitInfo):
    root: str  # a folder that trainer and workers both see


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    file: str  # safetensors, relative to root


class FileWeightTransferEngine(CheckpointEngine):
    """Buckets as safetensors files in a shared folder."""

    init_info_cls, update_info_cls = FileInit, FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        self.root = Path(init_info.root)

    def tensors(self, update_info: FileUpdate) -> Iterator[wire.Named]:
        with safe_open(self.root / update_info.file, framework="pt", device=str(self.device)) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                yield name, file.get_tensor(name)

    def shutdown(self) -> None:
        """Files are the trainer's to delete."""


@dataclass
class GroupInit(WeightTransferInitInfo):
    host: str  # where rank 0 of the trainer listens
    port: int
    senders: int  # ranks of the trainer that send; each has a group with all workers
    rank_offset: int  # the first rank of this server's workers in each group; rank 0 is the sender
    world_size: int  # one sender and all workers of all servers
    limit_seconds: float


@dataclass
class GroupUpdate(WeightTransferUpdateInfo):
    parts: list[wire.Described | None]  # of each sender, what wire.describe says of its bucket; None: it has no more


class GroupWeightTransferEngine(CheckpointEngine):
    """Buckets broadcast by the trainer's senders, all at once: over gloo on a CPU, over NCCL on a GPU."""

    init_info_cls, update_info_cls = GroupInit, GroupUpdate
    groups: Sequence[dist.ProcessGroup] = ()

    def init_transfer_engine(self, init_info: GroupInit) -> None:
        self.shutdown()
        mine = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        self.groups = wire.join(
            wire.visit(init_info.host, init_info.port, limit_seconds=init_info.limit_seconds),
            senders=init_info.senders,
            rank=init_info.rank_offset + mine,
            world_size=init_info.world_size,
            device=self.device.type,
            limit_seconds=init_info.limit_seconds,
        )

    def tensors(self, update_info: GroupUpdate) -> Iterator[wire.Named]:
        try:
            yield from wire.receive(self.groups, update_info.parts, device=self.device.type)
        except RuntimeError:
            self._abort()  # the other senders' broadcasts too, before the memory that they write to is someone else's
            raise

    def _abort(self) -> None:
        for group in self.groups:
            group.abort()

    def shutdown(self) -> None:
        self._abort()
        self.groups = ()
