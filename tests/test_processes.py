"""Ports and the end of processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import is_soon, running

from megatron_r1.processes import PORTS, end_namespace, free_port

KERNEL_PORTS_BEGIN = 32768  # of the ports that Linux gives to outgoing connections, unless it is told otherwise


def test_a_free_port_is_none_that_the_kernel_may_give_away_meanwhile():
    assert PORTS.stop <= KERNEL_PORTS_BEGIN
    assert all(free_port() in PORTS for _ in range(100))
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first < PORTS.stop:
        pytest.skip(f"net.ipv4.ip_local_port_range was changed here: it begins at {first}, not at {KERNEL_PORTS_BEGIN}")


def test_a_port_that_is_listened_on_is_not_free(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr("megatron_r1.processes.PORTS", [taken.getsockname()[1]])
        with pytest.raises(ValueError, match=r"^ports .*: none is free; end some of the processes that listen there$"):
            free_port()


def drawn_elsewhere(ports: list[int] | None = None) -> subprocess.CompletedProcess[str]:
    """A draw by another process, of all ports or of these."""
    code = f"from megatron_r1 import processes; processes.PORTS = {ports} or processes.PORTS; print(processes.free_port())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_port_is_given_away_once_though_nothing_listens_there_yet(monkeypatch):
    port = free_port()
    monkeypatch.setattr("megatron_r1.processes.PORTS", [port])
    with pytest.raises(ValueError, match="none is free"):
        free_port()
    assert "none is free" in drawn_elsewhere([port]).stderr


def test_a_port_is_free_again_when_the_process_has_ended_that_it_was_given_to(monkeypatch):
    port = int(drawn_elsewhere().stdout)
    monkeypatch.setattr("megatron_r1.processes.PORTS", [port])
    assert free_port() == port


def test_a_child_ends_with_its_parent():
    mark = "child-that-ends-with-its-parent"
    child = f"[sys.executable, '-c', 'import time; time.sleep(1000) # {mark}']"
    code = "import subprocess, sys, time; from megatron_r1.processes import die_with_parent; "
    code += f"subprocess.Popen({child}, preexec_fn=die_with_parent); time.sleep(1000)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert is_soon(lambda: len(running(mark)) == 2)
    finally:
        parent.kill()
        parent.wait()
    assert is_soon(lambda: not running(mark))


def test_the_end_of_a_namespace_kills_what_is_its_first_process_and_not_who_waits_for_it():
    code = "import subprocess; child = subprocess.Popen(['sleep', '1000']); print('up', flush=True); print(child.wait())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout.readline() == "up\n"
        end_namespace(waiting.pid)
        assert waiting.communicate(timeout=60)[0] == "-9\n"
    end_namespace(waiting.pid)  # nothing to do once it has ended
