"""Megatron's GPT model as a policy needs it: logits always, the loss of multi-token prediction (MTP) on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import checkpoint, gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.mcore.overlap import SchedulePlan


@dataclass
class GroupedConfig(TransformerConfig):
    """Megatron's configuration of a model with grouped-query attention, and what Megatron keeps elsewhere or does not vary."""

    rotary_base: float = 10000.0
    llama3_rope: dict[str, float] | None = None  # frequencies as Llama 3 scales them; of its numbers Megatron has only the factor
    attention_output_bias: bool = False


class ScoreHead(torch.nn.Module):
    """A reward model's output layer: hidden states [T / TP, 1, hidden] -> scores [T, 1, 1] in float32.

    Every tensor-parallel rank has all of it and computes all scores, so each has its whole gradient.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor, weight: None = None) -> tuple[torch.Tensor, None]:
        """The scores, and no bias: what Megatron's output layer returns."""
        if self.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return torch.nn.functional.linear(hidden_states.float(), self.weight.float()), None


class PolicyModel(GPTModel):
    """Called as

        model(input_ids=[1, T], position_ids=[1, T], attention_mask=None, packed_seq_params=thd)

    it returns logits [1, T, V / TP] on the last pipeline stage, float32 or bf16 as the model or `head_dtype` is, and hidden
    states [T / TP, 1, hidden] on the others. MTP layers are then left out. A reward
    model's logits are its scores [1, T, 1].

    With `labels` [1, T] and `loss_mask` [1, T] too (as in a Microbatch: labels[t] is token t+1 of the same sequence), it
    returns the same logits, and their backward also adds the gradient of

        mtp_loss_scaling_factor / depth * sum over depths k, positions t of loss_mask * -log p_k(label of t + k)

    which the optimizer step divides by the count that the main loss reports, its tokens to learn, as V3 does
    (arXiv:2412.19437, eq. 24 and 25). Labels and mask never cross the sequences of `packed_seq_params`. `mtp_loss` is
    then (that sum without the factor, the number of its tokens), detached, until the next forward.

    MTP layers share the embedding and the output layer, so a loss of theirs trains those too.
    """

    mtp_loss: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, config: TransformerConfig, *args: Any, head_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.head_dtype = head_dtype  # of the output layer's product and of the logits; None: the model's
        if head_dtype is not None and self.post_process:
            self.output_layer.gradient_accumulation_fusion = False  # that kernel writes to the weight itself, not through a cast
        if scaling := getattr(config, "llama3_rope", None):
            self.rotary_pos_emb.inv_freq = self.rotary_pos_emb._apply_scaling(self.rotary_pos_emb.inv_freq, **scaling)
        for layer in self.mtp.layers if self.mtp_process else ():
            if "forward_func" in signature(layer._checkpointed_forward).parameters:  # newer cores need no help
                layer._checkpointed_forward = partial(_recomputed, layer._proj_and_transformer_layer)

    def build_schedule_plan(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: None, **rest: Any) -> SchedulePlan:
        """The same call in parts, for Megatron to run between those of another microbatch."""
        return SchedulePlan(self, input_ids, position_ids, attention_mask, **rest)

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        loss_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        self.mtp_loss = None
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if self.mtp_process and labels is not None:
            # [(1 + depth) * T / TP, 1, hidden]: the decoder's output, then each depth's
            hidden_states = self.mtp(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                packed_seq_params=packed_seq_params,
                embedding=self.embedding,
            )
            hidden_states, *deeper = hidden_states.chunk(1 + self.config.mtp_num_layers)
            loss = self._mtp_loss(deeper, labels, loss_mask=loss_mask, weight=weight, packed_seq_params=packed_seq_params)
            hidden_states = MTPLossAutoScaler.apply(hidden_states, self.config.mtp_loss_scaling_factor / len(deeper) * loss)
        return self._logits(hidden_states, weight).transpose(0, 1).contiguous()

    def _logits(self, hidden_states: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if self.head_dtype is not None:
            weight = (self.output_layer.weight if weight is None else weight).to(self.head_dtype)
            hidden_states = hidden_states.to(self.head_dtype)
        return self.output_layer(hidden_states, weight=weight)[0]

    def _mtp_loss(
        self,
        deeper: list[torch.Tensor],
        labels: torch.Tensor,
        *,
        loss_mask: torch.Tensor,
        weight: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> torch.Tensor:
        """The sum of the losses of all depths."""
        total, tokens = torch.zeros((), device=labels.device), torch.zeros((), device=labels.device)
        group = self.pg_collection.cp
        for hidden_states in deeper:
            labels, _ = roll_tensor(labels, cp_group=group, packed_seq_params=packed_seq_params)
            loss_mask, _ = roll_tensor(loss_mask, cp_group=group, packed_seq_params=packed_seq_params)
            logits = self._logits(hidden_states, weight)
            total = total + (loss_mask * self.compute_language_model_loss(labels, logits)).sum()
            tokens = tokens + loss_mask.sum()
        self.mtp_loss = (total.detach(), tokens)
        return total


def _recomputed(
    forward: Callable[..., torch.Tensor], *_: Any, hidden_states: torch.Tensor, decoder_input: torch.Tensor, **rest: Any
) -> Any:
    """An MTP layer's full recompute. Megatron 0.16's own passes the packing to autograd, which takes only tensors."""

    def run(hidden_states: torch.Tensor, decoder_input: torch.Tensor) -> torch.Tensor:
        return forward(hidden_states=hidden_states, decoder_input=decoder_input, **rest)

    return checkpoint(run, False, hidden_states, decoder_input)
