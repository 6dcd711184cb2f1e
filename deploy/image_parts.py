"""The layers of a container image: the base, the environment in groups that change at different times, ComfyUI, nodes.

Nothing of the target runs here: uv installs the wheels of another platform, and bytecode is the same on all.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from agent.layout import DATA
from agent.schema.manifest import ReleaseManifest
from core import files, lockfile, source, workspace
from core.stack import Platform
from deploy.image_layout import Entry, file, folder, link, tree
from lock import image_base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from core.source import Pinned
    from deploy.selection import Selection

PREFIX = "opt/comfyui"
ENV = f"{PREFIX}/env"
SITE = f"{ENV}/lib/python{{python}}/site-packages"
CONTAINER = f"{PREFIX}/container.py"

_GROUPS = {"cuda": r"nvidia-|cuda-|triton\b", "torch": r"torch(vision|audio)?\b", "packages": ""}
"""The layers of the environment, and what the names of their packages begin with; the first match counts."""

Layer: TypeAlias = "tuple[str, Callable[[], AbstractContextManager[Iterable[Entry]]]]"
"""A layer: a key that names everything that it depends on, and its entries, whose files exist in the context."""


def layers(selection: Selection, manifest: ReleaseManifest) -> dict[str, Layer]:
    """The layers of a release, those that change least first."""
    platform = Platform.parse(selection.lock.platform)
    groups = ["base", *(["compiler"] if selection.target.profile.cuda else [])]
    found = {name: debian(platform, name) for name in groups}
    found |= {name: _packages(platform, selection.python, pinned) for name, pinned in _pinned(selection).items()}
    app = selection.application
    found["app"] = _part(selection.app_part, app, app.writable, "comfyui")
    for name, part in selection.node_parts.items():
        node = selection.nodes[name]
        found[f"node {name}"] = _part(part, node.pinned(name), node.writable, f"nodes/{name}")
    listed = list(_release(selection, manifest))
    found["release"] = (
        repr([(info.name, info.linkname, content) for info, content in listed]),
        lambda: nullcontext(listed),
    )
    return found


def debian(platform: Platform, group: str) -> Layer:
    """A layer of Debian packages, with `/bin`, `/lib` and so on merged into `/usr`."""

    def merged() -> Iterator[Entry]:
        for info, content in tree(image_base.tree(platform, group), ""):
            top = info.name.partition("/")[0]
            if top in _MERGED and group == "base":
                yield link(top, f"usr/{top}")
            info.name = f"usr/{info.name}" if top in _MERGED else info.name
            yield info, content

    return repr(
        (image_base.VERSION, platform.value, group, sorted(image_base.locked(platform, group).items()))
    ), lambda: nullcontext(merged())


_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def _pinned(selection: Selection) -> dict[str, list[str]]:
    """The locked requirements of each layer of the environment; the kernel wheels by their files."""
    blocks = re.split(r"^(?=\w)", selection.lock.select(selection.requesters), flags=re.MULTILINE)[1:]
    found: dict[str, list[str]] = {name: [] for name in _GROUPS}
    for each in blocks:
        found[group(each)].append(re.sub(r" \\\n\s*", " ", each).strip())
    wheels = {wheel: workspace.current().wheelhouse.path(wheel) for wheel in selection.wheels}
    found["kernels"] = [f"{wheel.kernel} @ {at.as_uri()} --hash=sha256:{wheel.sha256}" for wheel, at in wheels.items()]
    return {name: listed for name, listed in found.items() if listed}


def group(requirement: str) -> str:
    """The layer of the environment that a locked requirement belongs to."""
    return next(name for name, pattern in _GROUPS.items() if re.match(pattern, requirement))


def _packages(platform: Platform, python: str, pinned: Sequence[str]) -> Layer:
    """A layer of Python packages."""
    site = SITE.format(python=python)

    @contextmanager
    def entries() -> Iterator[Iterable[Entry]]:
        with _scratch() as installed:
            lockfile.install_into(installed, platform, python, pinned)
            _normalise(installed)
            image_base.compile_all(installed, f"/{site}")
            scripts = tree(installed / "bin", f"{ENV}/bin") if (installed / "bin").is_dir() else ()
            yield itertools.chain(tree(installed, site, lambda inner: inner == "bin"), scripts)

    hashes = [re.sub(r"@ \S+", "", each) for each in pinned]
    return repr((platform.value, python, _compiler(), hashes)), entries


def _compiler() -> list[str]:
    """What compiles the layers' Python: the base's packages for this machine are those for all."""
    return [
        version for name, (version, _) in image_base.locked(Platform.LINUX_X86_64, "base").items() if "python" in name
    ]


def _normalise(installed: Path) -> None:
    """Remove what depends on this machine from packages that uv installed: its interpreter, paths and times.

    Files are replaced, not edited: they are hard links to uv's cache.
    """
    for script in (installed / "bin").glob("*"):
        content = script.read_bytes()
        if content.startswith(b"#!") and b"python" in content[:1000].partition(b"\nimport")[0]:
            fresh = re.sub(rb"\A#!(?:/bin/sh\n'''exec' .*\n' '''|.*)\n", f"#!/{ENV}/bin/python\n".encode(), content)
            files.write(script, fresh)
            script.chmod(0o755)
    for info in installed.glob("*.dist-info"):
        for name in ("direct_url.json", "uv_cache.json"):
            (info / name).unlink(missing_ok=True)
        lines = (info / "RECORD").read_text().splitlines(keepends=True)
        kept = [line for line in lines if not re.match(r'"?bin/|[^,]*/(direct_url|uv_cache)\.json,', line)]
        files.write(info / "RECORD", "".join(sorted(kept)))
    (installed / ".lock").unlink(missing_ok=True)


def _part(part: str, pinned: Pinned, writable: Sequence[str], keeps: str) -> Layer:
    """The layer of a source tree. Its writable paths are links to the data, which gets their defaults at a start."""
    at, names = f"{PREFIX}/parts/{part}", [name.rstrip("/") for name in writable]

    @contextmanager
    def entries() -> Iterator[Iterable[Entry]]:
        with _scratch() as made:
            for name, path in files.tree(source.intact(pinned)):
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, made / name)
                (made / name).chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
            image_base.compile_all(made, f"/{at}")
            yield itertools.chain(tree(made, at, lambda inner: inner in names), replaced(made))

    def replaced(made: Path) -> Iterator[Entry]:
        for name in names:
            yield link(f"{at}/{name}", f"/{PREFIX}/data/{keeps}/{name}")
            shipped = f"{PREFIX}/defaults/{keeps}/{name}"
            if (made / name).is_dir():
                yield from tree(made / name, shipped)
            elif (made / name).exists():
                yield file(shipped, made / name)

    return repr((part, _compiler())), entries


@contextmanager
def _scratch() -> Iterator[Path]:
    """An empty folder for as long as a layer is written: packages are in uv's cache, and have gigabytes."""
    with files.draft(workspace.current().cache / "layers/parts") as made:
        made.mkdir()
        yield made


def _release(selection: Selection, manifest: ReleaseManifest) -> Iterator[Entry]:
    """The release's links and files as on a host, the environment's interpreter, and how the container starts."""
    place, data, user = f"{PREFIX}/releases/{manifest.id}", f"{PREFIX}/data", image_base.USER
    python = f"python{selection.python}"
    for kind, part in manifest.parts.items():
        name = "env" if kind == "env" else f"parts/{part}"
        yield link(f"{place}/{kind}", f"../../{'../' * kind.count('/')}{name}")
    yield from (link(f"{place}/{name}", target) for name, target in manifest.links.items())
    yield from (folder(f"{place}/{name}") for name in manifest.empty or ())
    units = tuple(f"{selection.target.host.service}{end}" for end in (".", "-"))
    running = {name: text for name, text in manifest.files.items() if not name.startswith(units)}
    yield from (file(f"{place}/{name}", text.encode()) for name, text in running.items())
    yield file(f"{place}/release.json", msgspec.json.encode(manifest))
    yield link(f"{PREFIX}/current", f"releases/{manifest.id}")
    yield from (link(f"{ENV}/bin/{name}", f"/usr/bin/{python}") for name in ("python", "python3", python))
    home = f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {selection.python}\n"
    yield file(f"{ENV}/pyvenv.cfg", home.encode())
    yield file(CONTAINER, (files.CHECKOUT / "agent/serve/container.py").read_bytes())
    inside = (target for target in manifest.links.values() if target.startswith(f"/{data}/"))
    kept = {*DATA, *(os.path.relpath(each, f"/{data}") for each in inside if not each.endswith(".list"))}
    folders = sorted({str(each) for path in kept for each in (Path(path), *Path(path).parents)} - {"."})
    settings = {"argv": manifest.argv, "data": f"/{data}", "folders": folders}
    yield file(CONTAINER.replace(".py", ".json"), json.dumps(settings, indent=1).encode())
    # A new volume takes over their owner.
    yield folder(data, user=user)
    yield from (folder(f"{data}/{name}", user=user) for name in folders)
