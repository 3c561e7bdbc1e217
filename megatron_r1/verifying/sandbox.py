"""Runs a program nobody trusts inside bubblewrap, with limits on everything it could use up.

Inside there is no network and no environment; the root is read-only and holds Python and the system's libraries alone; /tmp and
/dev/shm are in memory and small; the user is nobody, without capabilities and without the right to make user namespaces. The
namespace of process ids ends with bwrap, and bwrap with the thread that called `run`: nothing is left behind, whoever is killed.

A limit of the kernel holds each process: address space, CPU time, file size, and their number where the caller is not root. This
process watches all of them together: wall time, output, number, and resident memory, 50 times a second, and kills them at the
limit. It works off the main thread, by polling. What it cannot see is memory in a memfd that nobody has mapped; only a cgroup
around the whole run bounds that.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from megatron_r1.processes import descendants, die_with_parent, end_namespace

# This interpreter without the caller's packages, variables and current folder; `command` usually begins with it.
PYTHON = (os.path.realpath(sys.executable), "-I", "-B", "-X", "utf8")
HOME = "/tmp"  # the program's current folder, and where its files are
SYSTEM_FOLDERS = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64")
SYSTEM_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
TICK_SECONDS = 0.02
PIPE_BYTES = 1 << 16
BWRAP_PROCESSES = 2  # bwrap itself, and the first process of its namespace
PAGE_BYTES = resource.getpagesize()
INSTALL = "install bubblewrap 0.8 or newer (apt-get install bubblewrap)"
ALLOW = (
    "allow unprivileged user namespaces (as root: sysctl -w user.max_user_namespaces=15000, and where they exist "
    "kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0)"
)
UNSAFE = "or set unsafe = true in the reward's options to run programs without a sandbox"


@dataclass(frozen=True)
class Limits:
    """What a program may use until it is killed."""

    seconds: float = 6.0  # wall time of all its processes
    cpu_seconds: int = 4  # of one process
    memory_bytes: int = 1 << 30  # address space of one process, and resident memory of all together
    processes: int = 32  # at once; the threads of all where the caller is not root
    output_bytes: int = 1 << 20  # of stdout and stderr together
    file_bytes: int = 64 << 20  # all of /tmp, and again of /dev/shm; without a sandbox, one file


@dataclass(frozen=True)
class Result:
    """How a program ended. stdout and stderr are cut at the output limit."""

    code: int  # its exit code; 128 + the signal that ended it, or negative when `run` killed it
    stdout: str
    stderr: str
    stopped: str  # the limit this process enforced: "seconds", "processes", "memory_bytes", "output_bytes"; "" if none
    seconds: float

    @property
    def is_success(self) -> bool:
        """It ended by itself, with exit code 0."""
        return self.code == 0 and not self.stopped


DEFAULT = Limits()


def run(
    command: Sequence[str],
    *,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    limits: Limits = DEFAULT,
    unsafe: bool = False,
) -> Result:
    """Runs `command` among `files` (relative path -> text), which are its current folder's; never raises for what it does.

    unsafe: no sandbox, the limits alone; it then sees and changes what the caller may, and its daemons outlive it.
    Raises ValueError where a sandbox cannot be made or a limit lies above the caller's own, RuntimeError when bwrap fails.
    """
    files = {check_path(path): text for path, text in (files or {}).items()}
    _check_limits(limits)
    if unsafe:
        return _run_unsafe(command, stdin, files=files, limits=limits)
    check()
    return _run_sandboxed(command, stdin, files=files, limits=limits)


@cache
def check() -> None:
    """ValueError with the fix where no sandbox can be made; tried once a process, by making one."""
    if shutil.which("bwrap") is None:
        raise ValueError(f"no bwrap on PATH, and programs run only in a sandbox: {INSTALL}, {UNSAFE}")
    if shutil.which("prlimit") is None or not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise ValueError("the sandbox needs prlimit (util-linux) and /proc/<pid>/task/<tid>/children (CONFIG_PROC_CHILDREN)")
    try:
        result = _run_sandboxed([*PYTHON, "-c", ""], "", files={}, limits=Limits(seconds=60.0))
        why = "" if result.is_success else f"Python does not start in it: {_last_line(result.stderr)}"
    except RuntimeError as error:
        why = str(error)
    if why:
        raise ValueError(f"{why}; {INSTALL}, {ALLOW}, {UNSAFE}")


def _run_sandboxed(command: Sequence[str], stdin: str, *, files: Mapping[str, str], limits: Limits) -> Result:
    with ExitStack() as stack:
        copies = {path: _memory_file(text, stack) for path, text in files.items()}
        status, report = os.pipe()
        stack.callback(os.close, status)
        with os.fdopen(report, "wb"):
            arguments = _bwrap(copies, report, limits)
            result = _supervise(
                [*arguments, "--", *_prlimit(limits, processes=True), *command],
                stdin,
                limits=limits,
                pass_fds=(*copies.values(), report),
                own_processes=BWRAP_PROCESSES,
            )
        lines = [json.loads(line) for line in os.read(status, 1 << 16).splitlines()]
    # bwrap reports an exit code only of a program it has started; a program cannot write there.
    if not result.stopped and not any("exit-code" in line for line in lines):
        raise RuntimeError(f"bwrap could not make a sandbox: {_last_line(result.stderr)}")
    return result


def _run_unsafe(command: Sequence[str], stdin: str, *, files: Mapping[str, str], limits: Limits) -> Result:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="program-"))
        for path, text in files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(text)
        # Without a namespace the kernel would count all of the user's processes, so only the watch holds their number.
        return _supervise([*_prlimit(limits, processes=False), *command], stdin, limits=limits, cwd=folder)


def _bwrap(copies: Mapping[str, int], report: int, limits: Limits) -> list[str]:
    """The command that makes the sandbox. Every mount that is not the program's own is made read-only, the empty ones too."""
    argv = [_path("bwrap"), "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    argv += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv"]
    argv += ["--die-with-parent", "--new-session", "--json-status-fd", str(report)]
    argv += ["--size", str(limits.file_bytes), "--tmpfs", HOME]
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            argv += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            argv += ["--ro-bind", folder, folder]
    needed = (PYTHON[0], f"{sys.base_prefix}/lib", os.path.realpath(_path("prlimit")))
    argv += [word for path in needed for word in ("--ro-bind", path, path)]
    argv += [word for path in SYSTEM_FILES for word in ("--ro-bind-try", path, path)]
    argv += ["--proc", "/proc", "--dev", "/dev", "--size", str(limits.file_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    argv += [word for path, descriptor in copies.items() for word in ("--file", str(descriptor), f"{HOME}/{path}")]
    return [*argv, "--remount-ro", "/", "--chdir", HOME]


def _prlimit(limits: Limits, *, processes: bool) -> list[str]:
    sizes = [f"--as={limits.memory_bytes}", f"--cpu={limits.cpu_seconds}", f"--fsize={limits.file_bytes}", "--core=0"]
    return [os.path.realpath(_path("prlimit")), *sizes, *([f"--nproc={limits.processes}"] if processes else ()), "--"]


def _supervise(
    argv: Sequence[str],
    stdin: str,
    *,
    limits: Limits,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    own_processes: int = 0,
) -> Result:
    """Starts a session of its own, reads what it writes, and ends it at a limit or when its first process has ended."""
    start = time.monotonic()
    settings = {"env": {}, "cwd": cwd, "bufsize": 0, "start_new_session": True, "pass_fds": pass_fds}
    settings |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(argv, **settings, preexec_fn=partial(die_with_parent, signal.SIGKILL))
    stdout, stderr, stopped = bytearray(), bytearray(), ""
    with process.stdin, process.stdout, process.stderr, selectors.DefaultSelector() as selector:
        for pipe in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
        # A pipe, not a file: what has been read once cannot be read again by way of another process's descriptors.
        selector.register(process.stdin, selectors.EVENT_WRITE, memoryview(stdin.encode(errors="replace")))
        selector.register(process.stdout, selectors.EVENT_READ, stdout)
        selector.register(process.stderr, selectors.EVENT_READ, stderr)
        try:
            while process.poll() is None and not stopped:
                _exchange(selector, process)
                stopped = _exceeded(process.pid, len(stdout) + len(stderr), limits=limits, start=start, own_processes=own_processes)
        finally:
            if own_processes:
                end_namespace(process.pid)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _exchange(selector, process)  # what it wrote last; a pipe holds no more than one read takes
    texts = [bytes(text[: limits.output_bytes]).decode(errors="replace") for text in (stdout, stderr)]
    code = process.returncode if process.returncode >= 0 or stopped else 128 - process.returncode
    return Result(code, *texts, stopped, time.monotonic() - start)


def _exchange(selector: selectors.BaseSelector, process: subprocess.Popen[bytes]) -> None:
    """Reads what there is and writes what is taken, waiting a tick for either; once all pipes have ended, for the process."""
    if not selector.get_map():
        with suppress(subprocess.TimeoutExpired):
            process.wait(TICK_SECONDS)
        return
    for key, events in selector.select(TICK_SECONDS):
        if events & selectors.EVENT_READ:
            text = os.read(key.fd, PIPE_BYTES)
            key.data.extend(text)
            if not text:
                selector.unregister(key.fileobj)
        elif left := _give(key.fd, key.data):
            selector.modify(key.fileobj, selectors.EVENT_WRITE, left)
        else:
            selector.unregister(key.fileobj)
            key.fileobj.close()


def _give(descriptor: int, text: memoryview) -> memoryview:
    """What is left to write; nothing once the reader is gone."""
    try:
        return text[os.write(descriptor, text[:PIPE_BYTES]) :]
    except BrokenPipeError:
        return text[:0]


def _exceeded(pid: int, written: int, *, limits: Limits, start: float, own_processes: int) -> str:
    """The limit that the session has reached, or ""."""
    if time.monotonic() - start > limits.seconds:
        return "seconds"
    if written > limits.output_bytes:
        return "output_bytes"
    resident = 0
    for count, one in enumerate(descendants(pid), 1):
        with suppress(OSError):
            resident += PAGE_BYTES * int(Path(f"/proc/{one}/statm").read_text().split()[1])
        if count > limits.processes + own_processes:
            return "processes"
    return "memory_bytes" if resident > limits.memory_bytes else ""


def _memory_file(text: str, stack: ExitStack) -> int:
    """A descriptor of a sealed file in memory: nothing to clean up, and a program that finds it cannot make it grow."""
    descriptor = os.memfd_create("text", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, descriptor)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(text.encode(errors="replace"))
        file.flush()
        file.seek(0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return descriptor


def _check_limits(limits: Limits) -> None:
    """A process cannot give its children more than it has."""
    asked = {"memory_bytes": resource.RLIMIT_AS, "cpu_seconds": resource.RLIMIT_CPU, "file_bytes": resource.RLIMIT_FSIZE}
    for name, kind in asked.items():
        value, own = getattr(limits, name), resource.getrlimit(kind)[1]
        if own != resource.RLIM_INFINITY and value > own:
            raise ValueError(f"the sandbox's {name} = {value}: more than the {own} this process has itself; lower it")


def check_path(path: str) -> str:
    """The path, if it is relative and stays in its folder; else ValueError."""
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"file {path!r}: not a path inside the program's folder; write it as folder/name.py")
    return path


def _path(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ValueError(f"no {program} on PATH, which running a program needs: install bubblewrap and util-linux")
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
