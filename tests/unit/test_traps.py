"""Traps that a hostile service may leave among its files for root or a deploy: links, pipes, deep trees."""

from __future__ import annotations

import lzma
import os
import socket
import sqlite3
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import parts, requester
from agent.change import database, folders, trees, trial
from agent.deletion import remove
from agent.files import AgentError, Json
from agent.layout import DATA, PROOF, UNUSED, Layout
from agent.look import mps, ports, storage, survey
from agent.processes import end_descendants
from agent.schema.change import Folders
from agent.serve import health, sandbox
from deploy import refusals
from tests.plans import FRESH, RUNNING, spark
from tests.unit.test_agent import at, make
from tests.unit.test_agent_files import deep, mode

pytestmark = pytest.mark.process


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    place = tmp_path / "home/notes"
    place.parent.mkdir(mode=0o755)
    place.write_text("private")
    return place


def link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def listening(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(str(path))


def folder(path: Path, _: Path) -> None:
    path.mkdir()


TRAPS = [link, pipe, listening, folder]


@pytest.mark.parametrize("trap", TRAPS)
def test_only_a_database_of_regular_files_is_copied(
    tmp_path: Path, secret: Path, trap: Callable[[Path, Path], None]
) -> None:
    user, kept, scratch = tmp_path / "user", tmp_path / "kept", tmp_path / "scratch"
    for each in (user, kept, scratch):
        each.mkdir()
    (user / "comfyui.db").write_text("database")
    trap(user / "comfyui.db-wal", secret)
    trap(user / "comfyui.db-x", secret)
    database.reserve(user, kept)
    database.take_snapshot(user, kept)
    assert [path.name for path in kept.iterdir()] == ["comfyui.db"]
    remove(user / "comfyui.db")
    trap(user / "comfyui.db", secret)
    trap(user / ".comfyui.db.7", secret)
    database.restore(kept, user)
    assert (user / "comfyui.db").read_text() == "database"
    assert secret.read_text() == "private"


def test_oversized_database_is_reported_before_the_stop(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with (tmp_path / "comfyui.db").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(AgentError, match="more than ComfyUI's database can have"):
        database.reserve(tmp_path, tmp_path / "kept")


@pytest.mark.parametrize("trap", TRAPS)
def test_trial_gets_node_data_only(tmp_path: Path, secret: Path, trap: Callable[[Path, Path], None]) -> None:
    data, scratch = tmp_path / "data", tmp_path / "scratch"
    (data / "nodes/one").mkdir(parents=True)
    (data / "nodes/one/settings").write_text("mine")
    trap(data / "nodes/one/trap", secret)
    if trap is link:
        deep(data / "nodes/labyrinth", 1400)
    scratch.mkdir()
    trial._fill(data, scratch, None, data / "user")
    assert (scratch / "nodes/one/settings").read_text() == "mine"
    assert not [path for path in (scratch / "nodes/one").iterdir() if path.name == "trap" and not path.is_dir()]
    remove(data)
    remove(scratch)


NOBODY = 65534


@pytest.fixture
def served() -> Iterator[Layout]:
    """A layout owned by root, whose service runs as nobody."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        layout = at(Path(place))
        layout.user = "nobody"
        for each in ("", "home", "data", "data/output", "scratch"):
            (layout.prefix / each).mkdir(exist_ok=True)
            (layout.prefix / each).chmod(0o755)
        for each in ("data", "data/output", "scratch"):
            os.chown(layout.prefix / each, NOBODY, NOBODY)
        for name in ("comfyui.db", "notes"):
            (layout.prefix / "home" / name).write_text("private")
        yield layout
        remove(layout.prefix / "data")


def _give(place: Path, user: int) -> None:
    os.chown(place, user, user, follow_symlinks=False)


@pytest.mark.parametrize("work", [database.reserve, database.take_snapshot, trial._copy_live])
@pytest.mark.needs("root")
def test_service_link_to_another_database_is_refused(served: Layout, work: Callable[..., None]) -> None:
    user, kept = served.data / "user", served.prefix / "scratch"
    copy = kept / "comfyui.db" if work is trial._copy_live else kept
    for name in ("user", "user/comfyui.db"):  # the folder, and the file
        place = served.data / name
        place.symlink_to(served.prefix / "home" / name.removeprefix("user").strip("/"))
        _give(place, NOBODY)
        if name == "user":
            with pytest.raises(OSError, match="user in its path is a link of the service user"):
                parts.as_service(served, work, user, copy)
            assert list(storage.traps(served).values()) == [
                "is not accepted: user in its path is a link of the service user"
            ]
            place.unlink()
            user.mkdir()
            _give(user, NOBODY)
        else:
            parts.as_service(served, work, user, copy)
    assert not list(kept.iterdir())
    with pytest.raises(OSError, match="user in its path is a link of the service user"):
        remove(user)
        user.symlink_to(served.prefix / "home")
        _give(user, NOBODY)
        parts.as_service(served, database.restore, kept, user)
    assert (served.prefix / "home/comfyui.db").read_text() == "private"


@pytest.mark.needs("root")
def test_operators_link_is_followed(served: Layout) -> None:
    (served.data / "user").symlink_to("../home")
    parts.as_service(served, database.take_snapshot, served.data / "user", served.prefix / "scratch")
    assert (served.prefix / "scratch/comfyui.db").read_text() == "private"
    assert storage.traps(served) == {}


@pytest.mark.parametrize("name", ["nodes", "nodes/pack", "comfyui"])
@pytest.mark.needs("root")
def test_links_below_data_are_not_followed(served: Layout, name: str) -> None:
    for each in ("home", "home/deeper"):
        (served.prefix / each).mkdir(exist_ok=True)
        (served.prefix / each).chmod(0o777)
    place = served.data / name
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(served.prefix / "home")
    parts.as_service(
        served, trial._fill, served.data, served.prefix / "scratch", served.data / "models", served.data / "user"
    )
    found = {path.name for path in (served.prefix / "scratch").rglob("*")}
    assert not found & {"notes", "comfyui.db", "deeper"}
    with pytest.raises(OSError):  # a link, or not a folder
        parts.as_service(served, trees.copy_defaults, served.prefix, served.data, f"{name}/deeper/it", True)
    assert len(list((served.prefix / "home").iterdir())) == 3
    assert not list((served.prefix / "home/deeper").iterdir())


@pytest.mark.needs("root")
def test_database_is_parsed_without_privileges(served: Layout) -> None:
    code = "import os; os.kill(int(input()), 9)"
    words = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "/usr/bin/python3", "-ISc", code]
    service = subprocess.Popen(words, stdin=-1, stderr=-1)

    def work() -> list[object]:
        parts.drop_root()
        said = service.communicate(f"{os.getpid()}\n".encode())[1]
        return [0 in (*os.getresuid(), *os.getresgid()), os.geteuid() == NOBODY, b"PermissionError" in said]

    def attack() -> None:
        os.kill(os.getpid(), 9)

    made = sqlite3.connect(served.data / "comfyui.db")
    made.execute("CREATE TABLE one (x)")
    made.close()
    parts.as_service(served, trial._copy_live, served.data, served.prefix / "scratch/comfyui.db")
    assert b"TABLE one" in (served.prefix / "scratch/comfyui.db").read_bytes()
    with service:
        assert parts.as_service(served, work) == [False, True, True]
    with pytest.raises(AgentError, match="attack was ended") as raised:
        parts.as_service(served, attack)
    assert raised.value.report["cause"].startswith("by signal 9, sent by the kernel")


@pytest.mark.parametrize("mode_before", [0o4755, 0o6777, 0o1640])
def test_copies_drop_setuid_bits(tmp_path: Path, mode_before: int) -> None:
    """A member may leave a setuid file, and the copy would be the service's."""
    (tmp_path / "comfyui.db").touch()
    (tmp_path / "comfyui.db").chmod(mode_before)
    (tmp_path / "kept").mkdir()
    database.take_snapshot(tmp_path, tmp_path / "kept")
    assert mode(tmp_path / "kept/comfyui.db") == mode_before & 0o777


def test_trial_copy_is_limited_in_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SMALL_ONES", 50_000)
    (tmp_path / "data/nodes").mkdir(parents=True)
    for number in range(100):
        (tmp_path / f"data/nodes/{number}").write_bytes(bytes(1000))
    trial._fill(tmp_path / "data", tmp_path / "scratch", None, tmp_path / "data/user")
    assert sum(path.stat().st_size for path in (tmp_path / "scratch/nodes").iterdir()) < 50_000


@pytest.mark.parametrize("levels", [1400])
def test_deeply_nested_proof_folder_is_deleted(tmp_path: Path, levels: int) -> None:
    layout, notes = at(tmp_path), list[str]()
    (tmp_path / "data/output").mkdir(parents=True)
    deep(tmp_path / "data/output" / PROOF, levels)
    health.clearer(layout, notes.append)()
    assert list((tmp_path / "data/output").iterdir()) == []
    assert notes == []


def test_a_link_in_the_place_of_the_output_is_not_followed_by_root(tmp_path: Path, secret: Path) -> None:
    """S13: root's folder cannot be changed as the service's user, which in this test is the current user."""
    (secret.parent / PROOF).mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/output").mkdir()
    (tmp_path / "data/output" / PROOF).symlink_to(secret.parent)
    health.clearer(at(tmp_path), lambda _: None)()
    assert secret.exists()
    assert not os.path.lexists(tmp_path / "data/output" / PROOF)


def test_work_as_the_service_has_a_time_limit(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AgentError, match="did not end within 1 s"):
        parts.as_service(at(tmp_path), lambda: time.sleep(60), seconds=1)
    assert time.monotonic() - began < 30


@pytest.mark.needs("root")
def test_the_service_cannot_stop_what_root_does_as_it() -> None:
    """A process that shares only the effective user must not be signalled, traced or inspected by that user's."""
    layout = Layout(
        {"prefix": "/nowhere", "service": "s", "scope": "system", "user": "nobody", "address": "", "port": 1}
    )

    def work() -> list[str]:
        assert os.geteuid() == layout.owner()[0]
        code = f"""
import os
told = []
root = "/proc/{os.getpid()}/root"
for name, act in (("signal", lambda: os.kill({os.getpid()}, 0)), ("look", lambda: os.listdir(root))):
    try:
        act()
        told.append(name)
    except PermissionError:
        pass
print(" ".join(told))
"""
        words = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "/usr/bin/python3", "-c", code]
        os.seteuid(0)  # to start another user's process
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert parts.as_service(layout, work) == []


def test_unused_custom_nodes_are_reported(tmp_path: Path) -> None:
    layout = at(tmp_path)
    layout.prefix.mkdir(exist_ok=True)
    folders.folders(layout, Folders("t", "w", "u"), lambda _: None)
    assert all((layout.data / name).is_dir() for name in DATA)
    assert mode(layout.data / UNUSED) == 0o555
    assert storage.unused(layout) == []
    (layout.data / UNUSED).rmdir()
    (layout.data / UNUSED).mkdir()
    (layout.data / UNUSED / "evil.py").touch()
    assert storage.unused(layout) == ["evil.py"]
    (layout.data / UNUSED / "evil.py").unlink()
    (layout.data / UNUSED).rmdir()
    os.mkfifo(layout.data / UNUSED)
    assert storage.unused(layout)


def left(*entries: tuple[str, bytes, int]) -> bytes:
    """The archive of an install.py's tree."""
    packed = [struct.pack(">HIB", len(name.encode()), len(content), kind) for name, content, kind in entries]
    whole = [head + name.encode() + content for head, (name, content, _) in zip(packed, entries, strict=True)]
    return b"".join(whole) + bytes(7)


def compressed() -> bytes:
    return lzma.compress(bytes(10_000_000), preset=0)


@pytest.mark.parametrize(
    "raw",
    [
        *(left((name, b"", 1)) for name in ("/etc/x", "a/../../x", ".", "a/.", "..", "a//b", "x" * 300, "a\0b")),
        left(("/".join("d" * 1500), b"", 1)),
        left(*[("/".join("d" * 60), b"", 1)]),
        left(("a", b"", 1), ("a/b", b"", 1)),
        left(("a/b", b"", 1), ("a", b"", 1)),
        left(("a", b"1", 1), ("a", b"2", 1)),
        left(*[(f"{number}", b"", 1) for number in range(101)]),
        left(("a", b"1", 1))[:-1],
        b"",
        bytes(6),
        struct.pack(">HIB", 1, 0xFFFFFFFF, 1) + b"a" + bytes(100),
        compressed(),
        b"\xff" * 10_000,
    ],
)
def test_install_script_output_is_validated(tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "TAKEN", 100)
    (tmp_path / "place").mkdir()
    with pytest.raises(AgentError, match=r"files that install\.py made"):
        trees.taken_over(raw, tmp_path / "place", print)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert sum(path.stat().st_size for path in (tmp_path / "place").rglob("*") if path.is_file()) < 10


def test_install_script_output_is_written_as_plain_files(tmp_path: Path) -> None:
    said: list[str] = []
    entries = (("a/b", b"1", 1), ("tool", b"", 2), ("link", b"", 0), ("__pycache__/x", b"", 1), ("a/\u00fc", b"2", 7))
    trees.taken_over(left(*entries), tmp_path, said.append)
    found = {str(path.relative_to(tmp_path)): mode(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a/b": 0o644, "tool": 0o755, "a/\u00fc": 0o644}
    assert said == ["left out, because they are not regular files: link"]


@pytest.mark.parametrize("name", ["evil.pth", "distutils-precedence.pth"])
def test_no_code_of_a_package_runs_while_an_environment_is_made(tmp_path: Path, name: str) -> None:
    """A .pth file in site-packages runs at each start of that environment's Python, which root must not start."""
    proof = tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(proof)!r}).touch()\n"
    place = make(tmp_path, {name: code, "one.py": code}, {"two.py": code, "sitecustomize.py": code})
    assert list(place.glob(f"lib/*/site-packages/{name}"))
    assert list(place.glob("lib/*/site-packages/__pycache__/one.*.pyc"))
    assert not proof.exists()


def test_requester_comes_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the client's variables."""
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "nobody-here")
    told: Json = requester.asker("anna@laptop")
    assert not told["who"].startswith("nobody-here")
    code = "import sys; sys.path.insert(0, '.'); from agent.requester import asker; print(asker('anna@laptop')['who'])"
    env = {"PATH": "/usr/bin:/bin", "SSH_CONNECTION": "192.0.2.7 4711 192.0.2.1 22"}
    python = os.path.realpath("/proc/self/exe")
    said = subprocess.run([python, "-S", "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("from 192.0.2.7 (says anna@laptop)")


# --- what processes say of themselves ------------------------------------------------------------------------------

BOUNDLESS = """
import ctypes, socket, struct, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.sbrk.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
size = 1 << 33
start = libc.mmap(None, size, 1, 0x4022, -1, 0)  # PROT_READ; MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
stat = [int(each) for each in open("/proc/self/stat").read().rpartition(")")[2].split()[1:]]
code, data, ends = stat[22:24], stat[41:43], [start, start + size] * 2
said = struct.pack("<11QQIi", *code, *data, stat[43], libc.sbrk(ctypes.c_long(0)), stat[24], *ends, 0, 0, -1)
place = socket.create_server(("127.0.0.1", 0))
print(libc.prctl(35, 14, said, ctypes.c_ulong(len(said)), 0), place.getsockname()[1], flush=True)  # PR_SET_MM_MAP
time.sleep(60)
"""


def test_command_lines_are_limited() -> None:
    """A command line and variables of 8 GB, which the kernel reads from wherever a process declares them."""
    words = ["/usr/bin/python3", "-ISc", BOUNDLESS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            done, port = process.stdout.readline().split()
            assert done == "0"
            assert ports.port_holder(int(port))["pid"] == process.pid
            assert len(mps._environment(process.pid)) < 300_000
            assert process.pid not in [each["pid"] for each in survey.all_processes()]
        finally:
            process.kill()


def test_port_holder_search_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
        assert ports.port_holder(port)["pid"] == os.getpid()
        monkeypatch.setattr(ports, "HOLDER_SECONDS", 0)
        found = ports.port_holder(port)
        assert found["pid"] == -1
        assert found["command"].startswith("a process of ")
        for each in files:
            os.close(each)
    facts_now = replace(FRESH, port_holder=found, service=RUNNING)
    (refusal,) = refusals.port(spark(), facts_now)
    assert (refusal.kind, "search timed out" in refusal.what) == ("port-taken", True)


def test_misbehaving_mps_daemon_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "control"
    for script, answer in (("cat", ["ask"]), ("exec yes", None), ("sleep 60", None), ("exit 3", None)):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(mps, "SECONDS", 20 if answer else 0.5)
        began = time.monotonic()
        if answer:
            assert mps._said(str(program), "ask", "", at(tmp_path)) == answer
        else:
            with pytest.raises(AgentError, match="does not answer"):
                mps._said(str(program), "ask", "", at(tmp_path))
        assert time.monotonic() - began < 20


def test_late_command_does_not_affect_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed command's status used to be lost while the last one's descendants were ended."""

    def slowly(spared: set[int]) -> None:
        time.sleep(0.3 if threading.current_thread() is not threading.main_thread() else 0)
        end_descendants(spared)

    monkeypatch.setattr(sandbox, "end_descendants", slowly)
    for _ in range(3):
        with pytest.raises(AgentError, match="did not end"):
            sandbox._output(["/bin/sleep", "60"], {}, 0.1, 100)
        with pytest.raises(AgentError, match="ended with 3"):
            sandbox._output(["/bin/sh", "-c", "sleep 0.4; exit 3"], {}, 9, 100)


@pytest.mark.needs("root")
def test_members_can_change_data_but_no_code(tmp_path: Path) -> None:
    """Caches of compiled code, nodes' own files and the interface's extensions belong to the service alone."""
    data = tmp_path / "data"
    for name in ("models/a", "user/default/workflows", "user/__manager", "cache/hub", "nodes/x", "comfyui/web"):
        (data / name).mkdir(parents=True)
        (data / name / "file").touch(0o664)
        (data / name).chmod(0o2770)
    assert folders.share_folders(data, [], 12345, 0o750)
    theirs = {str(each.relative_to(data)) for each in data.rglob("*") if each.is_dir() and each.stat().st_mode & 0o020}
    assert theirs == {"models", "models/a", "input", "output", "user/default", "user/default/workflows"}
    assert all(each.stat().st_gid == 12345 for each in (data, data / "user", data / "user/default/workflows/file"))
    assert not {"cache/hub", "user/__manager"} & {
        str(each.relative_to(data)) for each in data.rglob("*") if each.stat().st_gid == 12345
    }
