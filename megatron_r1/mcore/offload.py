"""What a policy holds of a GPU, moved to host memory and back: so that servers on the same GPU have room while they sample.

Tensors stay the objects they are: only the memory beneath them goes and comes, so that every view of it, as of the parameters in
Megatron's buffers, is right again after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from megatron_r1.mcore import cpu


class Offload:
    """Parameters, gradients and optimizer state of a policy's wrapped chunks. Gradients are not kept: a step begins by clearing them."""

    def __init__(self, chunks: Sequence[torch.nn.Module], optimizer: Any) -> None:
        self.chunks, self.optimizer = chunks, optimizer
        self.kept: list[tuple[torch.UntypedStorage, torch.Tensor]] = []  # memory that was taken away, and its bytes on the host
        self.dropped: list[tuple[torch.UntypedStorage, int]] = []  # memory of gradients, and how much it was
        self._host: dict[int, torch.Tensor] = {}  # pinned once, for pinning is slow

    @property
    def is_out(self) -> bool:
        """Whether the policy is on the host."""
        return bool(self.kept)

    def move_out(self) -> None:
        """Free the GPU of it; nothing may use the policy until `move_in`."""
        assert not self.is_out, "moved out twice"
        device = next(self.chunks[0].module.parameters()).device
        gradients = _storages(self._gradients(), device)
        for key, storage in _storages(self._tensors(), device).items():
            if key not in gradients:
                self.kept.append((storage, self._to_host(key, storage)))
        self.dropped = [(storage, storage.nbytes()) for storage in gradients.values()]
        for module in (module for chunk in self.chunks for module in chunk.module.modules()):
            getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's FP8 copies of weights, made again when they are needed
        torch.cuda.synchronize()
        for storage, _ in (*self.kept, *self.dropped):
            storage.resize_(0)
        self.trim()

    def trim(self) -> None:
        """Give the GPU back what torch keeps of it from larger moments: other processes can map only what is free on the device."""
        if cpu.has_cuda():
            torch.cuda.empty_cache()

    def move_in(self) -> None:
        """Everything is where it was; gradients are zero."""
        assert self.is_out, "is not on the host"
        for storage, host in self.kept:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        for storage, size in self.dropped:
            storage.resize_(size)
            _bytes(storage).zero_()
        torch.cuda.synchronize()
        self.kept, self.dropped = [], []

    def _to_host(self, key: int, storage: torch.UntypedStorage) -> torch.Tensor:
        if key not in self._host or self._host[key].numel() != storage.nbytes():
            self._host[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=cpu.has_cuda())
        return self._host[key].copy_(_bytes(storage), non_blocking=True)

    def _tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self.chunks:
            yield from chunk.module.parameters()
            yield from chunk.module.buffers()
        for part in self.optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
                yield from (value for state in part.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))

    def _gradients(self) -> Iterator[torch.Tensor]:
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):  # Megatron's, which are not a module's buffers
                yield buffer.grad_data


def _storages(tensors: Iterable[torch.Tensor], device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Each piece of the device's memory once, by an identity that lasts as long as it does."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor.device == device)
    return {storage._cdata: storage for storage in found if storage.nbytes()}


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
