"""A tiny V3 with random weights, its log-probs by transformers, and one real vLLM server for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

VOCABULARY = 320
TINY_V3 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "topk_method": "noaux_tc",  # vLLM makes the correction bias only with these two
    "scoring_func": "sigmoid",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def tiny_model(seed: int) -> DeepseekV3ForCausalLM:
    """Random weights, large enough that distributions are far from uniform and routing matters."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**TINY_V3, architectures=["DeepseekV3ForCausalLM"])).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.normal_(0.0, 0.1)
    return model


def checkpoint_weights(model: DeepseekV3ForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under their checkpoint names: transformers keeps experts fused in memory."""
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        for expert, weight in enumerate(tensor) if last in ("gate_up_proj", "down_proj") else ():
            if last == "down_proj":
                yield f"{stem}.{expert}.down_proj.weight", weight
            else:
                gate, up = weight.chunk(2)
                yield f"{stem}.{expert}.gate_proj.weight", gate
                yield f"{stem}.{expert}.up_proj.weight", up
        if last not in ("gate_up_proj", "down_proj"):
            yield name, tensor


@torch.no_grad()
def logprobs(model: DeepseekV3ForCausalLM, token_ids: list[int], *, temperature: float = 1.0) -> list[float]:
    """Log-probs of token_ids[1:]."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def save(model: DeepseekV3ForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
