"""`python -m megatron_r1 convert megatron-to-hf` as a file; -h says what it takes."""

from __future__ import annotations

import sys

from megatron_r1.convert_cli import tool

sys.exit(tool("megatron-to-hf"))
