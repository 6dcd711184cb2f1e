"""What confines ComfyUI without a system's unit, on this kernel: Landlock and seccomp, as root and as somebody else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import confine
from core import files

pytestmark = pytest.mark.skipif(confine.abi() < 4, reason="this kernel has no Landlock with rules for TCP (Linux 6.7)")

PROBE = """
import json, os, socket, sys
home, data, port = sys.argv[1:]
told = {}
def attempt(name, act):
    try:
        told[name] = act() or "done"
    except OSError as error:
        told[name] = error.strerror
def tcp(there):
    socket.create_connection(("127.0.0.1", int(there)), 2).close()
parent = os.getppid()
for name, act in {
    "read the system": lambda: open("/etc/hostname").read(),
    "read a home": lambda: open(f"{home}/secret").read(),
    "list a home": lambda: ",".join(os.listdir(home)),
    "write a home": lambda: open(f"{home}/new", "w").close(),
    "write the data": lambda: open(f"{data}/new", "w").close(),
    "read by a link": lambda: os.path.lexists(f"{data}/link") or os.symlink(f"{home}/secret", f"{data}/link")
        or open(f"{data}/link").read(),
    "rename out": lambda: os.rename(f"{data}/new", f"{home}/new"),
    "read the parent's variables": lambda: open(f"/proc/{parent}/environ").read(),
    "see by the parent": lambda: open(f"/proc/{parent}/root{home}/secret").read(),
    "signal the parent": lambda: os.kill(parent, 0),
    "AF_UNIX stream": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close(),
    "AF_UNIX datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).close(),
    "AF_UNIX pair": lambda: socket.socketpair()[0].close(),
    "AF_UNIX as CUDA": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).bind("\\0hearth-test-uvmfd"),
    "a packet socket": lambda: socket.socket(17, socket.SOCK_RAW).close(),
    "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
    "connect to an allowed port": lambda: tcp(port),
    "connect to another port": lambda: tcp(22),
    "listen at another port": lambda: socket.create_server(("127.0.0.1", 0)).close(),
    "set the kernel": lambda: open("/proc/sys/kernel/core_pattern", "w").close(),
    "name a thread": lambda: open("/proc/self/comm", "w").write("x") and None,
    "name a thread of a process of its own": lambda: os.system("echo x > /proc/self/comm") and "Permission denied",
    "write the parent's memory": lambda: open(f"/proc/{parent}/mem", "r+b").close(),
    "shared memory": lambda: (open("/dev/shm/hearth-test", "w").close(), os.unlink("/dev/shm/hearth-test"))[1],
    "run a program": lambda: os.system("true") and None,
    "become root again": lambda: os.setuid(0),
}.items():
    attempt(name, act)
told["secret"] = os.environ.get("SECRET", "")
print(json.dumps(told))
"""

KERNEL = "/proc/sys/kernel/core_pattern"

KEPT_FROM = {
    "read a home", "list a home", "write a home", "read by a link", "rename out", "read the parent's variables",
    "see by the parent", "signal the parent", "AF_UNIX stream", "AF_UNIX datagram", "a packet socket",
    "connect to another port", "listen at another port", "set the kernel", "write the parent's memory",
}  # fmt: skip


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def tell(place: Path, port: int, user: int, **spec: Any) -> dict[str, str]:
    """What the probe tells, confined, run by a user."""
    home, data = place / "home", place / "data"
    for folder in (home, data, place / "secrets"):
        folder.mkdir()
    (home / "secret").write_text("private")
    (place / "secrets/SECRET").write_text("told to it alone")
    shutil.copytree(files.CHECKOUT / "agent", place / "code/agent")
    for path in (place, *place.rglob("*")):
        os.chown(path, user, user)
    told = {"read": [], "write": [str(data)], "bind": [], "connect": [port], "udp": True}
    told |= {"secrets": ["SECRET"], "folder": str(place / "secrets"), **spec}
    start = f"import sys, json; sys.path.insert(0, {str(place / 'code')!r}); from agent import confine; "
    start += "confine.main(json.loads(sys.argv[1]), sys.argv[2:])"
    python = "/usr/bin/python3" if user else os.path.realpath(sys.executable)  # root's own may lie in a closed folder
    command = [python, "-I", "-S", "-c", PROBE, str(home), str(data), str(port)]
    lowered = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    done = subprocess.run(
        [*lowered, python, "-I", "-S", "-B", "-c", start, json.dumps(told), *command],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PRIVATE": "x", "TMPDIR": str(data / "tmp")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("user", [0, 65534])
def test_it_reads_the_system_writes_its_data_and_gets_no_further(user: int, port: int) -> None:
    """In a folder that any user may pass through, as a home is not."""
    if os.geteuid() or (user and not Path("/usr/bin/python3").exists()):
        pytest.skip("only root can become somebody else, who needs a Python to run")
    folder = Path("/var/tmp") / f"hearth-confine-{os.getpid()}-{user}"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    try:
        told = tell(folder, port, user)
    finally:
        shutil.rmtree(folder)
    closed = {"name a thread of a process of its own"} if os.access(KERNEL, os.W_OK) and not user else set()
    refused = ("Permission denied", "Operation not permitted", "Invalid cross-device link")
    assert {name for name, what in told.items() if what.startswith(refused)} - {
        "become root again"
    } == KEPT_FROM | closed
    assert told["secret"] == "told to it alone"


def test_offline_means_no_datagrams_either(tmp_path: Path, port: int) -> None:
    told = tell(tmp_path, port, 0, udp=False, connect=[])
    assert told["UDP"] == "Operation not permitted"
    assert told["connect to an allowed port"] == "Permission denied"


def test_secrets_alone_confine_nothing(tmp_path: Path) -> None:
    """Where a system's unit confines the command, it only gets its secrets."""
    (tmp_path / "TOKEN").write_text("x")
    code = "from agent import confine; import sys; confine.main({'secrets': ['TOKEN']}, sys.argv[1:])"
    words = [sys.executable, "-c", code, sys.executable, "-c", "import os; print(os.environ['TOKEN'])"]
    env = {"PATH": "/usr/bin:/bin", "CREDENTIALS_DIRECTORY": str(tmp_path), "PYTHONPATH": str(files.CHECKOUT)}
    assert subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout == "x\n"
