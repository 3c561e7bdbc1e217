"""A stand-in for Transformer Engine that computes with torch on a CPU: for tests of what is built of its layers, not of its kernels.

Constructor and call signatures, parameter names and shapes are those of Transformer Engine 2.12, and in FP8 it refuses the shapes that
Transformer Engine refuses. `install()` must run before the first import of Megatron, in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

seen: list[Any] = []  # the recipe of each FP8 context that was entered
active: list[Any] = []


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None):
    seen.append(fp8_recipe)
    active.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        active.pop()


def is_fp8() -> bool:
    return bool(active) and active[-1] is not None


def check_fp8(*tensors: torch.Tensor) -> None:
    """transformer_engine.pytorch.utils.assert_dim_for_fp8_exec"""
    for t in tensors if is_fp8() else ():
        assert t[..., 0].numel() % 8 == 0 and t.shape[-1] % 16 == 0, f"FP8 takes no {tuple(t.shape)}"


class Module(torch.nn.Module):
    """TransformerEngineBaseModule: an extra state in every state_dict."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...

    def make(self, name: str, rows: int, columns: int, *, init_method: Any, dtype: torch.dtype) -> None:
        parameter = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype))
        with torch.no_grad():
            init_method(parameter)
        self.register_parameter(name, parameter)


class Linear(Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "the stand-in is not tensor parallel"
        self.in_features, self.out_features, self.parallel_mode, self.use_bias = in_features, out_features, parallel_mode, bias
        self.save_original_input = False
        self.make("weight", out_features, in_features, init_method=init_method, dtype=params_dtype)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        check_fp8(x, self.weight)
        return linear(x, self.weight, self.bias if self.use_bias else None)


class LayerNormLinear(Linear):
    def __init__(
        self, in_features: int, out_features: int, *, eps: float, normalization: str, return_layernorm_output: bool, **rest: Any
    ) -> None:
        assert (normalization, rest.pop("zero_centered_gamma"), return_layernorm_output) == ("RMSNorm", False, False)
        super().__init__(in_features, out_features, **rest)
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=rest["params_dtype"]))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return super().forward(torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), is_first_microbatch)


class RMSNorm(Module):
    def __init__(
        self,
        normalized_shape: int | None = None,  # Megatron-Core 0.16 calls it hidden_size
        *,
        hidden_size: int | None = None,
        eps: float,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: Any,
    ) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GroupedLinear(Module):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, init_method: Any, params_dtype: torch.dtype, bias: bool, **rest: Any
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias, self.save_original_input = num_gemms, bias, False
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for i in range(num_gemms):
            self.make(f"weight{i}", out_features, in_features, init_method=init_method, dtype=params_dtype)

    def init_fp8_metadata(self, num_gemms: int) -> None: ...

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        parts = x.split(m_splits)
        check_fp8(*parts)
        return torch.cat([linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


class Fp8Padding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        assert align_size is None

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        sizes = [-(-m // 16) * 16 for m in m_splits]
        parts = zip(x.split(m_splits), sizes, strict=True)
        return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, size - len(part))) for part, size in parts]), sizes


class Fp8Unpadding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        assert align_size is None

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        parts = x.split([-(-m // 16) * 16 for m in m_splits])
        return torch.cat([part[:m] for part, m in zip(parts, m_splits, strict=True)])


class DotProductAttention(Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        attn_mask_type: str,
        attention_type: str,
        sequence_parallel: bool,
        tp_size: int,
        get_rng_state_tracker: Any,
        tp_group: Any,
        layer_number: int,
        softmax_scale: float | None,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *,
        attn_mask_type: str,
        qkv_format: str,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_kv: torch.Tensor,
        cu_seqlens_q_padded: torch.Tensor | None,
        cu_seqlens_kv_padded: torch.Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        pad_between_seqs: bool | None = None,
    ) -> torch.Tensor:
        """[T, H, D] -> [T, H * E]"""
        assert not pad_between_seqs
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        assert (cu_seqlens_q.dtype, int(cu_seqlens_q[-1])) == (torch.int32, len(query))
        queries = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(queries, dim=1) for t in (key, value))
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(*(t.transpose(0, 1).split(sizes, dim=1) for t in (query, key, value)), strict=True)
        done = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale) for q, k, v in parts]
        return torch.cat(done, dim=1).transpose(0, 1).flatten(1)


def moe_permute_with_probs(x: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int) -> Any:
    experts, rows = routing_map.bool().T.nonzero(as_tuple=True)
    return x[rows], probs[rows, experts], rows


def moe_permute(x: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int) -> Any:
    rows = routing_map.bool().T.nonzero(as_tuple=True)[1]
    return x[rows], rows


def moe_unpermute(
    x: torch.Tensor, rows: torch.Tensor, merging_probs: Any = None, restore_shape: Any = None, pad_offsets: Any = None
) -> torch.Tensor:
    assert merging_probs is None and pad_offsets is None
    return x.new_zeros(restore_shape).index_add(0, rows, x)


def moe_sort_chunks_by_index(x: torch.Tensor, split_sizes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    parts = x.split(split_sizes.tolist())
    return torch.cat([parts[i] for i in index.tolist()])


def moe_sort_chunks_by_index_with_probs(x: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, index: torch.Tensor) -> Any:
    return moe_sort_chunks_by_index(x, split_sizes, index), moe_sort_chunks_by_index(probs, split_sizes, index)


class Recipe:
    """A recipe of FP8: its name and settings."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class DelayedScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class Float8CurrentScaling(Recipe): ...


class MXFP8BlockScaling(Recipe): ...


class QuantizedTensor: ...


class FP8GlobalStateManager:
    is_fp8_enabled = staticmethod(is_fp8)
    get_fp8_recipe = staticmethod(lambda: active[-1])


def activation_recompute_forward(activation_recompute: bool, recompute_phase: bool) -> Any:
    return contextlib.nullcontext()


class CudaRNGStatesTracker: ...


class FusedAdam(torch.optim.Optimizer):
    """AdamW with moments in bfloat16, and of each bfloat16 parameter's float32 master the lower half: int16, or it asserts."""

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
        master_weights: bool,
        master_weight_dtype: torch.dtype,
        exp_avg_dtype: torch.dtype,
        exp_avg_sq_dtype: torch.dtype,
        use_decoupled_grad: bool,
        store_param_remainders: bool,
    ) -> None:
        assert adam_w_mode and master_weights and use_decoupled_grad and master_weight_dtype == torch.float32
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": torch.float32}
        self.store_param_remainders = store_param_remainders

    def held(self, param: torch.Tensor, name: str) -> torch.dtype:
        is_remainder = self.store_param_remainders and name == "master_param" and param.dtype == torch.bfloat16
        return torch.int16 if is_remainder else self.dtypes[name]

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        assert store_param_remainders and param.dtype == torch.bfloat16
        self.state[param] = {name: torch.zeros_like(param, dtype=self.held(param, name)) for name in self.dtypes}

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        value, held = self.state[param][name], self.held(param, name)
        assert value.dtype == held
        return value.float() if held == torch.bfloat16 else value

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        held = self.held(param, name)
        assert value.dtype == (torch.int16 if held == torch.int16 else torch.float32)
        self.state[param].setdefault(name, torch.empty_like(param, dtype=held)).copy_(value)

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        state = {i: {name: self.get_unscaled_state(params[i], name) for name in values} for i, values in found["state"].items()}
        return found | {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, values in state_dict["state"].items():
            self.state[params[i]] = {}
            for name, value in values.items():
                self.set_scaled_state(params[i], name, value)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state, grad = self.state[p], p.decoupled_grad
                low = state["master_param"].int()
                master = ((p.view(torch.int16).int() - (low < 0).int()) << 16 | (low & 0xFFFF)).view(torch.float32)
                m = state["exp_avg"].float().mul_(beta1).add_(grad, alpha=1 - beta1)
                v = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                change = m / (1 - beta1 ** group["step"]) / ((v / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
                bits = (master - group["lr"] * (change + group["weight_decay"] * master)).view(torch.int32)
                for name, value in (("exp_avg", m), ("exp_avg_sq", v), ("master_param", bits.to(torch.int16))):
                    state[name].copy_(value)
                p.view(torch.int16).copy_((bits >> 16) + (state["master_param"] < 0).int())


def install() -> None:
    """Put the stand-in where `import transformer_engine` finds it."""

    def module(name: str, **content: Any) -> ModuleType:
        made = sys.modules[name] = ModuleType(name)
        made.__spec__, made.__path__ = ModuleSpec(name, None, is_package=True), []
        vars(made).update(content)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, made)
        return made

    arange = torch.arange
    torch.arange = lambda *bounds, device=None, **rest: arange(*bounds, **rest)  # the dispatcher's, on "cuda" where permutation is fused
    torch.cuda.stream, torch.Tensor.record_stream = lambda stream: contextlib.nullcontext(), lambda tensor, stream: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *name: None  # both are of schedules that overlap streams
    te = "transformer_engine"
    module(te, __version__="2.12.0")
    module(f"{te}.common")
    recipes = {r.__name__: r for r in (DelayedScaling, Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling)}
    formats = type("Format", (), {"E4M3": "e4m3", "HYBRID": "hybrid"})
    module(f"{te}.common.recipe", Format=formats, CustomRecipe=None, NVFP4BlockScaling=None, **recipes)
    layers = (Linear, LayerNormLinear, RMSNorm, GroupedLinear, DotProductAttention, Fp8Padding, Fp8Unpadding)
    module(f"{te}.pytorch", **{layer.__name__: layer for layer in layers}, LayerNorm=None, fp8_autocast=fp8_autocast, ops=MagicMock())
    module(f"{te}.pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast, fp8_model_init=None)
    module(f"{te}.pytorch.tensor", QuantizedTensor=QuantizedTensor)
    module(
        f"{te}.pytorch.distributed", CudaRNGStatesTracker=CudaRNGStatesTracker, activation_recompute_forward=activation_recompute_forward
    )
    module(f"{te}.pytorch.optimizers", FusedAdam=FusedAdam, FusedSGD=None)
    functions = (moe_permute, moe_permute_with_probs, moe_unpermute, moe_sort_chunks_by_index, moe_sort_chunks_by_index_with_probs)
    module(f"{te}.pytorch.permutation", **{function.__name__: function for function in functions})
    unused = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    module(f"{te}.pytorch.router", **dict.fromkeys(unused))


def on_stand_in(function: Any, *args: Any) -> Any:
    """`function(*args)`, for a process that has not imported Megatron before its first call; `seen` is what this call has entered."""
    if "transformer_engine" not in sys.modules:
        install()
    seen.clear()
    return function(*args)
