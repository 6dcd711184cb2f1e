"""Steps that create the trees of ComfyUI and of custom nodes."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import tarfile
from contextlib import suppress
from pathlib import Path

from agent.change.bytecode import compile_part, take_bytecode
from agent.deletion import remove
from agent.files import AgentError, Note, copy, os_error, sha256
from agent.folders import inside, tree
from agent.layout import Layout
from agent.parts import as_service, contents, part
from agent.processes import run
from agent.schema.change import Base, Node, Tool, Tree
from agent.schema.manifest import ReleaseManifest
from agent.serve.sandbox import confined_to, sandboxed


def receive_blob(layout: Layout, digest: str) -> Path:
    """Return the path of an uploaded blob. Raises AgentError if it is missing or damaged."""
    path = layout.incoming / digest
    if not path.exists() or sha256(path) != digest:
        path.unlink(missing_ok=True)
        raise AgentError(
            "step", f"the file {digest[:12]} was damaged during the transfer", "", "run the same command again"
        )
    return path


def tool(layout: Layout, step: Tool, note: Note) -> None:
    """Install the pinned uv for the following steps. Raises AgentError."""
    place = layout.state / "tools" / step.name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = receive_blob(layout, step.blob)
        blob.chmod(0o755)  # copy() keeps the mode
        copy(blob, place)


def base(layout: Layout, step: Base, note: Note) -> None:
    """Create the root file system of containers. Raises AgentError if its Python does not run on this host."""
    with part(layout, step.part) as place:
        for blob in step.blobs:
            _extract(receive_blob(layout, blob), place)
        python = str(place / os.path.relpath(step.python, layout.parts / step.part))
        run([python, "-I", "-S", "-c", "import multiprocessing, pyexpat, zlib"])  # it makes other parts


def app(layout: Layout, step: Tree, note: Note) -> None:
    """Create the application's tree, or another tree without install.py. Raises AgentError."""
    with part(layout, step.part) as place:
        _unpack(layout, step, place)
        take_bytecode(layout, step.part, place)
        compile_part(layout, step.part, place, step.python)
        link_writable(layout, step, place)


def _extract(blob: Path, place: Path) -> None:
    """Unpack an archive of the client's, checked by hash, as it is."""
    with tarfile.open(blob) as archive:
        # The default of Python 3.14 refuses absolute links, such as those of Debian's packages; 3.10 may lack filters.
        archive.extraction_filter = lambda member, _: member
        archive.extractall(place)


def _unpack(layout: Layout, step: Tree, place: Path) -> None:
    """Fill a part with uploaded files and identical files of other parts. Raises AgentError if the result differs."""
    _extract(receive_blob(layout, step.blob), place)
    for name, source in step.reuse.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(layout.parts / source, place / name)
        (place / name).chmod(0o755 if (layout.parts / source).stat().st_mode & 0o100 else 0o644)
    for path in tree(place):
        path.chmod(0o755)
    if contents(place) != step.files:
        raise AgentError("step", f"the tree of {step.part} differs from the plan", "a part was changed")


def node(layout: Layout, step: Node, note: Note) -> None:
    """Create a custom node's tree. Raises AgentError."""
    with part(layout, step.part) as place:
        _unpack(layout, step, place)
        if step.install:
            _install(layout, step, place, note)
        with suppress(AgentError):  # some files are not valid Python; ComfyUI reports nodes that fail to import
            compile_part(layout, step.part, place, step.python)
        link_writable(layout, step, place)


def link_writable(layout: Layout, step: Tree, place: Path) -> None:
    """Replace the tree's writable paths by symlinks into data/, copying the shipped defaults on first use."""
    for name in step.writable:
        own, kept = place / name.rstrip("/"), f"{step.keeps}/{name.rstrip('/')}"
        as_service(layout, copy_defaults, own, layout.data, kept, name.endswith("/"))
        remove(own)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(layout.data / kept)


def copy_defaults(source: Path, data: Path, name: str, folder: bool) -> None:
    """Copy the shipped defaults into the data, or create an empty folder; the node creates files without defaults.

    Follows no links below the data: this process runs outside the service's sandbox.
    """
    parent, _, last = name.rpartition("/")
    with inside(data, parent, make=True) as here:
        place, fresh = here / last, here / f".{last}.{os.getpid()}"
        if os.path.lexists(place):
            return
        remove(fresh)  # a killed run may have had the same pid
        if source.is_dir():
            shutil.copytree(source, fresh, copy_function=shutil.copyfile)
        elif folder:
            fresh.mkdir()
        elif source.exists():
            shutil.copyfile(source, fresh)
        else:
            return
        os.sync()  # it must be complete before the rename, even after a power loss
        fresh.rename(place)


INSTALL_SECONDS = 1800
"""Time limit for an install.py, which may download models."""


# Runs in the sandbox: copies the tree, runs its install.py, writes the files to standard output (see `taken_over`).
_INSTALLER = """
import os, shutil, stat, struct, subprocess, sys
source, place, python = sys.argv[1:]
shutil.copytree(source, place)
done = subprocess.run([python, "install.py"], cwd=place, stdin=subprocess.DEVNULL, stdout=2)
if done.returncode:
    sys.exit(done.returncode % 256)
for folder, _, names in os.walk(os.fsencode(place)):
    for path in [os.path.join(folder, name) for name in names]:
        status = os.lstat(path)
        regular = stat.S_ISREG(status.st_mode)
        content = open(path, "rb").read() if regular else b""
        name = os.path.relpath(path, os.fsencode(place))
        kind = (2 if status.st_mode & 0o100 else 1) if regular else 0
        sys.stdout.buffer.write(struct.pack(">HIB", len(name), len(content), kind) + name + content)
sys.stdout.buffer.write(bytes(7))
"""


def _install(layout: Layout, step: Node, place: Path, note: Note) -> None:
    """Run a node's install.py on a copy of its tree in a sandbox; keep the regular files. Raises AgentError."""
    scratch = layout.state / "install"
    private = layout.scope == "system" or "[Container]" in step.unit
    room = "/tmp" if private else str(scratch)  # noqa: S108  private to the unit or container
    remove(scratch)
    scratch.mkdir(parents=True)
    environment = {**step.environment, **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), room)}
    release = ReleaseManifest(environment=environment, confined=tuple(confined_to(scratch, layout, step)))
    python = str(layout.parts / step.install / "bin/python")
    argv = [step.python, "-I", "-S", "-c", _INSTALLER, str(place), f"{room}/node", python]
    try:
        raw = sandboxed(layout, step.unit, argv, release, seconds=INSTALL_SECONDS, apart=True, network=step.network)
        for inner in list(place.iterdir()):
            remove(inner)
        taken_over(raw, place, note)
    except AgentError as error:
        cause = error.report["cause"] or error.report["what"]
        error.report |= {"what": f"install.py failed: {step.title}", "cause": cause}
        raise
    finally:
        remove(scratch)


TAKEN, DEEP = 100_000, 50
"""Maximum number of files after an install.py, and maximum depth of their folders."""


def taken_over(raw: bytes, place: Path, note: Note) -> None:
    """Write the regular files of an untrusted tree into an empty folder; `note` the skipped ones. Raises AgentError.

    Each entry: name length, content length, kind (0: not a regular file, 1: file, 2: executable), name, content. An
    empty name ends the stream. A custom format avoids the complexity of archive parsers.
    """
    left: list[str] = []
    view, at = memoryview(raw), 0
    try:
        for number in itertools.count():
            length, size, kind = struct.unpack_from(">HIB", view, at)
            content = at + 7 + length
            name, at = os.fsdecode(bytes(view[at + 7 : content])), content + size
            if not name:
                break
            words = name.split("/")
            if at > len(raw) or number >= TAKEN or len(words) > DEEP or not {"", ".", ".."}.isdisjoint(words):
                raise ValueError(f"entry {number}, {name[:200]!r}")
            if not kind:
                left.append(name)
            elif "__pycache__" not in words:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                with (place / name).open("xb") as file:
                    file.write(view[content:at])
                (place / name).chmod(0o755 if kind == 2 else 0o644)
    except (struct.error, ValueError) as error:
        raise AgentError("step", "the files that install.py made are not accepted", str(error)) from error
    except OSError as error:
        raise os_error(error, "the files that install.py made could not be read") from error
    if left:
        note(f"left out, because they are not regular files: {', '.join(left[:10])}")
