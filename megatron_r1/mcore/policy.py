"""The policy: a Megatron model on its layout, its log-probs, its optimizer step and its weights.

Everything between the microbatches and the weights is Megatron's: model chunks, DDP, pipeline schedules, distributed
optimizer. What is here is the forward step they call back, and the reduction of what the loss reports.
All methods are collective: every rank calls them, in the same order, with its own data-parallel rank's microbatches.

Legend: T packed tokens, t those of this rank (context.py), N sequences in a pack, V vocabulary shard of this rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1.mcore import cpu, reduction
from megatron_r1.mcore.context import Division
from megatron_r1.mcore.logprobs import token_logprobs
from megatron_r1.mcore.optimizer import Training, make_optimizer, wrap
from megatron_r1.mcore.overlap import SchedulePlan
from megatron_r1.mcore.reference import Reference
from megatron_r1.models import is_reward_model
from megatron_r1.models.build import build
from megatron_r1.packing import TokenSequence, pack
from megatron_r1.parallel import Parallel
from megatron_r1.types import LossOutput, Microbatch
from megatron_r1.weights import shard
from megatron_r1.weights.exporter import Exporter, Scope
from megatron_r1.weights.hf import Reader, SafetensorsReader
from megatron_r1.weights.random import SCORE, NewHead, RandomWeights

Loss = Callable[[torch.Tensor, torch.Tensor, Microbatch], LossOutput]
ScoreLoss = Callable[[torch.Tensor, Microbatch], LossOutput]
Finish = Callable[[Microbatch, Division, torch.Tensor], tuple[torch.Tensor, torch.Tensor, Any]]


class Policy:
    """One policy on the ranks that `distributed.init` laid out; `load_hf`, `init_random` or a checkpoint gives it weights.

    hf        the model's config.json
    parallel  the layout that was given to `distributed.init`
    """

    def __init__(self, hf: dict[str, Any], parallel: Parallel, *, training: Training, seed: int) -> None:
        self.hf, self.parallel, self.training, self.seed = hf, parallel, training, seed
        chunks = build(
            hf,
            parallel,
            dtype=training.torch_dtype,
            recompute=training.recompute,
            train_mtp=training.train_mtp,
            mtp_loss_scale=training.mtp_loss_scale,
            router_bias_update_rate=training.router_bias_update_rate,
            kernels=training.kernels,
        )
        self.chunks = wrap(chunks)
        self.optimizer, self.scheduler = make_optimizer(self.chunks, training)
        self.config = chunks[0].config  # one object, shared by all chunks
        # gloo reads the tensor itself, whenever the receiver is ready; nccl has read it by the time the stream gets here
        self.config.deallocate_pipeline_outputs = cpu.has_cuda()
        self._exporters: dict[Scope, Exporter] = {}
        self.reference: Reference | None = None
        self.step = 0  # optimizer steps done
        self._expert_load: dict[str, float] = {}

    @property
    def version(self) -> int:
        """Names the current weights: rollouts say which version they were sampled from."""
        return self.step

    @property
    def reference_step(self) -> int | None:
        """The optimizer step whose weights the reference has; None before there is one."""
        return self.reference.step if self.reference else None

    def pack(self, sequences: Sequence[TokenSequence], chunks: list[list[int]]) -> list[Microbatch]:
        """`packing.pack` for this layout: sequence and context parallelism divide the tokens, FP8 takes them in blocks."""
        context, tensor = self.parallel.context_parallel_size, self.parallel.tensor_model_parallel_size
        each = 2 * context if context > 1 else 1
        multiple = math.lcm(each, context * tensor * self.training.kernels.token_multiple)
        return pack(sequences, chunks, multiple=multiple, sequence_multiple=each)

    @property
    def count_multiple(self) -> int:
        """What the number of microbatches of a call must be a multiple of: interleaved pipelines run them in such groups."""
        return self.parallel.pipeline_model_parallel_size if self.parallel.virtual_pipeline_model_parallel_size else 1

    def load_hf(self, folder: str | Path) -> None:
        """Take the weights of a Hugging Face folder; a reward model begins as a language model with a new head.

        Raises ValueError where they do not fit the model.
        """
        reader = SafetensorsReader(folder)
        starts = is_reward_model(self.hf) and SCORE not in reader.files
        self.load(NewHead(reader, self.hf, seed=self.seed) if starts else reader)

    def init_random(self) -> None:
        """Take random weights, the same for a seed in every layout."""
        self.load(RandomWeights(self.hf, seed=self.seed))

    def load(self, reader: Reader) -> None:
        """Take the weights of any reader of Hugging Face names."""
        shard.load(self.chunks, reader, self.hf)
        self.optimizer.reload_model_params()  # the optimizer's float32 copies

    def hf_weights(self, scope: Scope = "all") -> Exporter:
        """All weights as (Hugging Face name, whole tensor), on the ranks of this scope; a collective to call and to iterate, to the end."""
        if scope not in self._exporters:
            self._exporters[scope] = Exporter(self.chunks, self.hf, scope=scope)
        return self._exporters[scope]

    def refresh_reference(self) -> None:
        """The reference becomes the policy as it is now."""
        self.reference = Reference(self.chunks, step=self.step)

    def train_step(self, microbatches: list[Microbatch], loss: Loss, *, temperature: float = 1.0) -> dict[str, float]:
        """One optimizer step on all microbatches of all data-parallel ranks, which all bring equally many.

        The gradient is that of sum(loss_sum) / sum(count) over all of them. Returns the metrics of the loss, reduced
        alike, with policy/grad_norm, policy/lr and moe/..., on every rank. Raises FloatingPointError, on every rank, for
        a gradient that is not finite.
        """
        outputs: list[LossOutput] = []
        finish = partial(self._loss, loss=loss, temperature=temperature, outputs=outputs)
        return self._update(microbatches, finish, outputs, labels=self.training.train_mtp)

    def train_scores(self, microbatches: list[Microbatch], loss: ScoreLoss) -> dict[str, float]:
        """The same of a reward model; `loss` is given the score of every sequence, [N] in float32, and the microbatch."""
        outputs: list[LossOutput] = []
        return self._update(microbatches, partial(self._score_loss, loss=loss, outputs=outputs), outputs)

    @torch.no_grad()
    def scores(self, microbatches: list[Microbatch], loss: ScoreLoss) -> dict[str, float]:
        """What `train_scores` would report of the loss; nothing is trained."""
        outputs: list[LossOutput] = []
        self._run(microbatches, partial(self._score_loss, loss=loss, outputs=outputs))
        return reduction.over_stages(reduction.of_losses(outputs))

    def _update(
        self, microbatches: list[Microbatch], finish: Finish, outputs: list[LossOutput], *, labels: bool = False
    ) -> dict[str, float]:
        """Gradients and the optimizer's step; `finish` fills `outputs`."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(microbatches, finish, labels=labels)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"optimizer step {self.step + 1}: the gradient's norm is {grad_norm}; resume from the last checkpoint")
        metrics = {"policy/grad_norm": float(grad_norm), "policy/lr": self.optimizer.param_groups[0]["lr"], **self._expert_load}
        self.scheduler.step(1)
        self.step += 1
        return reduction.over_stages({**metrics, **reduction.of_losses(outputs)})

    @torch.no_grad()
    def attach_logprobs(self, microbatches: list[Microbatch], which: Literal["old", "ref"], *, temperature: float = 1.0) -> None:
        """Fill old_logprobs_T by the policy as it is now, or ref_logprobs_T by the reference, on every rank."""
        if which == "old":
            found = self._logprobs(microbatches, temperature)
        else:
            assert self.reference is not None, "refresh_reference() or a checkpoint must have set the reference"
            with self.reference.in_place():
                found = self._logprobs(microbatches, temperature)
        for microbatch, logprobs_T in zip(microbatches, found, strict=True):
            setattr(microbatch, f"{which}_logprobs_T", logprobs_T)

    def _logprobs(self, microbatches: list[Microbatch], temperature: float) -> list[torch.Tensor]:
        """The log-probs of each microbatch, from the last pipeline stage to all."""
        found: list[torch.Tensor] = []
        self._run(microbatches, partial(self._collect, temperature=temperature, found=found))
        sizes = [m.tokens_T.numel() for m in microbatches]
        everything = torch.cat(found) if found else torch.empty(sum(sizes), device=_device())
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        if pipeline.size() > 1:
            dist.broadcast(everything, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
        return list(everything.split(sizes))

    def _run(self, microbatches: list[Microbatch], finish: Finish, *, labels: bool = False) -> None:
        """Megatron's schedule over the microbatches: with backward where gradients are enabled, else forward only."""
        count, multiple = len(microbatches), self.count_multiple
        assert count and count % multiple == 0, f"{count=} microbatches, {multiple=}"
        inputs = [(on_device(m), _packed(m)) for m in microbatches]
        sizes = {m.tokens_T.numel() for m in microbatches}
        self.config.variable_seq_lengths = len(sizes) > 1  # else stages need not tell each other the shape
        iterators = [iter(inputs) for _ in self.chunks]
        self.config.finalize_model_grads_func = self._finalize_grads
        try:
            get_forward_backward_func()(
                forward_step_func=partial(self._forward, finish=finish, labels=labels),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=count,
                seq_length=max(sizes),
                micro_batch_size=1,
                forward_only=not torch.is_grad_enabled(),
            )
        finally:
            self.config.finalize_model_grads_func = None  # a cycle through backward hooks is never collected

    def _forward(
        self,
        inputs: Iterator[tuple[Microbatch, PackedSeqParams]],
        model: torch.nn.Module,
        return_schedule_plan: bool = False,
        *,
        finish: Finish,
        labels: bool,
    ) -> tuple[torch.Tensor | SchedulePlan, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Any]]]:
        """Megatron's forward step: one chunk's output for one microbatch, or its plan, and what turns the last one's into the loss."""
        microbatch, packed = next(inputs)
        cut = packed.division.cut
        targets = {"labels": cut(microbatch.labels_T)[None], "loss_mask": cut(microbatch.loss_mask_T)[None]} if labels else {}
        output = (model.build_schedule_plan if return_schedule_plan else model)(
            input_ids=cut(microbatch.tokens_T)[None],
            position_ids=cut(microbatch.positions_T)[None],
            attention_mask=None,
            packed_seq_params=packed,
            **targets,
        )
        return output, partial(finish, microbatch, packed.division)

    def _loss(
        self, microbatch: Microbatch, division: Division, logits: torch.Tensor, *, loss: Loss, temperature: float, outputs: list[LossOutput]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        logprobs_t, entropy_t = _token_logprobs(microbatch, division, logits, temperature=temperature)
        output = loss(division.join(logprobs_t), division.join(entropy_t), microbatch)
        if (mtp_loss := self.chunks[-1].module.mtp_loss) is not None:
            sums = torch.stack(mtp_loss)
            dist.all_reduce(sums, group=division.group)
            value, tokens = sums.tolist()
            output.sums["policy/mtp_loss"] = (value, tokens)
        outputs.append(output)
        return _counted(output, division)

    def _score_loss(
        self, microbatch: Microbatch, division: Division, scores: torch.Tensor, *, loss: ScoreLoss, outputs: list[LossOutput]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """scores [1, t, 1]: a sequence's score is its last token's."""
        scores_T = division.join(scores[0, :, 0])
        output = loss(scores_T.index_select(0, microbatch.last_N), microbatch)
        outputs.append(output)
        return _counted(output, division)

    def _collect(
        self, microbatch: Microbatch, division: Division, logits: torch.Tensor, *, temperature: float, found: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        logprobs_t, _ = _token_logprobs(microbatch, division, logits, temperature=temperature)
        found.append(division.join(logprobs_t))
        return logits.new_zeros(()), torch.zeros((), dtype=torch.int, device=logits.device), {}

    def _finalize_grads(self, chunks: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Megatron's own, which also updates the routers' bias and then forgets how many tokens each expert had."""
        self._expert_load = reduction.expert_load(self.chunks)
        finalize_model_grads(chunks, *args, **kwargs)


def on_device(microbatch: Microbatch) -> Microbatch:
    """The microbatch with its tensors where the model is; itself on a CPU."""
    if not cpu.has_cuda():
        return microbatch
    tensors = {f.name: getattr(microbatch, f.name) for f in dataclasses.fields(microbatch)}
    moved = {name: value.to(_device(), non_blocking=True) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(microbatch, **moved)


def _packed(microbatch: Microbatch) -> PackedSeqParams:
    """Megatron's description of the packing, and with it how context parallelism divides it."""
    bounds = microbatch.cu_seqlens.to(_device())
    longest = int(microbatch.cu_seqlens.diff().max())
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    packed.division = Division(bounds)
    return packed


def _token_logprobs(
    microbatch: Microbatch, division: Division, logits: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    labels_t, mask_t = division.cut(microbatch.labels_T), division.cut(microbatch.loss_mask_T)
    return token_logprobs(logits, labels_t, mask_T=mask_t, temperature=temperature)


def _counted(output: LossOutput, division: Division) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """What Megatron's schedule is told of a loss. All ranks of a context-parallel group have the same one: the first one's counts."""
    count = output.count if division.rank == 0 else 0
    return output.loss_sum, torch.tensor(count, dtype=torch.int, device=output.loss_sum.device), {}


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if cpu.has_cuda() else torch.device("cpu")
