"""Megatron-Core: whatever imports this package, or anything in it, finds a Megatron that runs on this machine."""

from megatron_r1.mcore import cpu

if not cpu.has_cuda():
    cpu.install()
