"""Block FP8 is DeepSeek's, to the bit, and its codes come back from bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.rollout import server_process, wire
from megatron_r1.rollout.weight_buckets import Buckets
from megatron_r1.weights import conversion, fp8
from megatron_r1.weights.division import Division, TensorInfo
from megatron_r1.weights.plans import fp8_cast
from megatron_r1.weights.rules import rules

SHAPES = [(576, 300), (128, 128), (130, 7), (1, 1), (256, 1024), (127, 129)]


def codes(*shape: int) -> torch.Tensor:
    """Random codes, every one but NaN."""
    drawn = torch.randint(0, 254, shape, dtype=torch.uint8)
    return (drawn + (drawn >= 127).to(torch.uint8)).view(fp8.DTYPE)


def by_loop(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition: each block times its scale in float32, one rounding."""
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            result[where] = (weight[where].to(torch.float32) * scale[i, j]).to(torch.bfloat16)
    return result


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_is_a_float32_product_rounded_once(shape):
    weight, scale = codes(*shape), torch.rand(fp8.scale_shape(shape)) * 1e-3
    assert same_bits(fp8.dequantize(weight, scale), by_loop(weight, scale))


def test_nan_codes_become_nan_and_minus_zero_stays():
    weight = torch.tensor([[0x7F, 0xFF, 0x80, 0x00]], dtype=torch.uint8).view(fp8.DTYPE)
    found = fp8.dequantize(weight, torch.ones(1, 1))
    assert found[0, :2].isnan().all()
    assert found[0, 2:].view(torch.int16).tolist() == [-0x8000, 0]


def test_every_code_comes_back_from_bf16_at_every_scale_that_is_accepted():
    all_codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    weight = all_codes.view(fp8.DTYPE).repeat(128 * 64, 1)[:, :128].contiguous()
    negative = all_codes.view(fp8.DTYPE).repeat(128 * 64, 1)[:, 126:].contiguous()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        exponents = torch.randint(-117, 118, (64, 1), generator=generator).double()
        scale = ((1 + torch.rand((64, 1), generator=generator).double()) * 2**exponents).float()
        scale[:2, 0] = torch.tensor([fp8.SMALLEST_SCALE, fp8.LARGEST_SCALE])
        for part in (weight, negative):
            fp8.check("weight", part, scale)
            found, kept = fp8.quantize(fp8.dequantize(part, scale), scale)
            assert same_bits(found, part)
            assert same_bits(kept, scale)


def test_beyond_those_scales_codes_are_lost_and_the_check_says_so():
    weight = torch.arange(1, 127, dtype=torch.uint8).view(fp8.DTYPE)[None]
    for exponent in (-130, 122):
        scale = torch.full((1, 1), 2.0**exponent)
        assert not same_bits(fp8.quantize(fp8.dequantize(weight, scale), scale)[0], weight)
        with pytest.raises(ValueError, match="a block's scale is"):
            fp8.check("w", weight, scale)
    with pytest.raises(ValueError, match="a block's scale is 0"):
        fp8.check("w", weight, torch.zeros(1, 1))
    fp8.check("w", torch.zeros(1, 5).to(fp8.DTYPE), torch.zeros(1, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_scale_is_the_largest_magnitude_over_448(shape):
    weight = torch.randn(shape).bfloat16()
    found, scale = fp8.quantize(weight)
    assert scale.shape == fp8.scale_shape(shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float()
            assert scale[i, j] == block.abs().max() / 448
            assert same_bits(found[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].contiguous(), (block / scale[i, j]).to(fp8.DTYPE))


def test_only_the_blocks_that_changed_get_a_new_scale():
    weight, scale = codes(256, 384), torch.rand(2, 3) * 1e-3 + 1e-5
    values = fp8.dequantize(weight, scale)
    values[130, 300] = 3 * values[128:, 256:].abs().max()
    found, now = fp8.quantize(values, scale)
    same = torch.ones(2, 3, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(now == scale, same)
    assert same_bits(found[:128].contiguous(), weight[:128].contiguous())
    error = (fp8.dequantize(found, now).float() - values.float()).abs()
    assert (error <= values.float().abs() / 16 + now.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2**-10 + 1e-12).all()


@pytest.mark.parametrize("times_the_scale", [480.0, 512.0, -480.0, 1024.0])
def test_a_value_just_beyond_the_largest_code_gets_its_block_a_new_scale(times_the_scale: float):
    """By e4m3's rule 480 would be the code of NaN, and the next exponents have no code."""
    scale = torch.full((1, 1), 2.0**-10)
    values = fp8.dequantize(codes(128, 128), scale)
    values[5, 7] = times_the_scale * 2.0**-10
    found, now = fp8.quantize(values, scale)
    assert now.item() == pytest.approx(abs(times_the_scale) * 2.0**-10 / 448)
    assert found[5, 7].float().item() == 448.0 * (1 if times_the_scale > 0 else -1)


def test_a_block_of_zeros_stays_zeros():
    found, scale = fp8.quantize(torch.zeros(128, 128).bfloat16())
    assert not found.float().any()
    assert (fp8.dequantize(found, scale) == 0).all()


TINY_V3 = json.loads((Path(__file__).resolve().parents[1] / "configs/models/tiny_v3/config.json").read_text())


def bf16_weights() -> dict[str, torch.Tensor]:
    """Every tensor of tiny_v3, MTP's too; the router's bias is float32."""
    torch.manual_seed(0)
    shapes = {source.name: source.shape for rule in rules(TINY_V3) for source in rule.hf}
    made = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return {name: t.float() if "e_score" in name else t for name, t in made.items()}


class Receiver:
    """Takes what a sender sends by the worker's own reading of the wire."""

    def __init__(self) -> None:
        self.got: dict[str, torch.Tensor] = {}

    def receive(self, bucket: list[wire.Named]) -> wire.Described:
        """Read it, and say what was told of it."""
        flat, told = wire.pack(bucket), json.loads(json.dumps(wire.describe(bucket)))
        start = 0
        for name, kind, shape, (_, tensor) in zip(told["names"], told["dtypes"], told["shapes"], bucket, strict=True):
            stop = start + tensor.nbytes
            self.got[name] = flat[start:stop].view(getattr(torch, kind)).view(shape).clone()
            start += wire.padded(tensor.nbytes)
        return told


def test_a_sync_of_fp8_rollouts_sends_the_bytes_that_the_converter_writes(tmp_path: Path):
    weights = bf16_weights()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY_V3))
    target = tmp_path / "fp8"
    conversion.run(fp8_cast(tmp_path, to="fp8"), target, workers=1, resume=False, overwrite=False)

    receiver, buckets = Receiver(), Buckets()
    buckets.quantization, buckets.bucket_bytes = "fp8", 1 << 17
    division = Division([(), [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]], mine=1)
    sent = [receiver.receive(bucket) for bucket in buckets.of(weights.items(), division)]
    assert len(sent) > 10
    assert buckets.of_others(division) == [sent], "rank 0 knows beforehand what another sender sends"
    expected = load_file(target / "model.safetensors")
    assert receiver.got.keys() == expected.keys()
    assert all(same_bytes(receiver.got[name], tensor) for name, tensor in expected.items())
    codes_of = [name for name, tensor in receiver.got.items() if tensor.dtype == fp8.DTYPE]
    assert all(receiver.got[f"{name}_scale_inv"].shape == fp8.scale_shape(receiver.got[name].shape) for name in codes_of)
    for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "experts.7.down_proj", "shared_experts.up_proj"):
        assert any(name in code for code in codes_of), name
    for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "e_score_correction_bias"):
        assert not any(part in code for code in codes_of), part


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def test_the_servers_are_told_the_same_format_that_is_written_to_checkpoints():
    assert fp8.QUANTIZATION == server_process.FP8
    flag, text = server_process.model_flags(quantization="fp8", head_dtype="float32")
    assert (flag, json.loads(text)) == ("--hf-overrides", {"quantization_config": fp8.QUANTIZATION, "head_dtype": "float32"})
    assert server_process.model_flags(quantization="none", head_dtype="model") == []
