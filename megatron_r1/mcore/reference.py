"""The reference policy: a whole second set of weights in host memory, put into the model for one forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron_r1.mcore import cpu


class Reference:
    """Weights of this rank's chunks as they were at optimizer step `step`."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, step: int) -> None:
        self.step = step
        self.live = model_tensors(chunks)
        self.weights = [_on_host(tensor) for tensor in self.live]
        self._policy: list[torch.Tensor] | None = None
        _copy(self.weights, self.live)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference within, and the policy again after it, to the bit."""
        if self._policy is None:
            self._policy = [_on_host(tensor) for tensor in self.live]
        _copy(self._policy, self.live)
        _copy(self.live, self.weights)
        try:
            yield
        finally:
            _copy(self.live, self._policy)

    def by_tensor(self) -> dict[int, torch.Tensor]:
        """The reference's weights by the id of the model's tensor that they replace."""
        return {id(live): weight for live, weight in zip(self.live, self.weights, strict=True)}

    def assign(self, values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take weights as (the model's tensor that they replace, value); all of them."""
        weights = self.by_tensor()
        pairs = [(weights.pop(id(live)), value) for live, value in values]
        assert not weights, f"{len(weights)} weights of the reference are missing"
        _copy([weight for weight, _ in pairs], [value for _, value in pairs])


def model_tensors(chunks: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """Parameters and persistent buffers (the routers' correction bias is one), each once."""
    found: dict[int, torch.Tensor] = {}
    for chunk in chunks:
        named = chunk.state_dict(keep_vars=True).items()
        found.update((id(tensor), tensor) for name, tensor in named if not name.endswith("_extra_state"))
    return list(found.values())


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=cpu.has_cuda())


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    torch._foreach_copy_(targets, sources, non_blocking=True)
    torch.cuda.synchronize()
