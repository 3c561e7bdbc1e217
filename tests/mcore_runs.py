"""What the tests of the policy and its checkpoints run on each rank: a small model, sequences, optimizer steps."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.algorithms import grpo, sft
from megatron_r1.packing import TokenSequence, plan
from megatron_r1.parallel import Parallel

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_v3" / "config.json"
GRPO = grpo.Options(kl_coefficient=0.1, clip_epsilon=0.2, old_logprobs="sampler")
TEMPERATURE = 0.9


def model(**changes: Any) -> dict[str, Any]:
    """tiny_v3 made smaller where that changes nothing, with weights that spread gates and logits."""
    smaller = {"hidden_size": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "initializer_range": 0.1}
    return json.loads(CONFIG.read_text()) | smaller | changes


def sequences(count: int, *, seed: int, vocab: int = 320) -> list[TokenSequence]:
    """Prompts and completions of mixed lengths with an advantage each."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt, completion = rng.randint(2, 9), rng.randint(1, 24)
        made.append(
            TokenSequence(
                ids=[rng.randrange(vocab) for _ in range(prompt + completion)],
                learned=[0] * prompt + [1] * completion,
                advantage=rng.uniform(-1.5, 1.5),
                sampler_logprobs=[0.0] * prompt + [-rng.uniform(2.0, 8.0) for _ in range(completion)],
            )
        )
    return made


class Run:
    """A policy with random weights on one layout, as a context: leaving it undoes the layout."""

    def __init__(self, parallel: Parallel, *, hf: dict[str, Any] | None = None, **training: Any) -> None:
        self.parallel, self.hf = parallel, hf or model()
        # with AdamW's usual epsilon, rounding decides the sign of a step where gradients nearly cancel
        self.training = {"lr": 2e-4, "lr_warmup_steps": 1, "adam_eps": 1e-6, **training}

    def __enter__(self) -> Run:
        from megatron_r1.mcore import distributed
        from megatron_r1.mcore.policy import Policy, Training

        distributed.init(self.parallel, seed=1)
        self.policy = Policy(self.hf, self.parallel, training=Training(**self.training), seed=1)
        self.policy.init_random()
        return self

    def __exit__(self, *exc: object) -> None:
        from megatron_r1.mcore import distributed

        distributed.shutdown()

    def batches(self, made: list[TokenSequence], *, chunk_tokens: int = 512) -> list[Any]:
        """This rank's microbatches; chunk_tokens = 0 is one sequence a microbatch."""
        from megatron_r1.mcore import distributed

        ranks, rank, multiple = distributed.dp_size(), distributed.dp_rank(), self.policy.count_multiple
        if chunk_tokens:
            chunks = plan([len(s.ids) for s in made], chunk_tokens=chunk_tokens, num_groups=ranks, count_multiple=multiple)[rank]
        else:
            chunks = [[i] for i in range(rank, len(made), ranks)]
        return self.policy.pack(made, chunks)

    def grpo_step(self, number: int, *, chunk_tokens: int = 512) -> dict[str, float]:
        """Old and reference log-probs, then one optimizer step, on data that depend on `number` only."""
        batches = self.batches(sequences(24, seed=number), chunk_tokens=chunk_tokens)
        self.policy.attach_logprobs(batches, "old", temperature=TEMPERATURE)
        self.policy.attach_logprobs(batches, "ref", temperature=TEMPERATURE)
        return self.policy.train_step(batches, partial(grpo.loss, options=GRPO), temperature=TEMPERATURE)

    def sft_step(self, number: int, *, chunk_tokens: int = 512) -> dict[str, float]:
        """One optimizer step of SFT."""
        return self.policy.train_step(self.batches(sequences(24, seed=number), chunk_tokens=chunk_tokens), sft.loss)

    def weights(self) -> dict[str, Any]:
        """All weights by Hugging Face name, as arrays that a pipe can carry."""
        return {name: tensor.float().numpy().copy() for name, tensor in self.policy.hf_weights()}
