"""Run programs to completion, and handle processes that outlive their parents."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from agent.files import FULL, AgentError, read_some, read_text


def started(pid: int) -> str:
    """Return a process's start time and boot id, which with its pid identify it; empty if it has ended."""
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()  # proc(5); the name may contain anything
    if not fields or fields[0] in "ZX":
        return ""
    return f"{fields[19]} {read_text(Path('/proc/sys/kernel/random/boot_id')).strip()}"


INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),  # for systemctl --user
    "XDG_CONFIG_HOME",  # for uv.toml
)
"""Variables that programs inherit from the agent. The others come from the user who started it; PYTHON*, LD_*, PIP_*
and the like would change the programs' behaviour."""


# Package indexes, their credentials and certificates, and proxies. No other variables of uv: the plan decides what is
# installed, and where.
INDEX = (
    *("UV_INDEX*", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_KEYRING_PROVIDER", "UV_CREDENTIALS_DIR", "NETRC"),
    *("UV_NATIVE_TLS", "UV_SYSTEM_CERTS", "UV_INSECURE_HOST", "UV_HTTP_*", "UV_REQUEST_TIMEOUT", "UV_OFFLINE", "SSL_*"),
    *(name for each in ("HTTP", "HTTPS", "ALL", "NO") for name in (f"{each}_PROXY", f"{each}_PROXY".lower())),
)


def inherited(*more: str) -> dict[str, str]:
    """Return the variables that programs inherit; `more` are additional names, `*` is a wildcard."""
    names = (*INHERITED, *more)
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, each) for each in names)}


def confine() -> None:
    """Remove all other variables from this process, so that no program inherits them however it is started.

    Sets LC_ALL, so that programs print English, which the agent parses, and use UTF-8 file names.
    """
    kept = inherited(*INDEX) | {"LC_ALL": "C.UTF-8"}
    os.environ.clear()
    os.environ.update(kept)


def run(
    argv: list[str], env: dict[str, str] | None = None, timeout: float = 3600, *, inherit: bool = True, **more: Any
) -> str:
    """Run a program and return its output. Raises AgentError with its last lines if it fails.

    `env` is added to `inherited()`, or replaces it if `inherit` is False; `more` is passed to subprocess.Popen. After
    `timeout` seconds the program and its process group are killed.
    """
    more |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    more |= {"env": {**(inherited() if inherit else {}), **(env or {})}, "start_new_session": True}
    try:
        with subprocess.Popen(argv, text=True, errors="replace", **more) as process:
            try:
                output, stderr = (str(each) for each in process.communicate(timeout=timeout))
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired as error:
        hint = "run the same command again; if that does not help, check the host's load and network"
        raise AgentError("step", f"{' '.join(argv[:3])} did not end within {timeout:.0f} s", "", hint) from error
    except OSError as error:
        raise AgentError("step", f"{argv[0]} could not be started", str(error)) from error
    if process.returncode:
        tail = "\n".join((stderr or output).strip().splitlines()[-8:])
        full = re.search("No space left on device|Disk quota exceeded", tail)
        raise AgentError("disk" if full else "step", f"{' '.join(argv[:3])} failed", tail, FULL if full else "")
    return output


LOG_BYTES = 4_000_000
"""Maximum number of bytes read from a log's end: ComfyUI with ten nodes logs some 50 kB at its start."""


LINE = 2000
"""Maximum length of a log line in characters: the writer may never end it."""


def last_of(argv: list[str], lines: int) -> list[str]:
    """Run a program that prints its newest line first; return the last lines, oldest first. Raises AgentError."""
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=inherited()
            )
        except OSError as error:
            raise AgentError("step", f"{argv[0]} could not be started", str(error)) from error
        with process:
            assert process.stdout is not None
            raw = process.stdout.read(LOG_BYTES)
            process.kill()  # it may have more output
        if not raw:
            stderr.seek(0)
            if why := stderr.read(LINE).decode(errors="replace").strip():
                raise AgentError("step", f"{' '.join(argv[:3])} failed", why)
    return [line[:LINE] for line in reversed(raw.decode(errors="replace").splitlines()[:lines])]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait up to `seconds` for the condition; return whether it became true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def dies_with_parent() -> Callable[[], None]:
    """Return a `preexec_fn` that makes the kernel kill the new process when this thread ends (prctl(2))."""
    import ctypes  # only needed here

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def child() -> None:
        prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before the prctl
            os._exit(1)

    return child


def take_orphans() -> set[int]:
    """Become the reaper of orphaned descendants (prctl(2)); return the existing children."""
    import ctypes  # only needed here

    ctypes.CDLL(None).prctl(36, ctypes.c_ulong(1), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    return children()


def end_descendants(spared: Collection[int] = (), *, seconds: float = 20) -> None:
    """Kill all descendants except `spared` (from `take_orphans`); raise AgentError if some remain after `seconds`.

    Orphans of killed processes become children here and are killed next. A process that forks and exits in a loop is
    gone before its signal but leaves a zombie each time, so repeat until no child has appeared for a while.
    """
    end, quiet = time.monotonic() + seconds, 0
    while quiet < 20:
        left = children() - set(spared)
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        quiet = 0 if left else quiet + 1
        if left and time.monotonic() > end:
            what = f"processes of ComfyUI do not end: {len(left)}"
            raise AgentError(
                "step", what, f"some of them: {sorted(left)[:5]}", "inspect them on the host; a reboot ends them"
            )
        time.sleep(0 if left else 0.001)


def end_with_programs(pid: int) -> None:
    """Kill a process and the programs it has started, each a session leader (see `run`)."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # prevents new programs
    programs = children(pid)
    kills = [(pid, os.kill), *((each, kill) for each in programs for kill in (os.killpg, os.kill))]
    for each, kill in kills:
        with suppress(ProcessLookupError, PermissionError):  # it has ended or belongs to another user
            kill(each, signal.SIGKILL)


def children(parent: int = 0) -> set[int]:
    """Return the children of a process (default: this one), including zombies."""
    parent = parent or os.getpid()
    if lists := list(Path(f"/proc/{parent}/task").glob("*/children")):
        return {int(pid) for each in lists for pid in read_some(each).split()}
    places = {place.name: read_some(place / "stat", 4096) for place in Path("/proc").glob("[0-9]*")}
    # proc(5); the name may contain anything
    return {int(pid) for pid, line in places.items() if line.rpartition(b")")[2].split()[1:2] == [b"%d" % parent]}


def logged(
    argv: list[str], environment: dict[str, str], log: IO[bytes]
) -> tuple[subprocess.Popen[bytes], threading.Thread]:
    """Start a program that ends with this thread; another thread, returned, copies its output to `log`."""
    child = subprocess.Popen(
        argv,
        env={**inherited(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        preexec_fn=dies_with_parent(),
    )
    assert child.stdout is not None
    return child, _copied(child.stdout, log)


def _copied(pipe: IO[bytes], log: IO[bytes]) -> threading.Thread:
    """Append a pipe's output to a file in a thread. A program with direct access could truncate the file."""

    def copy() -> None:
        while block := os.read(pipe.fileno(), 1 << 16):
            with suppress(OSError, ValueError):  # a full disk must not block the program
                log.write(block)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread
