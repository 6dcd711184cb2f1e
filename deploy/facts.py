"""The facts of a host, and its releases by name."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.schema.facts import Facts, Gpu, MountState, Place, Process, Service
from agent.schema.manifest import ReleaseManifest
from core import console
from core.errors import UsageError, suggest

__all__ = ["Facts", "Gpu", "MountState", "Place", "Process", "Service", "named"]


def named(facts: Facts, name: str) -> ReleaseManifest:
    """The manifest of a release that a host keeps, by its id, `current` or `previous` (the target of a rollback).

    Raises UsageError.
    """
    before = next((each for each in facts.proven if each != facts.current), "")
    words = {word: meant for word, meant in (("current", facts.current), ("previous", before)) if meant}
    found = facts.release(words.get(name, name))
    if found is None:
        known = [*words, *(each.id for each in facts.releases)]
        hint = suggest(name, known) if known else "deploy one: inv deploy"
        raise UsageError("unknown-name", f"{facts.hostname} has no release {name!r}", hint=hint)
    return found


def rows(found: Facts) -> list[str]:
    """A host's facts, as a table of two columns."""
    gpus = [f"{gpu.name} ({gpu.capability})" for gpu in found.gpus]
    damaged = [f"{name}: {error}" for name, error in found.parts.items() if error]
    shared = ", shared with the GPU" if any(gpu.unified for gpu in found.gpus) else ""
    versions = (("glibc", found.glibc), ("GLIBCXX", found.glibcxx), ("CXXABI", found.cxxabi))
    libraries = ", ".join(f"{name} {version or 'not reported'}" for name, version in versions)
    cells = [
        ("host", found.hostname),
        ("system", f"{found.os}, {found.machine}, kernel {found.kernel}, {libraries}"),
        (
            "Python",
            ", ".join(f"{version} ({path})" for version, path in found.pythons.items()) or "no supported version",
        ),
        ("GPU", ", ".join(gpus) or "none"),
        ("driver", found.driver or "none"),
        ("memory", f"{console.size(found.memory)}{shared}"),
        (f"free at {found.prefix}", f"{console.size(found.disk_free)}, {found.inodes_free or 'unlimited'} inodes"),
        ("mounts", "; ".join(_mounted(path, each) for path, each in found.mounts.items()) or "none configured"),
        ("service manager", found.manager),
        ("release", found.current or "none"),
        ("service", found.service.state + (f" since {found.service.since}" if found.service.since else "")),
        ("parts", "; ".join([f"{len(found.parts) - len(damaged)} intact", *damaged])),
        ("failed nodes", "; ".join(f"{name}: {why}" for name, why in found.failed_nodes.items()) or "none"),
        ("in progress", f"{found.busy['action']} by {found.busy['who']}" if found.busy else "nothing"),
    ]
    return console.table(("", ""), cells)


def _mounted(path: str, mount: MountState) -> str:
    return f"{path}: {mount.source}" if mount.mounted else f"{path}: not mounted; ComfyUI waits for it"


def releases(found: Facts) -> list[dict[str, Any]]:
    """The manifests of the kept releases; the active one is marked `current`."""
    return [{**msgspec.to_builtins(each), "current": each.id == found.current} for each in found.releases]


def release_rows(found: Facts) -> list[str]:
    """A table of the kept releases: the current one, earlier ones (latest first), then the never healthy ones."""
    cells = []
    order = [found.current, *found.proven]
    for each in sorted(found.releases, key=lambda each: order.index(each.id) if each.id in order else len(order)):
        damage = {part: found.parts.get(part, "missing") for part in each.parts.values()}
        errors = [f"{part}: {error}" for part, error in damage.items() if error]
        errors += ["its unit or links were changed"] if each.id in found.altered else []
        kernels = ", ".join(f"{name} {version}" for name, version in each.kernels.items()) or "-"
        proven = "was active before" if each.id in found.proven else "never healthy"
        mark = "current" if each.id == found.current else proven
        stack = f"{each.stack}, torch {each.torch}"
        cells.append((each.id, each.version, stack, each.python, kernels, mark, "; ".join(errors) or "intact"))
    return console.table(("release", "ComfyUI", "stack", "Python", "kernels", "", "parts"), cells)
