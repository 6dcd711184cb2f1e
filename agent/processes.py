"""Programs that are run to their end, and processes that outlive their parents."""

from __future__ import annotations

import os
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

from agent.files import FULL, Fault, read_some, read_text


def started(pid: int) -> str:
    """When a process was started and in which boot: with its number that names one process; empty when it has ended."""
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()  # proc(5); its name may hold anything
    if not fields or fields[0] in "ZX":
        return ""
    return f"{fields[19]} {read_text(Path('/proc/sys/kernel/random/boot_id')).strip()}"


INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),  # for systemctl --user
    "XDG_CONFIG_HOME",  # where uv.toml lies
)
"""What programs get of the agent's environment. The rest is that of whoever started the agent, and PYTHON*, LD_*, PIP_*
and the like would change what they do."""


# Indexes, their credentials and certificates, and how the network is reached. Nothing else of uv's: what is installed,
# and where, is decided by the plan.
INDEX = (
    *("UV_INDEX*", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_KEYRING_PROVIDER", "UV_CREDENTIALS_DIR", "NETRC"),
    *("UV_NATIVE_TLS", "UV_SYSTEM_CERTS", "UV_INSECURE_HOST", "UV_HTTP_*", "UV_REQUEST_TIMEOUT", "UV_OFFLINE", "SSL_*"),
    *(name for each in ("HTTP", "HTTPS", "ALL", "NO") for name in (f"{each}_PROXY", f"{each}_PROXY".lower())),
)


def inherited(*more: str) -> dict[str, str]:
    """The agent's environment as far as programs get it; `more` are further names, with `*` for any part of one."""
    names = (*INHERITED, *more)
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, each) for each in names)}


def confine() -> None:
    """Remove all other variables from this process, so that programs lack them however they are started.

    Programs also speak English then, which the agent reads, and take file names in UTF-8.
    """
    kept = inherited(*INDEX) | {"LC_ALL": "C.UTF-8"}
    os.environ.clear()
    os.environ.update(kept)


def run(
    argv: list[str], env: dict[str, str] | None = None, timeout: float = 3600, *, inherit: bool = True, **more: Any
) -> str:
    """Run a program to its end and return its output; raises Fault with its last lines when it fails.

    `env` is added to `inherited`, or without `inherit` is all that it gets; `more` is for subprocess.Popen. After
    `timeout` seconds it is killed, with what it has started.
    """
    more |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    more |= {"env": {**(inherited() if inherit else {}), **(env or {})}, "start_new_session": True}
    try:
        with subprocess.Popen(argv, text=True, errors="replace", **more) as process:
            try:
                output, said = (str(each) for each in process.communicate(timeout=timeout))
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired as error:
        hint = "run the same command again; look at the host's load and network when that does not help"
        raise Fault("step", f"{' '.join(argv[:3])} did not end within {timeout:.0f} s", "", hint) from error
    except OSError as error:
        raise Fault("step", f"{argv[0]} could not be run", str(error)) from error
    if process.returncode:
        tail = "\n".join((said or output).strip().splitlines()[-8:])
        full = "No space left" in tail
        raise Fault("disk" if full else "step", f"{' '.join(argv[:3])} failed", tail, FULL if full else "")
    return output


LOG_BYTES = 4_000_000
"""Bytes of a log that are looked at, its last: ComfyUI and ten nodes say some 50 kB while they start."""


LINE = 2000
"""Characters of a line of a log that are shown: whoever writes it may never end one."""


def last_of(argv: list[str], lines: int) -> list[str]:
    """The last lines of what a program shows backwards, in their order, as far as they fit into `LOG_BYTES`."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=inherited()
            )
        except OSError as error:
            raise Fault("step", f"{argv[0]} could not be run", str(error)) from error
        with process:
            assert process.stdout is not None
            raw = process.stdout.read(LOG_BYTES)
            process.kill()  # it may have more to say
        if not raw:
            said.seek(0)
            if why := said.read(LINE).decode(errors="replace").strip():
                raise Fault("step", f"{' '.join(argv[:3])} failed", why)
    return [line[:LINE] for line in reversed(raw.decode(errors="replace").splitlines()[:lines])]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until the condition holds; returns whether it did in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def dies_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: the kernel kills the new process when this thread ends, however it ends (prctl(2))."""
    import ctypes  # only needed here

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def child() -> None:
        prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the kernel knew
            os._exit(1)

    return child


def take_orphans() -> set[int]:
    """Become the parent of all that outlives its own here (prctl(2)); returns the children that there are already."""
    import ctypes  # only needed here

    ctypes.CDLL(None).prctl(36, ctypes.c_ulong(1), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    return children()


def end_descendants(spared: Collection[int] = (), *, seconds: float = 20) -> None:
    """Kill what was started since `take_orphans` returned the `spared`; raises Fault when it does not end.

    Whoever loses its parent by that becomes a child here, and is next. One that forks and ends without a pause is gone
    when it is signalled, but leaves a dead child behind each time: it is looked for until there is none for a while.
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
            what = f"{len(left)} processes of ComfyUI's do not end"
            raise Fault(
                "step", what, f"some of them: {sorted(left)[:5]}", "look at them on the host; a reboot ends them"
            )
        time.sleep(0 if left else 0.001)


def end_with_programs(pid: int) -> None:
    """Kill a process and the programs that it has started, each of which leads a session of its own (`files.run`)."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # it starts no more
    programs = children(pid)
    kills = [(pid, os.kill), *((each, kill) for each in programs for kill in (os.killpg, os.kill))]
    for each, kill in kills:
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or is another user's
            kill(each, signal.SIGKILL)


def children(parent: int = 0) -> set[int]:
    """The children of a process, by default this one's, dead ones too."""
    parent = parent or os.getpid()
    if lists := list(Path(f"/proc/{parent}/task").glob("*/children")):
        return {int(pid) for each in lists for pid in read_some(each).split()}
    places = {place.name: read_some(place / "stat", 4096) for place in Path("/proc").glob("[0-9]*")}
    # proc(5); its name may hold anything
    return {int(pid) for pid, line in places.items() if line.rpartition(b")")[2].split()[1:2] == [b"%d" % parent]}


def copied(pipe: IO[bytes], log: IO[bytes]) -> threading.Thread:
    """Append a pipe's output to a file. A program that had the file itself could truncate it."""

    def copy() -> None:
        while block := os.read(pipe.fileno(), 1 << 16):
            with suppress(OSError, ValueError):  # a full disk must not hold it up
                log.write(block)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread
