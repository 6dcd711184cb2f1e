"""Proofs: the workflows that a host's releases must run, read from its `[[prove]]` tables and their files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from agent.schema.change import COMPARED, Proof
from core import files, workspace
from core.console import counted
from core.errors import ConfigError
from lock import workflows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from deploy.host import Target
    from deploy.profile import Prove

WORKFLOW, REFERENCE, TOTAL = 2_000_000, 8_000_000, 24_000_000
"""Maximum bytes of a workflow, of a reference picture, and of all of a host's, which travel in the plan."""

PICTURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)

_UNITS = {"M": 10**6, "G": 10**9}


def read(target: Target) -> tuple[Proof, ...]:
    """The proofs of a host and its profile, with the contents of their files. Raises ConfigError."""
    found = tuple(_proof(f"{target.name}: prove {each.file}", each) for each in target.profile.prove)
    names = [each.name for each in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("config", f"{target.name}: prove names {twice[0]} twice", hint="remove one of them")
    if (size := sum(len(json.dumps(each.workflow)) + len(each.like) for each in found)) > TOTAL:
        raise ConfigError(
            "config",
            f"{target.name}: the workflows and pictures of prove have {size / 1e6:.0f} MB",
            cause=f"at most {TOTAL / 1e6:.0f} MB are sent with a plan",
            hint="use smaller reference pictures, such as JPEG",
        )
    return found


def _proof(place: str, prove: Prove) -> Proof:
    size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})|", prove.size)
    memory = re.fullmatch(r"([1-9]\d{0,5})([MG])|", prove.memory)
    rules = [
        (1 <= prove.seconds <= 86_400, "seconds", "use 1 to 86400"),
        (prove.images is None or 0 <= prove.images <= 1000, "images", "use 0 to 1000"),
        (size, "size", 'use a size such as "1024x1024"'),
        (0 <= prove.within <= 1, "within", "use 0 (equal) to 1"),
        (memory, "memory", 'use a size such as "24G"'),
    ]
    for good, key, hint in rules:
        if not good:
            raise ConfigError("config", f"{place}: {key} = {getattr(prove, key)!r}", hint=hint)
    assert size
    assert memory
    return Proof(
        name=prove.file,
        workflow=workflows.read_api(_found(place, prove.file, WORKFLOW)),
        seconds=prove.seconds,
        images=-1 if prove.images is None else prove.images,
        size=(int(size[1]), int(size[2])) if size[1] else (),
        like=base64.b64encode(_picture(place, prove.like)).decode() if prove.like else "",
        within=prove.within,
        memory=int(memory[1]) * _UNITS[memory[2]] if memory[1] else 0,
    )


def bundled(target: Target) -> dict[str, Path]:
    """The files of a target's proofs, by their names in a bundle's checkout. Raises ConfigError."""
    names = {name for each in target.profile.prove for name in (each.file, each.like) if name}
    return {_in_bundle(name): _found(f"{target.name}: prove", name, REFERENCE) for name in sorted(names)}


def _in_bundle(name: str) -> str:
    """Where a bundle's checkout has a file that may be anywhere on the machine that made it."""
    return f"proofs/{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _found(place: str, name: str, limit: int) -> Path:
    """A file of the open bundle, or else one in `config/workflows/` or relative to the checkout."""
    here, own = workspace.current(), files.CHECKOUT
    places = [here.checkout / _in_bundle(name)] if here.bundled else []
    places += [top / folder / name for top in (here.checkout, own) for folder in ("config/workflows", "")]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        where, hint = "", f"name a file in {own / 'config/workflows'}"
        if here.bundled:
            where, hint = ", neither in the bundle nor here", f"{hint}, or create a bundle for this host: inv bundle"
        raise ConfigError("config", f"{place}: there is no file {name}{where}", hint=hint)
    if path.stat().st_size > limit:
        raise ConfigError("config", f"{place}: {name} is larger than {limit / 1e6:.0f} MB", hint="use a smaller one")
    return path


def _picture(place: str, name: str) -> bytes:
    raw = _found(place, name, REFERENCE).read_bytes()
    if not PICTURE.match(raw):
        raise ConfigError("config", f"{place}: like = {name!r} is not a PNG, JPEG or WebP picture", hint="convert it")
    return raw


def times(notes: Iterable[str]) -> dict[str, tuple[float, float]]:
    """The seconds of workflows with the new and the active release, by name, from the notes of a trial."""
    form = re.escape(COMPARED).replace(r"\{\}", "(.+)").replace(r"\{:\.1f\}", r"(\d+\.\d)")
    found = (match.groups() for match in map(re.compile(form).fullmatch, notes) if match)
    return {name: (float(new), float(old)) for name, new, _, old in found}


def rows(proofs: Sequence[Proof]) -> list[str]:
    """The proofs in words."""
    found: list[str] = []
    for each in proofs:
        checks = [f"within {each.seconds} s"]
        checks += [counted(each.images, "file")] if each.images >= 0 else []
        checks += ["of {}x{}".format(*each.size)] if each.size else []
        checks += [f"at most {each.within:g} from its reference"] if each.like else []
        found.append(f"the release must run {each.name}: {', '.join(checks)}")
    return found
