"""Confinement of ComfyUI without a system unit, on this kernel: Landlock and seccomp, as root and as another user."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import processes
from agent.change import lifecycle
from agent.files import read, read_text, write
from agent.processes import started
from agent.serve import confine, supervised
from core import files
from deploy import plan
from tests.plans import FRESH, made, reasons, spark, values
from tests.unit.test_services import child, make, supervisor

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(confine.abi() < 4, reason="this kernel has no Landlock with rules for TCP (Linux 6.7)"),
]

PROBE = """
import ctypes, json, os, platform, resource, signal, socket, struct, sys
home, data, port = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
A, TFO = ("127.0.0.1", int(port)), 0x20000000
told = {}
def attempt(name, act):
    try:
        told[name] = act() or "done"
    except OSError as error:
        told[name] = error.strerror
def tcp(there):
    socket.create_connection(("127.0.0.1", int(there)), 2).close()
def call(name, *words):
    done = getattr(libc, name)(*words)
    if done == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done
def fork(flags):
    if call("syscall", 56 if platform.machine() == "x86_64" else 220, flags | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)
parent = os.getppid()
for name, act in {
    "read the system": lambda: open("/etc/hostname").read(),
    "read a home": lambda: open(f"{home}/secret").read(),
    "list a home": lambda: ",".join(os.listdir(home)),
    "write a home": lambda: open(f"{home}/new", "w").close(),
    "write the data": lambda: open(f"{data}/input/new", "w").close(),
    "read by a link": lambda: os.symlink(f"{home}/secret", f"{data}/input/link")
        or open(f"{data}/input/link").read(),
    "rename out": lambda: os.rename(f"{data}/input/new", f"{home}/new"),
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
    "MPTCP": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close(),
    "SCTP": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 132).close(),
    "DCCP": lambda: socket.socket(socket.AF_INET, 6, 33).close(),
    "ICMP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1).close(),
    "AF_VSOCK": lambda: socket.socket(40, socket.SOCK_STREAM).close(),
    "AF_ALG": lambda: socket.socket(38, socket.SOCK_SEQPACKET).close(),
    "routes": lambda: socket.socket(16, socket.SOCK_RAW).close(),
    "other sockets by netlink": lambda: socket.socket(16, socket.SOCK_RAW, 4).close(),
    "AF_UNIX pair of datagrams": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].close(),
    "connect by sendto": lambda: socket.socket().sendto(b"x", TFO, A),
    "connect by sendmsg": lambda: socket.socket().sendmsg([b"x"], [], TFO, A),
    "connect by a first write": lambda: socket.socket().setsockopt(6, 30, 1),
    "a socket of another protocol": lambda: socket.socket().setsockopt(6, 31, b"smc"),
    "no delay": lambda: socket.socket().setsockopt(6, 1, 1),
    "limit the parent": lambda: resource.prlimit(parent, resource.RLIMIT_CORE, (0, 0)),
    "limit itself": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    "slow the parent": lambda: os.setpriority(os.PRIO_PROCESS, parent, 1),
    "slow all of the login": lambda: os.setpriority(os.PRIO_USER, 0, 1),
    "slow itself": lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
    "move the parent": lambda: os.sched_setaffinity(parent, {0}),
    "move itself": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    "schedule the parent": lambda: os.sched_setscheduler(parent, os.SCHED_BATCH, os.sched_param(0)),
    "signal everybody": lambda: os.kill(-1, 0),
    "hold the parent": lambda: os.close(os.pidfd_open(parent)),
    "signal by a pidfd": lambda: signal.pidfd_send_signal(os.open(f"/proc/{parent}", os.O_RDONLY), 0),
    "shared memory by a key": lambda: call("shmget", 0x4845, 4096, 0o1600),
    "a message queue": lambda: call("mq_open", b"/hearth", 0o102, 0o600, None),
    "a namespace": lambda: call("unshare", 0x10000000),
    "a process in a namespace": lambda: fork(0x10000000),
    "a process": lambda: fork(0),
    "others' shared memory": lambda: str(os.listdir("/dev/shm")),
    "a terminal": lambda: os.close(os.open("/dev/ptmx", os.O_RDWR)),
    "another device": lambda: os.close(os.open("/dev/kmsg", os.O_RDONLY)),
    "no device": lambda: (open("/dev/null", "w").close(), open("/dev/urandom", "rb").read(1))[0],
    "take a folder of the data away": lambda: os.rmdir(f"{data}/models"),
    "put something into the data itself": lambda: open(f"{data}/out", "w").close(),
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
    "MPTCP", "SCTP", "DCCP", "ICMP", "AF_VSOCK", "AF_ALG", "other sockets by netlink", "AF_UNIX pair of datagrams",
    "connect by sendto", "connect by sendmsg", "connect by a first write", "a socket of another protocol",
    "limit the parent", "slow the parent", "slow all of the login", "move the parent", "schedule the parent",
    "signal everybody", "hold the parent", "signal by a pidfd", "shared memory by a key", "a message queue",
    "a namespace", "a process in a namespace", "others' shared memory", "a terminal", "another device",
    "take a folder of the data away", "put something into the data itself",
}  # fmt: skip


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def tell(place: Path, port: int, user: int = 0, code: str = PROBE, abi: int = 0, **spec: Any) -> dict[str, str]:
    """The probe's output when confined and run by a user; `abi` simulates an older Landlock."""
    home, data = place / "home", place / "data"
    for folder in (home, data, place / "secrets"):
        folder.mkdir(exist_ok=True)
    (home / "secret").write_text("private")
    (place / "secrets/SECRET").write_text("told to it alone")
    shutil.copytree(files.CHECKOUT / "agent", place / "code/agent", dirs_exist_ok=True)
    for path in (place, *place.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)
    told: dict[str, Any] = {"read": [], "write": [f"{data}/*"], "bind": [], "connect": [port], "udp": True}
    told |= {"secrets": ["SECRET"], "folder": str(place / "secrets"), **spec}
    start = f"import sys, json; sys.path.insert(0, {str(place / 'code')!r}); from agent.serve import confine; "
    start += f"confine.abi = lambda: {abi}; " if abi else ""
    start += "confine.main(json.loads(sys.argv[1]), sys.argv[2:])"
    python = "/usr/bin/python3" if user else os.path.realpath(sys.executable)  # root's own may be in a private folder
    command = [python, "-I", "-S", "-c", code, str(home), str(data), str(port)]
    lowered = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    done = subprocess.run(
        [*lowered, python, "-I", "-S", "-B", "-c", start, json.dumps(told), *command],
        capture_output=True,
        text=True,
        env={**told.pop("more", {}), "PATH": "/usr/bin:/bin", "PRIVATE": "x", "TMPDIR": str(data / "cache/tmp")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("user", [0, 65534])
def test_confined_process_reads_system_and_writes_data_only(user: int, port: int) -> None:
    """In a folder that every user can traverse, unlike a home."""
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


def test_offline_blocks_udp(tmp_path: Path, port: int) -> None:
    told = tell(tmp_path, port, udp=False, connect=[])
    assert told["UDP"] == told["MPTCP"] == told["connect by sendto"] == "Operation not permitted"
    assert told["connect to an allowed port"] == "Permission denied"


def test_secrets_without_confinement(tmp_path: Path) -> None:
    """If a system unit confines the command, it only gets its secrets."""
    (tmp_path / "TOKEN").write_text("x")
    code = "from agent.serve import confine; import sys; confine.main({'secrets': ['TOKEN']}, sys.argv[1:])"
    words = [sys.executable, "-c", code, sys.executable, "-c", "import os; print(os.environ['TOKEN'])"]
    env = {"PATH": "/usr/bin:/bin", "CREDENTIALS_DIRECTORY": str(tmp_path), "PYTHONPATH": str(files.CHECKOUT)}
    assert subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout == "x\n"


WORKS = """
import asyncio, concurrent.futures, json, multiprocessing, os, shutil, socket, subprocess, sys, tempfile, threading
from multiprocessing import shared_memory
data = sys.argv[2]
async def started():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1)", stdout=-1)
    return (await process.communicate())[0].decode().strip()
def squares():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, [-2])
def shared():
    one = shared_memory.SharedMemory(create=True, size=4096)
    other = shared_memory.SharedMemory(one.name)
    one.buf[0] = 7
    found = other.buf[0]
    other.close(), one.close(), one.unlink()
    return found
def temporary():
    shutil.rmtree(f"{data}/temp", ignore_errors=True)  # as ComfyUI begins
    os.makedirs(f"{data}/temp", exist_ok=True)
    return tempfile.mkdtemp()
def ran():
    found = []
    one = threading.Thread(target=lambda: found.append(1))
    one.start(), one.join()
    return found
told = {}
for each in (lambda: asyncio.run(started()), squares, shared, temporary, ran,
             lambda: socket.getaddrinfo("localhost", 80), lambda: subprocess.run(["true"]).returncode,
             lambda: socket.if_nameindex()):
    told[f"{each.__name__} {len(told)}"] = str(each())
print(json.dumps(told))
"""


@pytest.mark.parametrize("abi", [0, 1, 2])
def test_comfyui_operations_work_confined(tmp_path: Path, port: int, abi: int) -> None:
    told = tell(tmp_path, port, code=WORKS, abi=abi)
    assert told.pop("temporary 3").startswith(str(tmp_path / "data/cache/tmp"))
    assert [told.pop(f"{each}") for each in ("<lambda> 0", "squares 1", "shared 2", "ran 4")] == [
        "1",
        "[2]",
        "7",
        "[1]",
    ]
    assert all(told.values())


READS = """
import json, os, sys
told = {}
def attempt(path, flags):
    try:
        os.close(os.open(path, flags))
        return "done"
    except OSError as error:
        return "refused"
for path in os.environ.get("LOOK", "").split() or [sys.argv[1] + "/secret"]:
    told[path] = f"{attempt(path, os.O_RDONLY)} {attempt(path, os.O_WRONLY)} {attempt(path, os.O_RDONLY | os.O_TRUNC)}"
try:
    os.truncate(sys.argv[1] + "/secret", 0)
except OSError:
    pass
print(json.dumps(told))
"""
SHUT = "refused refused refused"


@pytest.mark.parametrize("abi", [0, 1, 2])
@pytest.mark.parametrize(
    ("write", "read", "at"),
    [
        (["data"], ["data/models"], "data/models"),
        (["data"], ["data/models/loras"], "data/models"),
        (["data", "data/output"], [], "data/output"),
        (["data/output", "data"], [], "data/output"),
        (["data", "data/a/b/../output"], [], "data/a"),
        (["data/*"], [], "data/input"),
        (["data/*"], ["data/input/more"], "data/input/more"),
        (["data/*", "data/cache/out"], [], "data/cache/out"),
        (["data"], [], "data/cache/tmp"),  # TMPDIR
    ],
)
def test_links_in_writable_folders_grant_nothing(
    tmp_path: Path, port: int, write: list[str], read: list[str], at: str, abi: int
) -> None:
    """The confined process replaces a folder by a link; at the next start, a rule must not open the link's target."""
    (tmp_path / "home/loras").mkdir(parents=True)
    (tmp_path / at).parent.mkdir(parents=True)
    (tmp_path / at).symlink_to(tmp_path / "home")
    spec: dict[str, Any] = {"write": [f"{tmp_path}/{each}" for each in write]}
    spec |= {"read": [f"{tmp_path}/{each}" for each in read]}
    assert tell(tmp_path, port, code=READS, abi=abi, **spec) == {f"{tmp_path}/home/secret": SHUT}
    assert (tmp_path / "home/secret").read_text() == "private"
    assert sorted(each.name for each in (tmp_path / "home").iterdir()) == ["loras", "secret"]


def test_no_folder_is_made_through_a_link(tmp_path: Path, port: int) -> None:
    for folder in ("home", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data/cache").symlink_to(tmp_path / "home")
    tell(tmp_path, port, code=READS, write=[str(tmp_path / "data")])
    assert [each.name for each in (tmp_path / "home").iterdir()] == ["secret"]


@pytest.mark.parametrize("abi", [0, 1, 2])
def test_linked_models_folder_is_readable(tmp_path: Path, port: int, abi: int) -> None:
    model = tmp_path / "disk/models/a.safetensors"
    model.parent.mkdir(parents=True)
    model.touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/models").symlink_to("../disk/models")
    look = [str(model), f"{tmp_path}/data/models/a.safetensors"]
    spec: dict[str, Any] = {"read": [f"{tmp_path}/data/models"], "more": {"LOOK": " ".join(look)}}
    told = tell(tmp_path, port, code=READS, abi=abi, **spec)
    assert told == dict.fromkeys(look, "done refused refused")


@pytest.mark.parametrize("abi", [0, 1, 2])
def test_no_rule_grants_the_secrets_folder(tmp_path: Path, port: int, abi: int) -> None:
    """Neither a path in the host's configuration nor a system folder that it is installed in."""
    for name in ("home/prefix/secrets", "home/prefix/state", "home/prefix/models", "home/more"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").touch()
    look = [f"{tmp_path}/home/{name}/x" for name in ("prefix/secrets", "prefix/state", "prefix/models", "more")]
    folder = f"{tmp_path}/home/prefix/secrets"
    spec: dict[str, Any] = {"folder": folder, "secrets": [], "more": {"LOOK": " ".join(look)}, "abi": abi}
    for key, path in (("read", "home"), ("write", "home/prefix"), ("write", "home/prefix/secrets")):
        spec[key] = [f"{tmp_path}/{path}"]
        assert tell(tmp_path, port, code=READS, **spec) == dict.fromkeys(look, SHUT)
    around = set(confine._around(f"{tmp_path}/home", {Path(folder), Path(folder).parent / "state"}))
    assert around == {f"{tmp_path}/home/{name}" for name in ("secret", "more", "prefix/models")}
    assert confine._closed(spec) >= {Path(folder), Path(folder).parent / "state", Path("/root")}


def test_python_in_home_is_readable(tmp_path: Path) -> None:
    own = ("bin/python3.12", "lib/python3.12", "lib/libpython3.12.so.1.0", "include/python3.12")
    others = ("share/keyrings", "lib/python3.11", "lib/systemd", "bin/hearth", "include/x")
    for name in (*own, *others):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "env").symlink_to("bin/python3.12")
    assert {str(Path(each).relative_to(tmp_path)) for each in confine._python(str(tmp_path / "env"))} == set(own)
    assert confine._python("/usr/bin/env") == []


X86, ARM = 0xC000003E, 0xC00000B7


def answer(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """A seccomp filter's answer to a call: the error number, 0 if allowed (a classic BPF interpreter)."""
    words = struct.pack("<iIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    held = at = 0
    while True:
        code, yes, no, value = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == confine._RETURN:
            return 0 if value == confine._ALLOW else value & 0xFFFF
        if code == confine._LOAD:
            held = struct.unpack_from("<I", words, value)[0]
        elif code == confine._AND:
            held &= value
        else:
            at += yes if (held == value if code == confine._EQUAL else held >= value) else no


@pytest.mark.parametrize(
    ("x86", "arm", "arguments", "error"),
    [
        (41, 198, (2, 1 | 0o2004000, 6), 0),  # TCP with SOCK_CLOEXEC and SOCK_NONBLOCK
        (41, 198, (2, 1 | 0o2004000, 262), 1),
        (41, 198, (10 | 1 << 32, 2, 0), 0),  # the kernel uses 32 bits of it
        (41, 198, (2, 3, 255), 1),
        (41, 198, (17, 3, 768), 1),
        (53, 199, (1, 1 | 0o2004000, 0), 0),
        (53, 199, (1, 2 | 0o2000000, 0), 1),
        (53, 199, (30, 5, 0), 1),  # AF_TIPC
        (44, 206, (3, 0, 1, 0x4000), 0),  # MSG_NOSIGNAL
        (44, 206, (3, 0, 1, 0x20004000), 1),
        (307, 269, (3, 0, 1, 0x20000000), 1),
        (54, 208, (3, 6, 30), 1),
        (54, 208, (3, 1, 30), 0),
        (56, 220, (0x3D0F00,), 0),  # a thread
        (56, 220, (0x40000011,), 1),
        (435, 435, (), 38),
        (302, 261, (0, 7), 0),
        (302, 261, (77, 7), 1),
        (141, 140, (2, 0, 19), 1),
        (251, 30, (1, 77, 0), 1),
        (62, 129, (77, 9), 0),  # a filter cannot tell whose
        (62, 129, (-1 & 0xFFFFFFFF, 9), 1),
        *((number, number, (), 1) for number in (424, 425, 434, 438, 440, 448)),
        (30, 196, (), 1),
        (101, 117, (), 1),
        (308, 268, (), 1),
        (0, 63, (), 0),  # read
    ],
)
def test_seccomp_filter_covers_both_architectures(
    x86: int, arm: int, arguments: tuple[int, ...], error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine, arch, number in (("x86_64", X86, x86), ("aarch64", ARM, arm)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        program = confine.filtered(udp=True, version=6)
        assert answer(program, arch, number, *arguments) == error
        assert answer(program, X86 + ARM - arch, number, *arguments) == 1
        assert answer(program, 0x40000003, number, *arguments) == 1  # i386
        assert answer(program, arch, 0x40000000 | number, *arguments) == 1  # x32
        assert len(program) < 8 * 4096  # BPF_MAXINSNS


def test_seccomp_blocks_truncation_under_old_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    old, new = (confine.filtered(udp=True, version=version) for version in (2, 3))
    for number, arguments, error in ((76, (0, 0), 1), (2, (0, 0x200), 1), (257, (0, 0, 0x203), 1), (437, (), 38)):
        assert (answer(old, X86, number, *arguments), answer(new, X86, number, *arguments)) == (error, 0)
    assert answer(old, X86, 257, 0, 0, 0x241) == 0  # to write a new file


# --- its supervisor ------------------------------------------------------------------------------------------------

DAEMON = """
import ctypes, os, signal, sys, threading, time
end = time.time() + 60  # also when nothing ends them
for kind in ("fork", "new session", "orphan", "stopped", "without its first thread", "of its own orphans", "deaf"):
    if kind not in sys.argv[3:] and os.fork() == 0:
        if kind != "fork":
            os.setsid()
        if kind != "new session" and os.fork():
            os._exit(0)
        if kind == "of its own orphans":
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
            if os.fork() == 0 and os.fork():
                os._exit(0)
        for each in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP} if kind == "deaf" else ():
            signal.signal(each, signal.SIG_IGN)
        open(f"{sys.argv[1]}/{kind}-{os.getpid()}", "w").close()
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "without its first thread":
            threading.Thread(target=time.sleep, args=(60,)).start()
            ctypes.CDLL(None).pthread_exit(None)
        while time.time() < end:
            time.sleep(0.002 if kind == "of its own orphans" else 1)
            if kind == "of its own orphans" and os.fork():
                os._exit(0)  # it is never the same process for long
        os._exit(0)
time.sleep(1)
print("up", os.getcwd(), flush=True)
os.ftruncate(1, 0) if sys.argv[2] == "empty" else time.sleep(100)
"""


def daemons(place: Path, *what: str) -> Any:
    """A prefix whose ComfyUI leaves processes behind, which record themselves in a folder."""
    site = make(place, port=1)
    (place / "left").mkdir()
    argv = [sys.executable, "-c", DAEMON, str(place / "left"), *what]
    write(site.releases / "one/release.json", json.dumps({"id": "one", "argv": argv, "environment": {}}))
    return site


def alive(place: Path) -> list[str]:
    """The running ones. A process whose main thread has ended looks dead, but its other threads may run."""
    found = []
    for each in (place / "left").iterdir():
        kind, _, pid = each.name.rpartition("-")
        if len(list(Path(f"/proc/{pid}/task").glob("*"))) > 1 or started(int(pid)):
            found.append(kind)
    return found


def marked(place: Path) -> list[str]:
    """All processes that name the folder, including unrecorded ones."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found += [str(each)] * (str(place / "left").encode() in each.read_bytes())
    return found


def test_stopping_the_supervisor_ends_all_processes(tmp_path: Path) -> None:
    site = daemons(tmp_path, "")
    with supervisor(site) as one:
        pid = child(site)
        assert processes.wait_for(lambda: "up" in read_text(supervised.Supervised(site).output), 20)
        assert len(alive(tmp_path)) >= 6
        supervised.Supervised(site).stop()
        assert one.wait(20) == 0
    assert not started(pid)
    assert not alive(tmp_path)
    assert not marked(tmp_path)


def test_processes_end_with_comfyui_and_its_log_is_append_only(tmp_path: Path) -> None:
    site = daemons(tmp_path, "empty")
    with supervisor(site):
        pid = child(site)
        assert processes.wait_for(lambda: not started(pid), 20)
        first = set((tmp_path / "left").iterdir())
        assert processes.wait_for(lambda: "up" in read_text(supervised.Supervised(site).output), 20)
        assert processes.wait_for(lambda: set((tmp_path / "left").iterdir()) > first, 20)  # the next one has started
        pids = [each.name.rpartition("-")[2] for each in first]
        assert not any(started(int(each)) for each in pids)
        assert processes.wait_for(lambda: read_text(supervised.Supervised(site).output).count("up /\n") > 1, 20)
    assert not marked(tmp_path)


@pytest.mark.parametrize("kept", [False, True])
def test_forced_stop_ends_orphans(tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed with its ComfyUI, and a daemon remains; `kept` belongs to a service with a running supervisor."""
    site = daemons(tmp_path, "", "of its own orphans")  # found only as the parent of its dead children
    monkeypatch.setattr(lifecycle, "_processes", lambda _: [int(each.split("/")[2]) for each in marked(tmp_path)])
    release = read(site.releases / "one/release.json")
    spec = {"read": [str(tmp_path), str(files.CHECKOUT)], "write": [str(tmp_path / "left")], "bind": [], "connect": []}
    start = "import sys, json; from agent.serve import confine; confine.main(json.loads(sys.argv[1]), sys.argv[2:])"
    command = [os.path.realpath(sys.executable), *release["argv"][1:]]
    release["argv"] = ["/usr/bin/env", f"PYTHONPATH={files.CHECKOUT}", sys.executable, "-c", start]
    release["argv"] += [json.dumps({**spec, "udp": False}), *command]
    write(site.releases / "one/release.json", json.dumps(release))
    with supervisor(site) as one:
        assert processes.wait_for(lambda: "up" in read_text(supervised.Supervised(site).output), 20)
        with subprocess.Popen(["sleep", "100"], preexec_fn=processes.dies_with_parent()) as other:
            if not kept:
                one.kill()
                one.wait()
            assert alive(tmp_path)
            lifecycle.end_all(site)
            assert bool(marked(tmp_path)) is kept
            assert other.poll() is None
            other.kill()


def test_only_newer_processes_are_ended(tmp_path: Path) -> None:
    code = "import os, subprocess, sys, time; from agent.processes import end_descendants, take_orphans\n"
    code += "words = [sys.executable, '-c', 'import os, time; os.fork() or os.fork(); time.sleep(100)', sys.argv[1]]\n"
    code += "before = subprocess.Popen(words)\ntime.sleep(0.5)\nspared = take_orphans()\n"
    code += "after = subprocess.Popen(words)\ntime.sleep(0.5)\nend_descendants(spared)\n"
    code += "print(before.poll(), after.poll() is not None)\nend_descendants()\n"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "left")], cwd=files.CHECKOUT, capture_output=True)
    assert done.stdout == b"None True\n", done.stderr
    assert not marked(tmp_path)


# --- what the plan says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "confined", "says"),
    [
        (0, True, ["no Landlock"]),
        (6, False, ["not `confined`"]),
        (1, True, ["cannot move", "truncating", "TCP port", "ioctl", "signal other processes of d and"]),
        (2, True, ["truncating", "TCP port", "ioctl", "signal other processes"]),
        (5, True, ["signal other processes"]),
        (6, True, []),
    ],
)
def test_plan_notes_missing_landlock_features(version: int, confined: bool, says: list[str]) -> None:
    facts, target = replace(FRESH, landlock=version), spark(scope="user", confined=confined)
    notes = [each for each in made(facts, target).notes if "Landlock" in each or "confined" in each]
    assert len(notes) == len(says)
    assert all(part in note for part, note in zip(says, notes, strict=True))
    assert plan.unconfined(spark(), facts) == []
    offline = replace(target, profile=msgspec.structs.replace(target.profile, network="offline"))
    assert reasons(made(facts, offline)) == ["network-unenforced"] * (version < 4 or not confined)


def test_no_rule_grants_the_data_folder_itself() -> None:
    """A process with write access there can replace the models by a link."""
    facts = replace(FRESH, prefix="/home/d/comfyui")
    target = spark(scope="user", model_roots=("/srv/models",), folders={"output": "/srv/output"})
    step = next(each for each in made(facts, target).steps if each.kind == "release")
    spec = json.loads(values(step)["release"]["confined"][-2])
    assert spec["write"] == ["/home/d/comfyui/data/*", "/srv/output"]
    assert "/home/d/comfyui/data" not in spec["read"]  # an install.py gets these, too
    assert {"/home/d/comfyui/data/models", "/srv/models"} <= set(spec["read"])
