"""Megatron-Core: whatever imports this package, or anything in it, finds a Megatron that runs on this machine."""

import os

from megatron_r1.mcore import cpu

# V3's blockwise FP8 has float32 scales; Transformer Engine reads this at import, and without it rounds them to powers of 2
os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
if not cpu.has_cuda():
    cpu.install()
