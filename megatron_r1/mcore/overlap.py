"""The plan of a forward pass by which Megatron's schedule hides the experts' communication: arXiv:2412.19437, section 3.2.1.

One microbatch's dispatch and combine are on their way while another's attention and experts are computed, forward with backward.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock


class SchedulePlan(TransformerModelChunkSchedulePlan):
    """The decoder's layers in parts. MTP layers are no part of it: PolicyModel runs them after the decoder, and only to train them,
    whereas Megatron's plan of them takes no packed sequences.
    """

    def _build_layer_schedule_plan(self, module: Any, *streams: Any) -> None:
        if not isinstance(module, MultiTokenPredictionBlock):
            super()._build_layer_schedule_plan(module, *streams)
