"""DeepSeek's block FP8: e4m3 codes with one float32 scale a block of 128 x 128, weight = code * scale.

The scale of `name` is stored as `name_scale_inv`. Odd sizes end in smaller blocks: 576 rows have 5 rows of scales.
`dequantize` is a float32 multiplication and one rounding, bit for bit. `quantize` gives it its codes back:

    a bf16 value is within 2^-9 of code * scale, neighbouring codes are at least 2^-4 apart (both relative to the code),
    so rounding value / scale to the nearest code finds the same one, as long as bf16 holds code * scale as a normal number.

`check` says for which scales that is so: 2^-117 <= |scale| <= 2^118. tests/test_fp8.py tries every code at many of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

BLOCK = 128
LARGEST = 448.0  # of e4m3
SCALE_SUFFIX = "_scale_inv"
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-117, 2.0**118
DTYPE = torch.float8_e4m3fn
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
# DeepSeek's own choice: the linear layers of attention and MLP; not embedding, head, norms, router, MTP's projection
QUANTIZED = re.compile(r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$")
NAN_CODE = 127
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}  # to compare all values, NaN too


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a weight [rows, columns]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Whole rows of blocks, [rows, columns] of e4m3, and their scales -> values; NaN codes are NaN.

    torch's own conversion of e4m3 goes through one element at a time. The same bits one place lower in a float16 are the
    value / 256, subnormals too, and float16 -> float32 is an instruction.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign is copied into the upper half
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4080)
    values = bits.view(torch.float16).float()
    if has_nan(codes):
        values.masked_fill_((codes.view(torch.uint8) & NAN_CODE) == NAN_CODE, math.nan)
    _by_block(values, scale.float() * 256, torch.mul, out=values)
    return values.to(dtype)


def quantize(weight: torch.Tensor, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole rows of blocks, [rows, columns] -> codes and scales = largest magnitude / 448, as DeepSeek's own kernel.

    kept  scales that the weight once had: they are used for the blocks whose every value they explain, code for code,
          so that a weight that nobody changed gets its bytes back
    """
    if kept is not None:
        codes = _codes_by_kept(weight, kept)
        if codes is not None:
            return codes, kept
    values = weight.float()
    scale = (_largest(values) / LARGEST).clamp_(min=SMALLEST_SCALE)
    if kept is None:
        return _encode(values, scale), scale
    explained = dequantize(_encode(values, kept.float()), kept, weight.dtype).view(BITS[weight.dtype])
    changed = _largest((explained != weight.view(BITS[weight.dtype])).float()) > 0
    scale = torch.where(changed, scale.to(kept.dtype), kept)
    return _encode(values, scale.float()), scale


def _codes_by_kept(weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
    """Codes whose values by these scales are the weight, bit for bit; None where there are none for every block.

    `dequantize` backwards, twice as fast as a division and torch's conversion to e4m3. It need not round as they do: if what it
    finds gives the weight back, then it is the code, for no two give the same value.
    """
    values = weight.float()
    _by_block(values, 1 / (kept.float() * 256), torch.mul, out=values)
    bits = values.half().view(torch.int16)
    bits.add_(0x40).bitwise_and_(-0x4080)  # to the nearest that has 3 bits of mantissa; e4m3 has no place for the highest exponents
    values = bits.view(torch.float16).float()
    _by_block(values, kept.float() * 256, torch.mul, out=values)
    found, given = (thing.view(BITS[weight.dtype]) for thing in (values.to(weight.dtype), weight))
    if not np.array_equal(found.numpy(), given.numpy()):  # torch.equal takes eight times as long
        return None
    sign = (bits >> 8).bitwise_and_(0x80)
    codes = (bits >> 7).bitwise_and_(0x7F).bitwise_or_(sign).to(torch.uint8).view(DTYPE)
    return None if has_nan(codes) else codes


def stream(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by Hugging Face name, as `convert fp8-cast` would write them: codes, each followed by its scales, and the rest as it is."""
    for name, tensor in weights:
        if tensor.dim() != 2 or not QUANTIZED.search(name):
            yield name, tensor
            continue
        codes, scale = quantize(tensor)
        yield name, codes
        yield name + SCALE_SUFFIX, scale


def check(name: str, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise ValueError for a scale that `quantize` could not undo; 0 will do for a block of zeros."""
    magnitude = scale.float().abs()
    fine = (magnitude >= SMALLEST_SCALE) & (magnitude <= LARGEST_SCALE)
    if not fine.all():
        zero = _largest((codes.view(torch.uint8) & NAN_CODE).float()) == 0
        fine |= zero & (magnitude == 0)
    if not fine.all():
        worst = magnitude[~fine][0].item()
        raise ValueError(f"tensor {name}: a block's scale is {worst:.3g}, not {SMALLEST_SCALE:.1g} to {LARGEST_SCALE:.1g}; damaged?")


def has_nan(codes: torch.Tensor) -> bool:
    """Whether a code is NaN; e4m3 has two, and no infinity."""
    return bool(((codes.view(torch.uint8) & NAN_CODE).max() == NAN_CODE).item()) if codes.numel() else False


def _encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes of values / scale, the nearest one; NaN where that is beyond the largest code."""
    scaled = torch.empty_like(values)
    _by_block(values, torch.where(scale == 0, 1.0, scale), torch.div, out=scaled)
    return scaled.to(DTYPE)


def _by_block(values: torch.Tensor, scale: torch.Tensor, operation: Callable[..., torch.Tensor], *, out: torch.Tensor) -> None:
    """out = operation(values, scale of the block)."""
    rows, columns = values.shape
    wide = scale.repeat_interleave(BLOCK, dim=1)[:, :columns]
    whole = rows // BLOCK * BLOCK
    if whole:
        operation(values[:whole].view(-1, BLOCK, columns), wide[: whole // BLOCK, None], out=out[:whole].view(-1, BLOCK, columns))
    if whole < rows:
        operation(values[whole:], wide[-1], out=out[whole:])


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block."""
    rows, columns = values.shape
    down, across = scale_shape(values.shape)
    padded = values
    if (rows, columns) != (down * BLOCK, across * BLOCK):
        padded = torch.nn.functional.pad(values, (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    return padded.abs().view(down, BLOCK, -1).amax(1).view(down, across, BLOCK).amax(2)  # torch's amax over both is far slower
