"""Conversion of a synthetic DeepSeek-V3 with real layer shapes in block FP8, against a plain copy of the same bytes.

    python -m benchmarks.convert FOLDER [--dense 14] [--sparse 1] [--workers 2]

One sparse layer is 11.5 GB and one dense layer 0.6 GB, the converted bf16 checkpoint twice that; FOLDER needs room for the
three of them. A copy reads the FP8 files once and writes them once, through the same page cache, and ends with fsync. The
ratio counts the bytes that are read and written, in both cases.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_r1.weights import fp8
from megatron_r1.weights.rules import rules
from megatron_r1.weights.safetensors_files import LENGTH_BYTES, Tensor, divide, make_header, make_index

V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "quantization_config": fp8.QUANTIZATION,
}
V3_BYTES = 688.6e9  # of the published checkpoint's weight files
STEP = 2**24


def make(folder: Path, *, dense: int, sparse: int, vocabulary: int) -> int:
    """A checkpoint of random weights, in DeepSeek's names and dtypes; returns its bytes."""
    hf = V3 | {"num_hidden_layers": dense + sparse, "first_k_dense_replace": dense, "vocab_size": vocabulary}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    tensors: list[Tensor] = []
    for source in (source for rule in rules(hf) for source in rule.hf):
        if fp8.QUANTIZED.search(source.name):
            tensors.append(Tensor(source.name, fp8.DTYPE, source.shape))
            tensors.append(Tensor(source.name + fp8.SCALE_SUFFIX, torch.float32, fp8.scale_shape(source.shape)))
        else:
            tensors.append(Tensor(source.name, torch.float32 if "correction_bias" in source.name else torch.bfloat16, source.shape))
    torch.manual_seed(0)
    noise = {dtype: _noise(dtype) for dtype in (fp8.DTYPE, torch.bfloat16, torch.float32)}
    files = divide(tensors)
    for name, members in files.items():
        header = make_header(members).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            for tensor in members:
                for start in range(0, tensor.nbytes, STEP):
                    file.write(noise[tensor.dtype][: min(STEP, tensor.nbytes - start)])
            os.fsync(file.fileno())
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(make_index(files)))
    return sum(tensor.nbytes for tensor in tensors)


def _noise(dtype: torch.dtype) -> memoryview:
    values = torch.rand(STEP // dtype.itemsize) * 1e-3 + 1e-5 if dtype == torch.float32 else torch.randn(STEP // dtype.itemsize)
    return memoryview(values.to(dtype).view(torch.uint8).numpy())


def copy(source: Path, target: Path) -> float:
    """Seconds that a plain copy takes, to the disk."""
    start = time.monotonic()
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, STEP)
            writer.flush()
            os.fsync(writer.fileno())
    return time.monotonic() - start


def forget(folder: Path) -> None:
    """Take files out of the page cache, so that each measurement reads the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def convert(command: str, source: Path, target: Path, *options: str) -> dict[str, float]:
    """Seconds, bytes read and written, and peak resident memory of one conversion in a process of its own."""
    forget(source)
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "megatron_r1", "convert", command, str(source), str(target), *options], check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process so far
    return {"seconds": seconds, "bytes": size(source) + size(target), "peak_resident_bytes": peak}


def size(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Make, copy, convert, convert back, compare the files, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dense", type=int, default=14)
    parser.add_argument("--sparse", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    source, copied, megatron, back = (arguments.folder / name for name in ("source", "copy", "megatron", "back"))
    load, workers = os.getloadavg()[0], f"--workers={arguments.workers}"
    total = make(source, dense=arguments.dense, sparse=arguments.sparse, vocabulary=arguments.vocabulary)
    forget(source)
    report: dict[str, Any] = {"fp8_bytes": total, "load_before": load, "copy": {"seconds": copy(source, copied), "bytes": 2 * size(source)}}
    shutil.rmtree(copied)
    report["hf-to-megatron"] = convert("hf-to-megatron", source, megatron, workers)
    hashes = subprocess.run("b2sum *.safetensors", shell=True, cwd=source, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(source)
    report["megatron-to-hf"] = convert("megatron-to-hf", megatron, back, workers)
    checked = subprocess.run(["b2sum", "-c", "--quiet", "-"], input=hashes, cwd=back, text=True)
    report["round_trip_is_identical"] = checked.returncode == 0
    speed = report["copy"]["bytes"] / report["copy"]["seconds"]
    for name in ("hf-to-megatron", "megatron-to-hf"):
        entry = report[name]
        entry["gb_per_second"] = entry["bytes"] / entry["seconds"] / 1e9
        entry["of_copy"] = entry["bytes"] / entry["seconds"] / speed
        entry["hours_for_671b"] = entry["seconds"] * V3_BYTES / total / 3600
    report["copy"]["gb_per_second"] = speed / 1e9
    report["load_after"] = os.getloadavg()[0]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
