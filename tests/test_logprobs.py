"""Log-probs and entropy are those of a plain softmax, in value and gradient, whole or divided over the vocabulary."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from megatron_r1.parallel import Parallel

T, V = 1500, 64  # more rows than the entropy takes at a time


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask_T = (torch.rand(T) < 0.8).float()
    return torch.randn(1, T, V) * 4 + 30, torch.randint(V, (T,)), mask_T, torch.randn(T)


def ours(parallel: Parallel, temperature: float, none_learned: bool) -> list[torch.Tensor]:
    from megatron_r1.mcore import distributed
    from megatron_r1.mcore.logprobs import token_logprobs

    distributed.init(parallel, seed=1)
    logits, labels_T, mask_T, weight_T = inputs()
    width = V // parallel.tensor_model_parallel_size
    part = logits[:, :, distributed.rank() * width :][:, :, :width].clone().requires_grad_()
    logprobs_T, entropy_T = token_logprobs(part, labels_T, mask_T=mask_T * (not none_learned), temperature=temperature)
    (logprobs_T * weight_T).sum().backward()
    distributed.shutdown()
    assert not entropy_T.requires_grad
    return [x.detach().numpy() for x in (logprobs_T, entropy_T, part.grad)]


def plain(temperature: float) -> list[torch.Tensor]:
    logits, labels_T, mask_T, weight_T = inputs()
    logits = logits.double().requires_grad_()
    distribution = (logits[0] / temperature).log_softmax(-1)
    logprobs_T = distribution.gather(1, labels_T[:, None])[:, 0] * mask_T
    (logprobs_T * weight_T).sum().backward()
    return [logprobs_T.detach(), -(distribution.exp() * distribution).sum(-1).detach() * mask_T, logits.grad]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_they_equal_a_plain_softmax_at_the_sampling_temperature(ranks: int, temperature: float):
    results = run_ranks(ranks, ours, Parallel(tensor_model_parallel_size=ranks), temperature, False)
    logprobs_T, entropy_T, gradient = plain(temperature)
    for found in results:
        torch.testing.assert_close(torch.from_numpy(found[0]).double(), logprobs_T, atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.from_numpy(found[1]).double(), entropy_T, atol=2e-5, rtol=0)
    found = torch.cat([torch.from_numpy(result[2]) for result in results], dim=-1)
    torch.testing.assert_close(found.double(), gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_to_learn_gives_zeros_and_a_gradient_of_zero(ranks: int):
    for found in run_ranks(ranks, ours, Parallel(tensor_model_parallel_size=ranks), 1.0, True):
        assert not any(array.any() for array in found)
