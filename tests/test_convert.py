"""The converters: byte round trips, broken inputs in one line each, interruptions, the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import FAMILIES, config, convert, write
from safetensors.torch import load_file, save_file

from megatron_r1.__main__ import main
from megatron_r1.weights import conversion, fp8, plans
from megatron_r1.weights.ledger import PARTIAL, WHOLE
from megatron_r1.weights.torch_dist import RELEASE

ROOT = Path(__file__).resolve().parents[1]


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder, except its ledger."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != WHOLE)
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def spread(folder: Path) -> None:
    """Move the tensors of model.safetensors to three files and an index, and add a tokenizer."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = dict(list(tensors.items())[i::3])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path) -> Path:
    """A folder of each family in bf16."""
    write(tmp_path / "source", config(request.param))
    spread(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def v3(tmp_path) -> Path:
    """A V3 in bf16."""
    write(tmp_path / "source", config("deepseek_v3"))
    spread(tmp_path / "source")
    return tmp_path / "source"


def test_bf16_goes_to_megatron_and_back_byte_for_byte(source, tmp_path):
    megatron = convert(plans.hf_to_megatron(source), tmp_path / "megatron")
    before = digests(source)
    shutil.rmtree(source)  # the Megatron folder is the whole model
    assert digests(convert(plans.megatron_to_hf(megatron), tmp_path / "back")) == before


def test_block_fp8_goes_to_megatron_and_back_byte_for_byte(source, tmp_path):
    quantized = convert(plans.fp8_cast(source, to="fp8"), tmp_path / "fp8")
    assert json.loads((quantized / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    megatron = convert(plans.hf_to_megatron(quantized), tmp_path / "megatron")
    assert digests(convert(plans.megatron_to_hf(megatron), tmp_path / "back")) == digests(quantized)
    assert digests(convert(plans.megatron_to_hf(megatron, to="fp8"), tmp_path / "again")) == digests(quantized)


def test_fp8_is_exported_as_the_bf16_that_it_stands_for(v3, tmp_path):
    quantized = convert(plans.fp8_cast(v3, to="fp8"), tmp_path / "fp8")
    megatron = convert(plans.hf_to_megatron(quantized), tmp_path / "megatron")
    exported = convert(plans.megatron_to_hf(megatron, to="bf16"), tmp_path / "bf16")
    assert digests(exported) == digests(convert(plans.fp8_cast(quantized, to="bf16"), tmp_path / "cast"))
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    dtypes = {}
    for file in sorted(exported.glob("*.safetensors")):
        codes = load_file(quantized / file.name)
        for name, value in load_file(file).items():
            dtypes[name] = value.dtype
            scale = codes.get(name + fp8.SCALE_SUFFIX)
            expected = codes[name] if scale is None else fp8.dequantize(codes[name], scale)
            assert torch.equal(value, expected), name
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {n for n in dtypes if n.endswith("correction_bias")}


def test_config_json_says_what_the_weights_of_a_checkpoint_that_was_not_converted_here_are(v3, tmp_path):
    edit_config(v3, torch_dtype="bfloat16")
    quantized = convert(plans.fp8_cast(v3, to="fp8"), tmp_path / "fp8")
    megatron = convert(plans.hf_to_megatron(v3), tmp_path / "megatron")
    exported = convert(plans.megatron_to_hf(megatron / RELEASE, side=quantized), tmp_path / "back")
    assert json.loads((exported / "config.json").read_text()) == json.loads((v3 / "config.json").read_text())
    again = convert(plans.megatron_to_hf(megatron / RELEASE, side=quantized, to="fp8"), tmp_path / "again")
    assert (again / "config.json").read_bytes() == (quantized / "config.json").read_bytes()
    for file in v3.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    megatron = convert(plans.hf_to_megatron(v3), tmp_path / "fp32")
    exported = convert(plans.megatron_to_hf(megatron / RELEASE, side=quantized), tmp_path / "fp32 back")
    config = json.loads((exported / "config.json").read_text())
    assert (config["torch_dtype"], config.get("quantization_config")) == ("float32", None)


def test_only_deepseeks_choice_of_tensors_becomes_fp8(v3, tmp_path):
    quantized = convert(plans.fp8_cast(v3, to="fp8"), tmp_path / "fp8")
    codes = {}
    for file in quantized.glob("*.safetensors"):
        codes |= {name: value.dtype == fp8.DTYPE for name, value in load_file(file).items() if len(value.shape) == 2}
    kinds = {name.removesuffix(".weight").split(".")[-1] for name, is_codes in codes.items() if not is_codes}
    assert kinds == {"embed_tokens", "lm_head", "gate", "eh_proj", "head", "weight_scale_inv"}
    assert codes["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    assert codes["model.layers.1.mlp.experts.3.down_proj.weight"]


def test_transformers_reads_an_exported_model(v3, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    megatron = convert(plans.hf_to_megatron(v3), tmp_path / "megatron")
    back = convert(plans.megatron_to_hf(megatron), tmp_path / "back")
    _, report = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"]
    quantized = convert(plans.fp8_cast(v3, to="fp8"), tmp_path / "fp8")
    assert AutoConfig.from_pretrained(quantized).quantization_config["quant_method"] == "fp8"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_transformers_reads_an_fp8_model_as_the_values_that_it_stands_for(family, tmp_path):
    """Without a GPU it dequantises; whole blocks only, so not even the published V3 with its 576 rows."""
    from transformers import AutoModelForCausalLM

    whole_blocks = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "moe_intermediate_size": 128}
    write(tmp_path / "source", config(family) | whole_blocks)
    quantized = convert(plans.fp8_cast(tmp_path / "source", to="fp8"), tmp_path / "fp8")
    cast = convert(plans.fp8_cast(quantized, to="bf16"), tmp_path / "bf16")
    found, report = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = AutoModelForCausalLM.from_pretrained(cast, dtype=torch.bfloat16).state_dict()
    assert not [name for name, value in found.state_dict().items() if not torch.equal(value, expected[name])]


def test_a_ledger_says_what_was_written_and_finds_what_was_changed(v3, tmp_path):
    megatron = convert(plans.hf_to_megatron(v3), tmp_path / "megatron")
    assert conversion.verify(megatron) == len((megatron / WHOLE).read_text().splitlines()) - 1
    file = megatron / RELEASE / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is not what was written"):
        conversion.verify(megatron)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "No such file or directory; convert again"),
        (lambda file: os.truncate(file, file.stat().st_size // 2), "damaged or truncated, .* convert it again"),
    ],
)
def test_verifying_a_folder_that_lost_something_is_one_line_and_leaves_no_file_open(damage, message, v3, tmp_path, capsys):
    megatron = convert(plans.hf_to_megatron(v3), tmp_path / "megatron")
    file = max((megatron / RELEASE).glob("*.distcp"))
    damage(file)
    before = len(os.listdir("/proc/self/fd"))
    capsys.readouterr()
    assert main(["convert", "verify", str(megatron)]) == 2
    assert re.fullmatch(f"error: {file}: {message}\n", capsys.readouterr().err)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_conversion_that_is_killed_goes_on_to_the_same_bytes(v3, tmp_path):
    program = [sys.executable, str(ROOT / "tests" / "killed_conversions.py"), str(v3), str(tmp_path / "scratch"), "4", "3"]
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 of 4 the same after ")
    assert int(done.stdout.split()[-2]) > 0


def interrupted(source: Path, target: Path, monkeypatch) -> None:
    """Half of a conversion: the disk fails."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write", fail)
        with pytest.raises(ValueError, match="No space left on device"):
            convert(plans.hf_to_megatron(source), target)
    assert not target.exists()


def test_half_of_a_conversion_needs_a_word_what_to_do_with_it(v3, tmp_path, monkeypatch):
    target = tmp_path / "megatron"
    interrupted(v3, target, monkeypatch)
    with pytest.raises(ValueError, match="--resume to go on or --overwrite"):
        convert(plans.hf_to_megatron(v3), target)
    os.utime(next(v3.glob("*.safetensors")), (0, 0))
    options = {"workers": 1, "overwrite": False}
    with pytest.raises(ValueError, match=r"is half of another conversion \(sources differs\)"):
        conversion.run(plans.hf_to_megatron(v3), target, resume=True, **options)
    conversion.run(plans.hf_to_megatron(v3), target, workers=1, resume=False, overwrite=True)
    assert not (target / PARTIAL).exists()
    conversion.run(plans.hf_to_megatron(v3), target, resume=True, **options)  # whole: nothing to do
    with pytest.raises(ValueError, match="is not empty"):
        conversion.run(plans.hf_to_megatron(v3), target, resume=False, **options)


def test_the_disk_is_measured_before_anything_is_written(v3, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"0\.00 GB of disk are free"):
        convert(plans.hf_to_megatron(v3), tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def shard(folder: Path) -> Path:
    return folder / "model-00002-of-00003.safetensors"


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 100)


def truncate_header(folder: Path) -> None:
    os.truncate(shard(folder), 50)


def edit_tensors(folder: Path, change: object) -> None:
    tensors = load_file(shard(folder))
    change(tensors)
    save_file(tensors, shard(folder))


def put_nan(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: next(t for n, t in tensors.items() if "o_proj" in n).view(-1)[5:6].fill_(float("nan")))


def lose_a_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))


def repeat_a_tensor(folder: Path) -> None:
    first = load_file(folder / "model-00001-of-00003.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update([next(iter(first.items()))]))


def repeat_a_name_in_a_header(folder: Path) -> None:
    data = shard(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    names = [name for name in json.loads(data[8 : 8 + length]) if name != "__metadata__"]
    a = next(n for n in names for m in names if n != m and len(n) == len(m))
    b = next(m for m in names if m != a and len(m) == len(a))
    shard(folder).write_bytes(data[: 8 + length].replace(f'"{b}"'.encode(), f'"{a}"'.encode()) + data[8 + length :])


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes().replace(old, new))


def shift_a_tensor(folder: Path) -> None:
    data = shard(folder).read_bytes()
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start, end = max(entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__")
    edit_header(folder, f"[{start},{end}]".encode(), f"[{start - 2},{end - 2}]".encode().ljust(len(f"[{start},{end}]")))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_the_mtp_embedding(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(".shared_head.head.weight"):
                tensors[name][3, 3] += 1
        save_file(tensors, file)


BROKEN = {
    "truncated": (truncate, "damaged or truncated"),
    "truncated header": (truncate_header, "damaged or truncated"),
    "not safetensors": (lambda folder: shard(folder).write_bytes(b"\xff" * 1000), "damaged or truncated"),
    "missing shard": (lambda folder: shard(folder).unlink(), "missing though model.safetensors.index.json names it"),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "neither model.safetensors.index.json nor"),
    "index is not one": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "not an index of the form"),
    "index names too much": (lose_a_tensor, "is missing though model.safetensors.index.json says it is there"),
    "two shards have it": (repeat_a_tensor, "is in model-00001-of-00003.safetensors, too|is here and not where"),
    "header without offsets": (lambda folder: edit_header(folder, b"data_offsets", b"data_offsetz"), "entry .* is not one"),
    "tensors overlap": (shift_a_tensor, "overlaps"),
    "twice in a header": (repeat_a_name_in_a_header, "is there twice"),
    "NaN": (put_nan, "holds NaN or infinity; use --allow-nan"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: damaged, not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a configuration but a list"),
    "config of a larger model": (lambda folder: edit_config(folder, num_hidden_layers=9), "is missing; "),
    "config of another shape": (lambda folder: edit_config(folder, moe_intermediate_size=48), "has shape .* by config.json"),
    "config of no family": (lambda folder: edit_config(folder, model_type="gpt2"), "model_type = 'gpt2' is not built here"),
    "another FP8": (lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}), "quant_method = 'gptq' is not read"),
    "MTP's head is another one": (change_the_mtp_embedding, "is not the copy of lm_head.weight that Megatron takes it for"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_source_is_named_in_one_line_and_left_as_it_is(damage, v3, tmp_path, capsys):
    breaks, message = BROKEN[damage]
    breaks(v3)
    before = digests(v3)
    assert main(["convert", "hf-to-megatron", str(v3), str(tmp_path / "megatron")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert digests(v3) == before
    assert not (tmp_path / "megatron").exists()


def test_nan_is_converted_on_request(v3, tmp_path):
    put_nan(v3)
    conversion.run(plans.hf_to_megatron(v3), tmp_path / "megatron", workers=1, resume=False, overwrite=False, allow_nan=True)
    assert digests(convert_back(tmp_path)) == digests(v3)


def convert_back(folder: Path) -> Path:
    options = {"workers": 1, "resume": False, "overwrite": False, "allow_nan": True}
    return conversion.run(plans.megatron_to_hf(folder / "megatron"), folder / "back", **options)


def test_a_target_that_cannot_be_written_is_one_line(v3, capsys):
    assert main(["convert", "hf-to-megatron", str(v3), "/proc/megatron"]) == 2
    assert capsys.readouterr().err.startswith("error: /proc/")


def test_a_target_may_be_a_link_to_a_folder_that_is_empty_or_not_there_yet(v3, tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        convert(plans.hf_to_megatron(v3), tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert conversion.verify(tmp_path / "disk" / name)
    assert sorted(path.name for path in tmp_path.rglob(".*.partial")) == []


def test_half_of_a_conversion_to_a_link_lies_on_the_disk_of_its_folder(v3, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "megatron")
    interrupted(v3, tmp_path / "link", monkeypatch)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [".megatron.partial"]
    conversion.run(plans.hf_to_megatron(v3), tmp_path / "link", workers=1, resume=True, overwrite=False)
    assert conversion.verify(tmp_path / "disk" / "megatron")


def test_a_mount_point_is_refused_before_anything_is_written(v3, tmp_path, monkeypatch, capsys):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    assert main(["convert", "hf-to-megatron", str(v3), str(tmp_path / "disk")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path / 'disk'}: is a mount point, which cannot be replaced; name a folder in it\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "source"]


def test_an_error_without_a_number_is_told_in_its_own_words(v3, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(conversion, "_prepare", fail)
    with pytest.raises(ValueError, match="megatron: the disk is gone; mend it and go on with --resume"):
        convert(plans.hf_to_megatron(v3), tmp_path / "megatron")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_disk_is_one_line_and_the_rest_follows_with_more_room(v3, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "_check_disk", lambda plan, partial: None)
            with pytest.raises(ValueError, match="No space left on device; mend it and go on with --resume"):
                convert(plans.hf_to_megatron(v3), small / "megatron")
        with pytest.raises(ValueError, match="of disk are free"):
            conversion.run(plans.hf_to_megatron(v3), small / "megatron", workers=2, resume=True, overwrite=False)
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        conversion.run(plans.hf_to_megatron(v3), small / "megatron", workers=2, resume=True, overwrite=False)
        expected = convert(plans.hf_to_megatron(v3), tmp_path / "megatron")
        assert digests(small / "megatron") == digests(expected)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    shape = [2**18, 1024]  # 512 MB of zeros, which need no disk
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2**29]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**29)
    (folder / "config.json").write_text("{}")
    program = (
        "import sys; from pathlib import Path; from megatron_r1.__main__ import main\n"
        "assert main(['convert', 'fp8-cast', '--to=bf16', *sys.argv[1:]]) == 0\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"  # ru_maxrss has the parent's peak too
    )
    arguments = [sys.executable, "-c", program, str(folder), str(tmp_path / "target")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout.split()[-1]) * 1024 < 512 * 2**20
    shutil.rmtree(tmp_path / "target")


def test_dry_run_says_what_it_needs_and_writes_nothing(v3, tmp_path, capsys):
    assert main(["convert", "hf-to-megatron", str(v3), str(tmp_path / "megatron"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("tensors", "to read", "to write", "memory", "disk"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_comparing_tells_formats_apart_from_values(v3, tmp_path, capsys):
    megatron = convert(plans.hf_to_megatron(v3), tmp_path / "megatron")
    assert main(["convert", "compare", str(v3), str(megatron)]) == 0
    quantized = convert(plans.fp8_cast(v3, to="fp8"), tmp_path / "fp8")
    assert main(["convert", "compare", str(megatron), str(quantized)]) == 1
    assert main(["convert", "compare", str(megatron), str(quantized), "--tolerance", "0.2"]) == 0
    tensors = load_file(shard(v3))
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 0.5
    tensors["more"] = torch.zeros(1)
    save_file(tensors, shard(v3))
    index = v3 / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = shard(v3).name
    index.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["convert", "compare", str(v3), str(megatron)]) == 1
    said = capsys.readouterr().out
    assert "more: only in the first" in said
    assert f"{name}: hashes" in said and "largest difference 0.5" in said


@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf", "fp8_cast", "compare"])
def test_the_tools_are_the_same_command_line(tool):
    done = subprocess.run([sys.executable, ROOT / "tools" / "convert" / f"{tool}.py", "-h"], capture_output=True, text=True)
    assert done.returncode == 0
    assert tool.replace("_", "-") in done.stdout
