"""The names Megatron gives a parameter on one rank -> the one name it has in the whole model.

A rank counts layers from 0 in each pipeline stage and model chunk, and experts from 0 on each expert-parallel rank;
the local layers and Transformer Engine's spell a few parameters differently. The canonical name has global indices and
the local layers' spelling, with `experts.{e}` for routed expert e.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Transformer Engine fuses a layer norm into the linear after it, and keeps a rank's experts in one module.
# Newer cores call the block inside an MTP layer mtp_model_layer.
SPELLINGS = (
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_weight$"), r".input_layernorm.weight"),
    (re.compile(r"\.linear_q_up_proj\.layer_norm_weight$"), r".q_layernorm.weight"),
    (re.compile(r"\.linear_kv_up_proj\.layer_norm_weight$"), r".kv_layernorm.weight"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_weight$"), r".pre_mlp_layernorm.weight"),
    (re.compile(r"\.experts\.linear_fc([12])\.weight(\d+)$"), r".experts.local_experts.\2.linear_fc\1.weight"),
    (re.compile(r"^(mtp\.layers\.\d+)\.mtp_model_layer\."), r"\1.transformer_layer."),
)
LAYER = re.compile(r"^(decoder|mtp)\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Place:
    """Where one model chunk of one rank stands in the whole model."""

    decoder_layers: Mapping[int, int]  # index in the chunk -> global index, both from 0
    mtp_layers: Mapping[int, int]
    first_expert: int = 0  # global index of this rank's expert 0
    tied: bool = False  # the output layer is the embedding


def canonical(local: str, place: Place) -> str:
    """The global name of a parameter or buffer that a chunk at `place` calls `local`."""
    for pattern, spelling in SPELLINGS:
        local = pattern.sub(spelling, local)
    if place.tied and local == "output_layer.weight":
        return EMBEDDING  # with pipeline stages the last one holds a copy under this name
    if layer := LAYER.match(local):
        indices = place.decoder_layers if layer[1] == "decoder" else place.mtp_layers
        local = f"{layer[1]}.layers.{indices[int(layer[2])]}.{local[layer.end() :]}"
    return EXPERT.sub(lambda expert: f".experts.{place.first_expert + int(expert[1])}.", local)
