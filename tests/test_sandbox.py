"""The sandbox: what a hostile program tries is contained, and whatever it does, the caller has its result in time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from processes import argv, is_soon, running

from megatron_r1.verifying import sandbox
from megatron_r1.verifying.sandbox import PYTHON, Limits, Result, run

ROOT = Path(__file__).resolve().parents[1]
PATIENT = Limits(seconds=60.0, cpu_seconds=10)  # for programs that end by themselves, on a busy machine


def python(code: str, *, limits: Limits = PATIENT, **settings: object) -> Result:
    """The result of a program text."""
    return run([*PYTHON, "-c", textwrap.dedent(code)], limits=limits, **settings)


def test_a_program_gets_its_stdin_and_files_and_its_end_is_reported():
    files = {"main.py": "import sys, pkg.part\nprint(sys.stdin.read() + pkg.part.WORD)\nsys.exit(3)", "pkg/part.py": "WORD = 'b\\u00e9'"}
    code = "import sys; sys.path.insert(0, ''); sys.argv = ['main.py']; exec(open('main.py').read())"
    for unsafe in (False, True):
        result = run([*PYTHON, "-c", code], stdin="a" * 200_000, files=files, limits=PATIENT, unsafe=unsafe)
        assert (result.code, result.stdout, result.stopped) == (3, "a" * 200_000 + "b\u00e9\n", ""), result.stderr
    assert python("import os; os.kill(os.getpid(), 11)").code == 128 + signal.SIGSEGV
    assert python("").is_success


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = """
            import socket
            for address in (("127.0.0.1", {port}), ("8.8.8.8", 53)):
                try:
                    socket.create_connection(address, timeout=3)
                    print("connected")
                except OSError as error:
                    print("no", error.errno)
            print([name for _, name in socket.if_nameindex()])
        """.replace("{port}", str(port))
        result = python(code)
        assert result.stdout.split("\n")[-2] == "['lo']", result
        assert result.stdout.count("no ") == 2, result
        assert python(code, unsafe=True).stdout.startswith("connected"), "the server must be reachable without the sandbox"


def test_nothing_of_the_machine_can_be_read_but_python_and_libraries():
    secrets = ["/etc/shadow", "/etc/passwd", str(ROOT / "pyproject.toml"), str(Path.home()), "/proc/1/environ", "/home", "/var", "/sys"]
    code = f"""
        import os
        for path in {[*secrets, sys.prefix + "/pyvenv.cfg"]!r}:
            try:
                found = os.listdir(path) if os.path.isdir(path) else open(path).read()
                if found:
                    print(path, found)
            except OSError:
                pass
        print(sorted(os.listdir("/")))
    """
    *read, listing = python(code).stdout.splitlines()
    # Where Python lives in the home folder, the way to it is all there is of it.
    way = Path(sys.base_prefix).relative_to(Path.home()).parts[0] if Path(sys.base_prefix).is_relative_to(Path.home()) else None
    assert read in ([], [f"{Path.home()} [{way!r}]"]), read
    assert not {"work", "var", "sys", "run", "bin", "boot", "opt"} & set(eval(listing)) - {Path(sys.base_prefix).parts[1]}


def test_the_environment_and_the_callers_files_do_not_leak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("API_KEY", "hunter2")
    code = "import os, sys; print(sorted(os.environ), os.listdir('/proc/self/fd'), os.getuid(), sys.path)"
    with (tmp_path / "open.txt").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        result = python(code)
        bare = python(code, unsafe=True)
    assert result.stdout.startswith("['LC_CTYPE', 'PWD'] ['0', '1', '2', '3'] 65534 ["), result
    assert str(ROOT) not in result.stdout
    assert "-packages" in result.stdout  # site-packages, or Debian's dist-packages
    assert bare.stdout.startswith("['LC_CTYPE'] ['0', '1', '2', '3'] "), bare


def test_it_can_write_only_to_memory_of_its_own_and_little_of_that(tmp_path: Path):
    code = f"""
        import os
        def fill(path):
            with open(path, "wb") as file:
                for _ in range(40):
                    file.write(bytes(1 << 20))
        for folder in ["/", "/dev", "/usr/lib", "/root", "/etc", "/proc", {str(tmp_path)!r}, {str(ROOT)!r}, "/tmp", "/dev/shm"]:
            try:
                open(folder + "/x", "w")
                print("wrote", folder)
            except OSError:
                continue
            for name in "ab":
                try:
                    fill(folder + "/" + name)
                    print("filled", name)
                except OSError as error:
                    print("full", error.errno)
    """
    result = python(code, limits=Limits(seconds=60.0, file_bytes=50 << 20))
    assert result.stdout.split("\n")[:-1] == ["wrote /tmp", "filled a", "full 28", "wrote /dev/shm", "filled a", "full 28"], result
    assert not (tmp_path / "x").exists()
    assert not (ROOT / "x").exists()
    assert python("import os; print(os.listdir())").stdout == "[]\n", "the next program finds nothing"


def test_it_is_nobody_and_cannot_become_more():
    code = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))])
        print(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
        try:
            os.setuid(0)
        except OSError as error:
            print(error.errno)
    """
    assert python(code).stdout == "['0000000000000000', '0000000000000000', '1']\n-1 -1\n22\n"


def test_a_fork_bomb_ends_and_takes_its_children_along():
    for code in ("import os\nwhile True: os.fork()", "import os, time\nfor _ in range(5000):\n  if not os.fork(): time.sleep(1000)"):
        start = time.monotonic()
        result = python(f"mark = 'bomb-{start}'\n{code}", limits=Limits(seconds=30.0, cpu_seconds=10, processes=16))
        assert result.stopped == "processes" or "BlockingIOError" in result.stderr, result
        assert result.seconds < 25.0
        assert is_soon(lambda start=start: not running(f"bomb-{start}"))


def test_a_memory_hog_ends_alone_or_in_company():
    alone = python("x = bytearray(1 << 30)", limits=Limits(seconds=60.0, memory_bytes=512 << 20))
    assert alone.code == 1
    assert "MemoryError" in alone.stderr
    together = """
        import os, time
        for _ in range(6):
            if not os.fork():
                x = bytes(range(256)) * (1 << 18)
                time.sleep(1000)
        time.sleep(1000)
    """
    result = python(together, limits=Limits(seconds=60.0, memory_bytes=256 << 20))  # each of the six takes 64 MiB
    assert result.stopped == "memory_bytes", result


def test_its_input_is_read_once_and_no_other_process_holds_it():
    """The first process of the namespace is bwrap, whose descriptors a program may look at."""
    code = """
        import glob, os, sys
        print(len(sys.stdin.read()))
        for path in glob.glob("/proc/[0-9]*/fd/0"):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            print(os.read(descriptor, 10))
    """
    assert python(code, stdin="s" * 300_000).stdout == "300000\nb''\nb''\n"


@pytest.mark.parametrize("pipe", ["stdout", "stderr"])
def test_endless_output_is_cut_and_ends(pipe: str):
    result = python(
        f"import sys\nwhile True: sys.{pipe}.write('x' * 1000)", limits=Limits(seconds=60.0, cpu_seconds=50, output_bytes=100_000)
    )
    assert result.stopped == "output_bytes"
    assert getattr(result, pipe) == "x" * 100_000


def test_sleeping_and_spinning_end_in_time_whatever_they_ignore():
    sleeper = "import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
    result = python(sleeper + "time.sleep(1000)", limits=Limits(seconds=1.0))
    assert result.stopped == "seconds"
    assert 1.0 <= result.seconds < 15.0
    spun = python("while True: pass", limits=Limits(seconds=60.0, cpu_seconds=1))
    assert (spun.code, spun.stopped) == (128 + signal.SIGKILL, "")
    assert spun.seconds < 40.0


def test_a_daemon_left_behind_ends_with_its_program_and_delays_nothing():
    mark = f"daemon-{time.monotonic()}"
    code = f"""
        import os, signal, time
        mark = {mark!r}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        print("done", flush=True)
    """
    result = python(code)
    assert (result.code, result.stdout) == (0, "done\n")
    assert result.seconds < 30.0
    assert is_soon(lambda: not running(mark))


def test_it_works_in_many_threads_at_once_and_leaves_no_descriptor_open():
    python("")
    before = len(os.listdir("/proc/self/fd"))
    results: list[Result] = []
    threads = [threading.Thread(target=lambda i=i: results.append(python(f"print({i})"))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.stdout for r in results) == [f"{i}\n" for i in range(4)]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("unsafe", [False, True])
def test_killing_the_caller_kills_the_program(unsafe: bool):
    mark = f"orphan-{time.monotonic()}-{unsafe}"
    code = "from megatron_r1.verifying import sandbox; "
    code += f"sandbox.run([*sandbox.PYTHON, '-c', 'import time; time.sleep(1000) # {mark}'], "
    caller = subprocess.Popen([sys.executable, "-c", f"{code} limits=sandbox.Limits(seconds=500.0), unsafe={unsafe})"], cwd=ROOT)

    def runs() -> bool:
        """Whether the program does, and not only what makes its sandbox: in that one's first moments nobody has told the kernel."""
        return any(argv(pid)[1:2] == ["-I"] for pid in running(mark))

    try:
        assert is_soon(runs, 60.0)
    finally:
        caller.kill()
        caller.wait()
    assert is_soon(lambda: not running(mark))


def test_where_there_is_no_bwrap_it_refuses_with_the_fix_and_unsafe_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "prlimit").symlink_to(sandbox._path("prlimit"))
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.check.cache_clear()
    with pytest.raises(ValueError, match=r"apt-get install bubblewrap.* unsafe = true"):
        python("print(1)")
    assert python("print(1)", unsafe=True).stdout == "1\n"


def test_where_bwrap_is_refused_it_says_what_to_allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "prlimit").symlink_to(sandbox._path("prlimit"))
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.check.cache_clear()
    with pytest.raises(ValueError, match=r"No permissions to .* kernel.unprivileged_userns_clone.* unsafe = true") as error:
        python("print(1)")
    assert "\n" not in str(error.value)
    sandbox.check.cache_clear()


def test_what_the_caller_got_wrong_is_said_before_anything_runs():
    for path in ("../x", "/etc/x", "a//b", "", "./x", "a/../../x"):
        with pytest.raises(ValueError, match="not a path inside"):
            run(["true"], files={path: ""})
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); from megatron_r1.verifying import sandbox; "
    code += "sandbox.run(['true'], limits=sandbox.Limits(memory_bytes=1 << 31))"
    refused = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "memory_bytes = 2147483648: more than the 1073741824 this process has itself" in refused.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_rights_gets_the_same_sandbox(tmp_path: Path):
    """As nobody, with a Python all may read; the bomb meets the kernel's own limit there."""
    if not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("no Python outside root's home")
    source, needed = ((ROOT / "megatron_r1" / name).read_text() for name in ("verifying/sandbox.py", "processes.py"))
    needed = needed.replace("from __future__ import annotations\n", "")
    imported = "from megatron_r1.processes import descendants, die_with_parent, end_namespace\n"
    assert imported in source
    source = source.replace(imported, needed)  # nobody may not read this folder
    code = "\nfor text in ('import os; print(os.getuid(), os.listdir(\"/tmp\"))', 'import os\\nwhile True: os.fork()'):\n"
    code += "    r = run([*PYTHON, '-c', text], limits=Limits(seconds=60.0)); print(r.stdout.strip(), r.stopped, *r.stderr.splitlines())\n"
    as_nobody = ["/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", "/usr/bin/python3", "-I", "-"]
    done = subprocess.run(as_nobody, input=source + code, capture_output=True, text=True, cwd="/", check=False)
    first, second = done.stdout.strip().split("\n", 1)
    assert first.strip() == "65534 []", done
    assert "processes" in second or "temporarily unavailable" in second, done
