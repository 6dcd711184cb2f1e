"""Answers of a build host: it may be shared with others, and the wheelhouse serves all hosts."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from core import console, lockfile, manifest, version, workspace
from core.errors import BuildError, ConnectError, HearthError, HostError, ProcessError
from deploy import connection, remote_build
from tests.errors import raises
from tests.plans import spark, wheel

if TYPE_CHECKING:
    from collections.abc import Iterator

ASKED = {"kernel": "flash-attn", "arch": "12.1", "stack": "", "python": "", "platform": "", "profile": "inference"}
VERSION = "2.8.3.post2+cu130.torch2.14.1.sm121.inference"
ABI3 = VERSION.replace(".torch2.14.1", "")

PLATFORMS = ("manylinux_2_24_x86_64", "musllinux_1_2_aarch64", "manylinux_2_24_aarch64.linux_aarch64", "any")
"""Platform tags that no build for aarch64 has."""


def built(content: bytes = b"wheel", **values: Any) -> manifest.Manifest:
    """A wheel as requested, except for these values."""
    kernel = values.get("kernel", "flash-attn")
    found = wheel(kernel, profile="inference", version=VERSION, sha256=hashlib.sha256(content).hexdigest())
    found = msgspec.structs.replace(found, size=len(content), **values)
    own = f"cp{found.python.replace('.', '')}"
    tag = f"{own}-{own}" if found.python else "cp310-abi3"
    platform = found.platform.replace("linux", "manylinux_2_24")
    name = f"{kernel.replace('-', '_')}-{found.version}-{tag}-{platform}.whl"
    return msgspec.structs.replace(found, file=values.get("file", name))


FAT = built(arch="8.9;12.0", version=VERSION.replace("sm121", "sm89.sm120"))


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run `inv build-kernels` on a host with this answer and content, for another request."""
    monkeypatch.setenv("HEARTH_WHEELHOUSE", str(tmp_path / "house"))

    def run(answer: Any, content: bytes = b"wheel", **asked: Any) -> list[manifest.Manifest]:
        class Host(connection.Ssh):
            def __init__(self) -> None: ...

            def shell(self, command: str, *_: Any) -> str:
                said = answer if isinstance(answer, str) else msgspec.json.encode(answer).decode()
                return "x86_64" if "uname" in command else said

            def _session(self, *_: Any, **__: Any) -> Iterator[bytes]:
                for at in range(0, len(content), 1000):
                    run.taken += 1  # type: ignore[attr-defined]
                    yield content[at : at + 1000]

        @contextmanager
        def connect(*_: Any) -> Iterator[connection.Agent]:
            yield Host()

        monkeypatch.setattr(remote_build, "find_target", lambda _: spark())
        monkeypatch.setattr(connection, "connect", connect)
        monkeypatch.setattr(lockfile, "install", lambda *_: Path("/nowhere"))
        monkeypatch.setattr(remote_build, "_send", lambda *_: "place")
        return remote_build.build("spark", {**ASKED, **asked}, force=False)

    run.taken = 0  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(
    ("wheels", "asked"),
    [
        ([built()], {}),
        ([built(platform="linux_x86_64")], {"kernel": "", "arch": "", "profile": ""}),
        ([built(), built(kernel="sageattention", profile="", version="1+cu130.torch2.14.1.sm121a")],
         {"kernel": "flash-attn, sageattention"}),
        ([built(arch="12.1+PTX", version=VERSION.replace(".inf", ".ptx.inf"))], {"arch": "9.0;12.1+PTX"}),
        ([built(python="3.11"), built(python="3.12")], {"python": "3.12,3.11"}),
        ([built(python="3.11")], {}),
        ([built(arch="12.1a", version=VERSION.replace("121", "121a"))], {"arch": "12.1a"}),
        ([built()], {"arch": "12.1+PTX"}),  # the recipe's target has no PTX
        ([built(arch=each, version=VERSION.replace("121", each.replace(".", "")), platform="linux_x86_64")
          for each in ("12.0", "12.1")], {"arch": ""}),
        ([FAT], {"arch": "12.0 8.9", "fat": True, "platform": "linux_aarch64"}),
        ([built(file=f"flash_attn-{VERSION}-cp312-cp312-linux_aarch64.whl")], {}),
        ([built(version=VERSION.replace("121", "120f"))], {}),  # the recipe's target is an older one's
        ([built(arch=each, version=VERSION.replace("121", "120f")) for each in ("12.0", "12.1")],
         {"arch": "12.0;12.1", "platform": "linux_aarch64"}),
        ([built(arch="12.0;12.1", version=VERSION.replace("121", "120f"))],
         {"arch": "12.0;12.1", "platform": "linux_aarch64", "fat": True}),
        ([built(python="", torch=">=2.9", version=ABI3)], {"python": "3.13"}),
        ([], {}),
    ],
)  # fmt: skip
def test_requested_wheels_are_admitted(build: Any, wheels: list[manifest.Manifest], asked: dict[str, Any]) -> None:
    own = version.own()
    assert build(wheels, **asked) == [msgspec.structs.replace(each, hearth=own) for each in wheels]
    assert [each.file for each in workspace.current().wheelhouse.wheels()] == sorted(each.file for each in wheels)


@pytest.mark.parametrize(
    ("wheels", "asked"),
    [
        ([built(kernel="sageattention")], {}),
        ([built(arch="9.0", version=VERSION.replace("121", "90"))], {}),
        ([built(python="3.11"), built()], {}),
        ([built(python="3.10")], {}),
        ([built(arch="12.1a", version=VERSION.replace("121", "121a"))], {}),
        ([FAT], {"arch": "8.9;12.0", "platform": "linux_aarch64"}),
        ([FAT], {"arch": "8.9", "fat": True, "platform": "linux_aarch64"}),
        ([msgspec.structs.replace(FAT, arch="12.0;8.9")],
         {"arch": "8.9;12.0", "fat": True, "platform": "linux_aarch64"}),
        ([built(arch="sm_121a")], {}),
        ([built(arch="12.1a")], {}),
        ([built(arch="12.1", version=VERSION.replace("121", "90"))], {}),
        ([built(arch="12.1", version=VERSION.replace("121", "122"))], {}),
        ([built(arch="12.1", version=VERSION.replace("sm121", "sm120.sm121"))], {}),
        ([built(stack="cu124", torch="2.6.0", version=VERSION.replace("130.torch2.14.1", "124.torch2.6.0"))], {}),
        ([built(stack="x")], {}),
        ([built(torch="9", version=VERSION.replace("2.14.1", "9"))], {}),
        ([built(python="", torch=">=2.15", version=ABI3)], {}),
        ([built(python="", torch=">=2.9,x", version=ABI3)], {}),
        ([built(python="", torch=">=2.9")], {}),
        ([built(python="", torch=">=2.9", version=ABI3, file=f"flash_attn-{ABI3}-cp310-abi3-linux_x86_64.whl")], {}),
        ([built(python="3.12")], {"python": "3.11"}),
        ([built(platform="linux_x86_64")], {}),
        ([built()], {"arch": ""}),
        ([built(profile="full", version=VERSION.replace("inference", "full"))], {}),
        ([built(profile="full")], {"profile": ""}),
        ([built(file="sageattention-2.2.0+cu130.torch2.14.1.sm90a-cp312-cp312-linux_x86_64.whl")], {}),
        ([built(file="flash_attn.whl")], {}),
        *(([built(file=f"flash_attn-{VERSION}-cp312-cp312-{platform}.whl")], {}) for platform in PLATFORMS),
        ([built(version="1+x")], {}),
        ([built(), built()], {}),
        ([built(), built(kernel="sageattention")], {}),
        ([msgspec.structs.replace(built(), size=10**13)], {}),
        ([msgspec.structs.replace(built(), size=-1)], {}),
    ],
)  # fmt: skip
def test_unrequested_wheels_are_refused(build: Any, wheels: list[manifest.Manifest], asked: dict[str, Any]) -> None:
    workspace.current().wheelhouse.folder.mkdir()
    for each in wheels:
        (workspace.current().wheelhouse.folder / each.file).write_bytes(b"good")
    with raises("remote-command", match="spark returned wheels that were not requested"):
        build(wheels, **asked)
    assert {path.read_bytes() for path in workspace.current().wheelhouse.folder.iterdir()} == {b"good"}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "nonsense",
        "{}",
        "[{}]",
        "[" * 10**5,
        "\udc80",
        json.dumps([{**msgspec.to_builtins(built()), "file": "../x.whl"}]),
        json.dumps([{**msgspec.to_builtins(built()), "stack": "../x"}]),
    ],
    ids=lambda value: value[:10].encode(errors="replace").decode(),
)
def test_invalid_answer_is_an_error(build: Any, answer: str) -> None:
    with raises("remote-command", match="the list of wheels from spark cannot be read"):
        build(answer)


def test_altered_wheel_is_refused_and_size_is_limited(build: Any) -> None:
    for content in (b"whee", b"Wheel"):
        with raises("hash-mismatch", match="was altered in transit"):
            build([built()], content)
    before = build.taken
    with raises("hash-mismatch", match=r"more than the 5 bytes of .* were sent"):
        build([built()], b"x" * 10**7)
    assert build.taken - before == 1
    assert not workspace.current().wheelhouse.folder.exists()


def test_replaced_wheel_is_reported(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    for content in (b"old", b"old", b"new"):
        assert not [line for line in said if "replaced" in line]
        build([built(content)], content)
    (told,) = said
    assert hashlib.sha256(b"old").hexdigest() in told
    assert hashlib.sha256(b"new").hexdigest() in told


def test_invalid_arch_is_refused_before_connecting(build: Any) -> None:
    with raises("arch", match="'sm_121a' is not a compute capability"):
        build([], arch="sm_121a")


def test_a_folder_without_recipes_is_refused_before_connecting(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path))
    with raises("usage", match=str(tmp_path)):
        build([], arch="8.9")


def test_the_same_checkout_is_the_same_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = remote_build._pack()
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert remote_build._pack() == packed


# --- several hosts ----------------------------------------------------------------------------------------------------

PARTS = [{"kernel": "sageattention", "arch": arch} for arch in ("8.9", "9.0", "12.0", "12.1")]


def failed_there(kind: str) -> HostError:
    """The error for a build command that reported this kind on its host."""
    error, process = HostError("remote-command", "a command on a ended with 1"), ProcessError("process", "ssh")
    process.stderr = f"compiling\nerror[{kind}]: what happened\n  next:  this"
    error.__cause__ = process
    return error


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Distribute PARTS over hosts a and b: `fail(host, arch)` returns an error or None; what each built, in order."""
    monkeypatch.setattr(remote_build, "find_target", lambda _: spark())

    def run(fail: Any, names: tuple[str, ...] = ("a", "b")) -> tuple[list[str], HearthError | None]:
        run.built = {name: [] for name in names}  # type: ignore[attr-defined]

        def one(name: str, part: Any) -> list[manifest.Manifest]:
            if error := fail(name, part["arch"]):
                raise error
            run.built[name].append(part["arch"])  # type: ignore[attr-defined]
            return [built(arch=part["arch"])]

        try:
            return [each.arch for each in remote_build.distribute(names, PARTS, one)], None
        except HearthError as error:
            return [], error

    return run


def test_hosts_build_at_once_and_each_build_once(hosts: Any) -> None:
    both = threading.Barrier(2, timeout=20)
    found, error = hosts(lambda *_: both.wait() and None)
    assert error is None
    assert found == ["8.9", "9.0", "12.0", "12.1"]
    assert sorted(hosts.built["a"] + hosts.built["b"]) == sorted(found)
    assert min(map(len, hosts.built.values())) == 2


@pytest.mark.parametrize(
    "error",
    [
        ConnectError("unreachable", "the connection to a was lost"),
        HostError("remote-command", "a command on a ended with 127"),
        failed_there("compiler-missing"),
        failed_there("out-of-memory"),
        failed_there("disk-full"),
    ],
    ids=str,
)
def test_another_host_takes_over_from_one_that_cannot_build(
    hosts: Any, error: HearthError, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = threading.Event()  # b has built everything else, and has nothing to do

    def fail(name: str, arch: str) -> HearthError | None:
        if name == "a":
            assert idle.wait(20)
            return error
        if arch == "12.1":
            threading.Timer(0.2, idle.set).start()
        return None

    found, failure = hosts(fail)
    assert failure is None
    assert found == ["8.9", "9.0", "12.0", "12.1"]
    assert hosts.built == {"a": [], "b": ["9.0", "12.0", "12.1", "8.9"]}
    assert "a: sageattention for 8.9 failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [failed_there("compile"), failed_there("patch"), failed_there("recipe-support"), BuildError("several", "")]
)
def test_a_build_that_fails_on_its_own_stops_no_other(hosts: Any, error: HearthError) -> None:
    _, failure = hosts(lambda _, arch: error if arch == "9.0" else None)
    assert failure.kind == "group"
    assert [line.partition(":")[0] for line in failure.cause.splitlines()] == ["sageattention for 9.0"]
    assert sorted(hosts.built["a"] + hosts.built["b"]) == ["12.0", "12.1", "8.9"]


def test_builds_without_a_host_are_reported(hosts: Any) -> None:
    gone = ConnectError("unreachable", "gone")
    _, failure = hosts(lambda name, arch: None if (name, arch) == ("b", "9.0") else gone)
    assert failure.kind == "group"
    missing = {each["arch"] for each in PARTS} - {"9.0"}
    assert {line.split()[2].rstrip(":") for line in failure.cause.splitlines() if "no host" in line} == missing
    assert {line.split()[0] for line in failure.cause.splitlines() if "gone" in line} == {"a", "b"}


def test_an_unknown_host_is_refused_before_anything_is_built(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, failure = hosts(lambda *_: None, ("local", "nowhere"))
    assert failure.kind == "unknown-name"
    assert hosts.built == {"local": [], "nowhere": []}
