"""A server process that does not come up says why within its limit, and none outlives its owner."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from processes import has_ended, is_soon
from servers import TINY_V3

from megatron_r1.config_types import Rollout
from megatron_r1.launch import spanning
from megatron_r1.processes import free_port
from megatron_r1.rollout.server_process import ServerProcess, server_command


def process(script: str, log_file: Path, *, port: int | None = None) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", script], {}, port=port or free_port(), log_file=log_file)


def test_a_port_in_use_is_said_before_anything_starts(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = process("", tmp_path / "log", port=port)
        with pytest.raises(ValueError, match=rf"^port {port}: in use \(Address already in use\); end the process that holds it"):
            server.start()
    assert server.process is None


def test_a_slow_start_ends_at_its_limit_with_the_log_s_last_line(tmp_path):
    server = process("print('loading weights', flush=True); import time; time.sleep(60)", tmp_path / "log")
    server.start()
    assert is_soon((tmp_path / "log").read_text)
    message = r"not ready after 3 s \(rollout.start_timeout_seconds: raise it\); its log says 'loading weights'"
    with pytest.raises(ValueError, match=message):
        server.wait_ready(3.0)
    server.stop()
    assert not server.alive


def test_a_death_at_start_is_told_with_the_first_error_of_this_start(tmp_path):
    (tmp_path / "log").write_text("OSError: of an earlier start\n")
    prefix = "(Worker pid=1) {} 11-23 10:00:00 [a.py:1] KeyError: {}"
    lines = "\n".join([prefix.format("WARNING", "'harmless'"), prefix.format("ERROR", "'gate'")])
    server = process(f"print({lines!r}, flush=True); raise RuntimeError('see root cause above')", tmp_path / "log")
    server.start()
    with pytest.raises(ValueError, match=r"ended with code 1 at start; its log says \"KeyError: 'gate'\" \(.*log\)$") as error:
        server.wait_ready(20.0)
    assert "\n" not in str(error.value)


def test_stop_ends_what_the_server_started_too(tmp_path):
    script = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    server = process(script, tmp_path / "log")
    server.start()
    assert is_soon(lambda: (tmp_path / "log").read_text().endswith("\n"))
    server.stop()
    child = int((tmp_path / "log").read_text())
    assert is_soon(lambda: has_ended(child))


def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from megatron_r1.rollout.server_process import ServerProcess\n"
        f"s = ServerProcess(['sleep', '60'], {{}}, port={free_port()}, log_file=Path({str(tmp_path / 'log')!r}))\n"
        "s.start(); print(s.process.pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    assert is_soon(lambda: has_ended(child))


def folder(tmp_path: Path, **changes) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", **TINY_V3, **changes}))
    return str(tmp_path)


SETTINGS = {"port": 8000, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 32}


def test_a_server_listens_locally_calls_no_one_and_samples_as_requests_say(tmp_path):
    argv, env = server_command(folder(tmp_path), **SETTINGS, extra=("--host", "10.0.0.7"))
    flags = dict(pairwise(argv[:-2]))
    assert flags["--host"] == "127.0.0.1"
    assert argv[-2:] == ["--host", "10.0.0.7"]
    assert flags["--logprobs-mode"] == "processed_logprobs"
    assert flags["--generation-config"] == "vllm"
    assert json.loads(flags["--weight-transfer-config"]) == {"backend": "gloo"}
    assert env["VLLM_NO_USAGE_STATS"] == env["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in env


def test_a_folder_without_a_model_and_shapes_without_a_kernel_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json there"):
        server_command(str(tmp_path / "nothing"), **SETTINGS)
    with pytest.raises(ValueError, match=r"kv_lora_rank, qk_rope_head_dim = \(128, 64\): vLLM's CPU kernel takes only \(512, 64\)"):
        server_command(folder(tmp_path, kv_lora_rank=128), **SETTINGS)


def test_the_flags_of_a_server_that_spans_nodes_are_vllms():
    """Read, not imported: pytest's own process never imports vLLM."""
    package = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    known = (package / "engine/arg_utils.py").read_text() + (package / "entrypoints/launchers/cli_args.py").read_text()
    flags = [flag for flag in spanning(Rollout(nodes=2, node_rank=1, head="node7")) if flag.startswith("--")]
    assert flags == ["--nnodes", "--node-rank", "--master-addr", "--headless"]
    for flag in flags:
        assert f'"{flag}"' in known, flag
    assert spanning(Rollout()) == []
