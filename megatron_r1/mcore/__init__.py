"""Everything that runs Megatron-Core. Importing this package adapts Megatron to a machine without CUDA first."""

from megatron_r1.mcore import cpu

if not cpu.has_cuda():
    cpu.install()
