"""Builds kernel wheels on hosts, as the login user without root, and downloads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shlex
import tarfile
import tempfile
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from core import console, files, lockfile, manifest, version, workspace
from core.arch import known_archs, parse_list
from core.console import counted
from core.errors import (
    BuildError,
    ConfigError,
    GroupError,
    HearthError,
    HostError,
    ProcessError,
    SourceError,
    SupportError,
    UsageError,
)
from core.stack import Platform, find_stack
from core.typed import from_json
from deploy import connection
from deploy.look import find_target
from kernels.recipe import folders

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from core.manifest import Manifest
    from deploy.connection import Ssh

PLACE = ".cache/hearth/workshop"
"""The build folder below the user's home: uv, this checkout, a cache and a wheelhouse."""

CHECKOUT = (
    "tasks.py",
    "pyproject.toml",
    "uv.lock",
    "README.md",
    "agent",
    "core",
    "kernels",
    "lock",
    "deploy",
    "ops",
    "gateway",
    "config",
    "recipes",
)
"""The parts of this checkout that `inv build-kernels` needs."""


def build(name: str, asked: Mapping[str, Any], *, force: bool) -> list[Manifest]:
    """Run `inv build-kernels` on a host and download the wheels into the wheelhouse; returns their manifests.

    `asked` are its flags with their values; True is a flag without one. Raises connection errors, and HostError, also
    for a wheel that was not requested.
    """
    folders()  # raises what the host would report only minutes later
    if asked.get("arch"):
        parse_list(asked["arch"], known_archs())
    target = find_target(name)
    if not target.host.address:
        raise UsageError("usage", f"{name} is this machine", hint="omit --host")
    with connection.connect(target) as agent:
        assert isinstance(agent, connection.Ssh)
        machine = agent.shell("uname -m", console.say).strip()
        platform = Platform.parse(f"linux_{machine}")
        uv = lockfile.install("uv", platform, "3.11") / "bin/uv"
        checkout = _send(agent, uv)
        command = f"cd {checkout} && exec {_environment()} ../uv run --frozen --no-group dev inv build-kernels"
        words = [word for flag, value in asked.items() if value for word in (f"--{flag}", value) if word is not True]
        words += [*(["--force"] if force else []), "--json"]
        said = agent.shell(f"{command} {shlex.join(words)}", console.say)
        # without --arch, the host builds for its own GPUs
        where = asked.get("platform") or ("" if asked.get("arch") else platform.value)
        own = version.own()  # the host has a copy of this checkout without git
        answer = _answer(name, said, {**asked, "platform": where})
        found = [msgspec.structs.replace(each, hearth=own) for each in answer]
        for each in found:
            _fetch(agent, each)
    return found


_OF_THE_BUILD = {*BuildError.kinds, *ConfigError.kinds, *SupportError.kinds, *UsageError.kinds, "patch"}
_OF_THE_BUILD -= {"disk-full", "out-of-memory"}
"""Kinds of errors that a build has on every host. All others are the host's."""


def distribute(
    names: Sequence[str], parts: Sequence[Mapping[str, str]], one: Callable[[str, Mapping[str, str]], list[Manifest]]
) -> list[Manifest]:
    """Build parts of a request on several hosts at once with `one`; each host takes the next part when it is idle.

    A host that is lost or cannot build gets no further part, and another host takes over the part that it had. Raises
    GroupError at the end for all parts that were not built.
    """
    for name in names:
        find_target(name)  # a mistyped name is an error before anything is built
    waiting, idle = deque(range(len(parts))), deque(names)
    running: dict[Future[list[Manifest]], tuple[str, int]] = {}
    found: dict[int, list[Manifest]] = {}
    failed: dict[int, HearthError] = {}
    lost: dict[str, HearthError] = {}
    while running or (waiting and idle):
        while waiting and idle:
            name, part = idle.popleft(), waiting.popleft()
            running[_started(one, name, parts[part])] = name, part
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name, part = running.pop(future)
            try:
                found[part] = future.result()
            except HearthError as error:
                console.say(f"{name}: {_label(parts[part])} failed: error[{_kind(error)}]: {error}")
                if _kind(error) not in _OF_THE_BUILD:
                    waiting.appendleft(part)
                    lost[name] = error
                    continue
                failed[part] = error
            idle.append(name)
            console.say(f"{len(found)} of {counted(len(parts), 'build')} done, {len(running) + len(waiting)} left")
    causes = [f"{_label(parts[part])}: {error.what}" for part, error in failed.items()]
    causes += [f"{_label(parts[part])}: no host is left to build it" for part in waiting]
    causes += [f"{name} built nothing more: {error.what}" for name, error in lost.items()]
    if missing := len(failed) + len(waiting):
        raise GroupError(
            "group",
            f"{missing} of {counted(len(parts), 'build')} failed; the other wheels are in the wheelhouse",
            cause="\n".join(causes),
            hint="read the errors above; the same command continues with the missing builds",
        )
    return [wheel for part in sorted(found) for wheel in found[part]]


def _started(
    one: Callable[[str, Mapping[str, str]], list[Manifest]], name: str, part: Mapping[str, str]
) -> Future[list[Manifest]]:
    """Begin a part on a host, in a daemon thread: Ctrl-C must not wait for it."""
    future: Future[list[Manifest]] = Future()

    def run() -> None:
        with console.speaking(name):
            console.say(f"building {_label(part)}")
            try:
                future.set_result(one(name, part))
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _label(part: Mapping[str, str]) -> str:
    return f"{part['kernel']} for {part['arch']}"


def _kind(error: HearthError) -> str:
    """The kind of an error; for a build that failed on a host, the kind that its own command reported."""
    stderr = error.__cause__.stderr if isinstance(error.__cause__, ProcessError) else ""
    kinds: list[str] = re.findall(r"^error\[([a-z-]+)\]: ", stderr, re.MULTILINE)
    return kinds[-1] if kinds else error.kind


def _environment() -> str:
    recipes = "$PWD/more-recipes" if os.environ.get("HEARTH_RECIPES") else ""
    launcher = shlex.quote(os.environ.get("HEARTH_COMPILER_LAUNCHER", ""))  # its settings are the host's own
    place = f"HEARTH_CACHE=$HOME/.cache/hearth HEARTH_WHEELHOUSE=$PWD/../wheelhouse HEARTH_RECIPES={recipes}"
    return f"env {place} HEARTH_COMPILER_LAUNCHER={launcher}"


def _send(agent: Ssh, uv: Path) -> str:
    """Upload uv and the checkout into folders named by hash, unless they exist; return the checkout's folder."""
    archive = _pack()
    digest = hashlib.sha256(archive).hexdigest()[:16]
    place = f"{PLACE}/checkout-{digest}"
    agent.shell(f"mkdir -p {PLACE}", console.say)
    if agent.shell(f"test -x {PLACE}/uv && sha256sum < {PLACE}/uv || true", console.say)[:64] != files.sha256(uv):
        agent.put(uv.read_bytes(), f"{PLACE}/uv.part")
        agent.shell(f"chmod 755 {PLACE}/uv.part && mv {PLACE}/uv.part {PLACE}/uv", console.say)
    if agent.shell(f"test -d {place} && echo there || true", console.say).strip() != "there":
        agent.put(archive, f"{place}.tar.gz")
        unpack = f"rm -rf {place}.part && mkdir {place}.part && tar -C {place}.part -xzf {place}.tar.gz"
        agent.shell(f"{unpack} && rm {place}.tar.gz && mv {place}.part {place}", console.say)
    old = f"find {PLACE} -maxdepth 1 -name 'checkout-*' -mtime +30"
    agent.shell(f"touch {place} && {old} -exec rm -rf {{}} +", console.say)
    return place


def _pack() -> bytes:
    """Pack the checkout and the folders of $HEARTH_RECIPES into an archive, without the user's hosts.

    The same files give the same bytes: the host has them already.
    """
    buffer = io.BytesIO()
    extra = [Path(each) for each in os.environ.get("HEARTH_RECIPES", "").split(os.pathsep) if each]
    trees = [(files.CHECKOUT / each, each) for each in CHECKOUT]
    recipes = [file.parent for folder in extra for file in sorted(folder.glob("*/recipe.toml"))]
    trees += [(recipe, f"more-recipes/{recipe.name}") for recipe in recipes]

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in info.name or info.name == "config/hosts.toml":
            return None
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, name in trees:
            tar.add(path, name, filter=wanted)
    return gzip.compress(buffer.getvalue(), 6, mtime=0)


LARGEST = 4_000_000_000
"""Maximum size of a wheel, in bytes."""


def _answer(name: str, said: str, asked: Mapping[str, Any]) -> list[Manifest]:
    """The wheels that a host built; raises HostError for one that was not requested: it would replace another one.

    A malicious host can thus falsify only the contents of these wheels.
    """
    try:
        found = from_json(said, list[manifest.Manifest])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise HostError(
            "remote-command", f"the list of wheels from {name} cannot be read", cause=str(error)[:500]
        ) from error
    wrong = [f"{each.file}: {why}" for each in found if (why := _unasked(each, asked))]
    if len({(each.index, each.file) for each in found}) < len(found):
        wrong.append("the list has one of them twice")
    if not asked.get("python") and len({each.python for each in found}) > 1:
        wrong.append("they are for several Python versions; only --python requests that")
    if wrong:
        hint = f"no wheel was fetched; check who else uses this login on {name}"
        raise HostError("remote-command", f"{name} returned wheels that were not requested", cause=wrong[0], hint=hint)
    return found


def _unasked(wheel: Manifest, asked: Mapping[str, Any]) -> str:
    """The properties of a wheel that differ from the request, or from its defaults; empty if none do."""
    known = known_archs()
    try:
        archs = parse_list(wheel.arch, known)
        wanted = parse_list(asked.get("arch") or wheel.arch, known)
        stack = find_stack(wheel.stack)
    except (HearthError, ValueError):
        return f"arch {wheel.arch!r}, stack {wheel.stack!r}"
    usual = known[archs[0].capability]
    # a recipe may need neither the suffix nor PTX
    fitting = {
        str(replace(each, suffix=suffix, ptx=ptx))
        for each in wanted
        for suffix in ("", each.suffix)
        for ptx in (False, each.ptx)
    }
    kernels = _names(asked.get("kernel"))
    expected: dict[str, tuple[object, Sequence[object]]] = {
        "arch": (wheel.arch, [";".join(map(str, archs))] if fitting.issuperset(map(str, archs)) else []),
        "number of archs": (len(archs), [1, len(archs) if asked.get("fat") else 1]),
        "kernel": (wheel.kernel, kernels or [wheel.kernel]),
        "stack": (wheel.stack, [asked.get("stack") or find_stack().name]),
        "torch": (stack.torch if wheel.suits(wheel.python, stack.torch) else wheel.torch, [stack.torch]),
        "python": (wheel.python, ["", *(_names(asked.get("python")) or stack.pythons)]),
        "platform": (wheel.platform, [asked.get("platform") or usual.platform]),
        # kernels without that profile are built with their default
        "profile": (wheel.profile, [(asked.get("profile") if len(kernels) == 1 else "") or wheel.profile]),
    }
    if wrong := [f"{what} {value!r}" for what, (value, right) in expected.items() if value not in right]:
        return ", ".join(wrong)
    version = rf"[0-9a-z.]+\+{re.escape(stack.label if wheel.torch == stack.torch else stack.name)}"
    # the target of an arch may be an older one's, and archs may have one in common
    targets = [f"{arch.major}[0-{arch.minor}]{arch.suffix or '[af]?'}{'[.]ptx' if arch.ptx else ''}" for arch in archs]
    version += rf"([.]sm({'|'.join(targets)})){{1,{len(archs)}}}"
    version += re.escape(f".{wheel.profile}") if wheel.profile else ""
    own = f"cp{wheel.python.replace('.', '')}"
    tags = f"{own}-{own}" if wheel.python else r"(cp3\d+-abi3|py3-none)"
    name = f"{re.sub('[-_.]+', '_', wheel.kernel).lower()}-{wheel.version}"
    file = rf"{re.escape(name)}-{tags}-(many)?linux(_2_\d+)?_{wheel.platform.removeprefix('linux_')}[.]whl"
    if not re.fullmatch(version, wheel.version) or not re.fullmatch(file, wheel.file, re.ASCII):
        return f"its name differs from {name}"
    return "" if 0 < wheel.size <= LARGEST else f"it has {wheel.size} bytes"


def _names(listed: str | None) -> list[str]:
    return [each.strip() for each in (listed or "").split(",") if each.strip()]


def _fetch(agent: Ssh, wheel: Manifest) -> None:
    """Download one wheel into the wheelhouse; reports if it replaces another wheel of the same name."""
    there = workspace.current().wheelhouse.place(wheel)
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        place = Path(folder) / wheel.file
        agent.get(f"{PLACE}/wheelhouse/{wheel.index}/{wheel.file}", place, wheel.size)
        if files.sha256(place) != wheel.sha256:
            raise SourceError(
                "hash-mismatch", f"{wheel.file} was altered in transit", hint="run the same command again"
            )
        if there.is_file() and (old := files.sha256(there)) != wheel.sha256:
            console.say(f"the wheelhouse had another {wheel.file}, now replaced: sha256 {old}, now {wheel.sha256}")
        workspace.current().wheelhouse.admit(place, wheel)
