"""Floating-point operations of a DeepSeek-V3 by its config.json: what it must compute, a multiplication and an addition being two.

Counted are the matrix products of linear layers, head, router and attention. Attention is causal: token i meets i + 1 keys. What is
recomputed in the backward pass is not counted again, so the share of the peak is that of useful work (MFU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BACKWARD = 2  # times the forward: the gradient of the inputs and that of the weights


def layer(hf: dict[str, Any], *, dense: bool) -> int:
    """Of one layer's forward for one token, without attention's products of tokens with tokens."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    queries, latent, query = heads * (nope + rope), hf["kv_lora_rank"], hf["q_lora_rank"]
    weights = hidden * queries if query is None else hidden * query + query * queries
    weights += hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    if dense:
        return 2 * (weights + 3 * hidden * hf["intermediate_size"])
    experts = hf["num_experts_per_tok"] + (hf["n_shared_experts"] or 0)
    return 2 * (weights + hidden * hf["n_routed_experts"] + experts * 3 * hidden * hf["moe_intermediate_size"])


def attention(hf: dict[str, Any], lengths: Sequence[int]) -> int:
    """Of one layer's forward: queries with keys and weights with values, for packed sequences of these lengths."""
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 2 * pairs * hf["num_attention_heads"] * (hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] + hf["v_head_dim"])


def forward(hf: dict[str, Any], lengths: Sequence[int]) -> int:
    """Of a whole forward without MTP; the head is computed for every token."""
    tokens, layers, dense = sum(lengths), hf["num_hidden_layers"], hf["first_k_dense_replace"]
    linear = dense * layer(hf, dense=True) + (layers - dense) * layer(hf, dense=False)
    return tokens * (linear + 2 * hf["hidden_size"] * hf["vocab_size"]) + layers * attention(hf, lengths)


def training(hf: dict[str, Any], lengths: Sequence[int]) -> int:
    """Of a forward and its backward."""
    return (1 + BACKWARD) * forward(hf, lengths)
