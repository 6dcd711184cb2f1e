"""A preview of an update: what changes from one release to another, and what breaks. Code is read, and never run.

What cannot be read or fetched is listed as unknown, and never counts as absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from packaging.version import Version

from core import foreign, source
from core.console import counted
from core.stack import stacks
from lock import ahead, api, application, interface, nodes, workflows
from lock.interface import Interface, NodeType
from lock.readings import kept
from lock.requirements import APP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Set
    from pathlib import Path

    from core.stack import Stack
    from lock.application import Application
    from lock.nodes import Catalogue
    from lock.requirements import LockedList
    from lock.workflows import Workflows

COMFYUI = "ComfyUI"


@dataclass(frozen=True, kw_only=True)
class Release:
    """A ComfyUI and its custom nodes as source trees, and its packages.

    `packages` are versions by locked list, `locks` these lists as far as they are known, `stacks` those of a checkout.
    `unknown` are the reasons why ComfyUI's tree (None) or a node's is not available.
    """

    version: str
    tree: Path | None
    nodes: Mapping[str, Path]
    packages: Mapping[str, Mapping[str, str]]
    locks: Mapping[str, LockedList] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)


def of_checkout(app: Application, known: Catalogue, locks: Iterable[LockedList]) -> Release:
    """The release of a ComfyUI with all known nodes and these locked lists; raises the errors of fetching."""
    lists = {lock.name: lock for lock in locks}
    packages = {name: lock.versions() for name, lock in lists.items()}
    trees, tree = nodes.fetch(known.nodes), source.fetch(app)
    return Release(version=app.version, tree=tree, nodes=trees, packages=packages, locks=lists, stacks=stacks())


class Flag(msgspec.Struct, frozen=True):
    """A flag of a profile, mode or host, its `owner`: `removed`, `changed`, in `conflict`, or with a wrong `value`."""

    owner: str
    flag: str
    kind: str
    what: str
    remedy: str = ""


class Package(msgspec.Struct, frozen=True):
    """A package with another major version in some locked lists; ComfyUI, nodes or else packages that require it."""

    name: str
    old: str
    new: str
    lists: tuple[str, ...]
    by: tuple[str, ...]


class Unavailable(msgspec.Struct, frozen=True):
    """A custom node that a locked list lacks, because a package that it needs is not available for that list."""

    node: str
    list: str
    reason: str


class Driver(msgspec.Struct, frozen=True):
    """A host's NVIDIA driver, and the one that its stack's CUDA needs; `fits` is None if that is not known."""

    driver: str
    cuda: str
    needs: str
    fits: bool | None


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """The changes between two releases. `types` and `broken` are by custom node, or COMFYUI.

    ComfyUI makes the `migrations` of its database when it starts; it does not start with a database that had one of
    `newer`, which the older release has made. A ComfyUI without migrations starts with every database: `restores` says
    that a rollback needs the database from before. `drivers` are by host; so is `unfit`: why the stack of a host does
    not run the new ComfyUI.
    """

    old: str
    new: str
    types: dict[str, tuple[interface.Change, ...]] = {}
    flags: tuple[Flag, ...] = ()
    packages: tuple[Package, ...] = ()
    unavailable: tuple[Unavailable, ...] = ()
    broken: dict[str, tuple[api.Broken, ...]] = {}
    migrations: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()
    restores: bool = False
    drivers: dict[str, Driver] = {}
    unfit: dict[str, str] = {}
    workflows: tuple[workflows.Report, ...] = ()
    unknown: dict[str, str] = {}


Chosen = dict[str, tuple[dict[str, str], dict[str, str]]]
"""Flags with their values by profile, mode or host: those for the old and for the new release."""


def preview(old: Release, new: Release, chosen: Chosen, found: Workflows, running: Interface | None = None) -> Preview:
    """Compare two releases. `running` are the node types that a server of the old one reports, for the workflows."""
    trees, used = filter(None, (old.tree, new.tree)), {*old.nodes.values(), *new.nodes.values()}
    with ahead.reading(trees, used):
        before = _interfaces(old, new, old.tree) if old.tree else {}
        after = _interfaces(new, old, new.tree) if new.tree else {}
        base = running or (_combined(before) if before else None)
        proposed = _proposed(base, old, new, after) if base and after else None
        reports = [workflows.report(name, each, proposed, base) for name, each in found.items() if proposed]
    partly = {
        f"types of {name}": ", ".join(module or "__init__" for module in each.unknown)[:200]
        for name, each in after.items()
        if each.unknown
    }
    made = Preview(
        old=old.version,
        new=new.version,
        packages=tuple(_packages(old, new)),
        unavailable=tuple(_unavailable(old, new)),
        workflows=tuple(reports),
        unknown={**{f"{name} in service": why for name, why in old.unknown.items()}, **new.unknown, **partly},
    )
    if not (old.tree and new.tree):
        return made
    revisions, wanted = _revisions(old.tree), _revisions(new.tree)
    return msgspec.structs.replace(
        made,
        types=_types(before, after, {*old.unknown, *new.unknown}),
        flags=tuple(_flags(_known(old.tree), _known(new.tree), chosen)),
        broken=_broken(old, new),
        unknown={**made.unknown, **_appearing(old, new)},
        migrations=tuple(sorted(wanted - revisions)),
        newer=tuple(sorted(revisions - wanted)) if wanted else (),
        restores=bool(revisions and wanted - revisions),
    )


# --- node types and workflows -----------------------------------------------------------------------------------------


def _interfaces(release: Release, other: Release, tree: Path) -> dict[str, Interface]:
    """The node types of ComfyUI, and of the custom nodes that the other release lacks or has in another version."""
    differing = {name: place for name, place in release.nodes.items() if other.nodes.get(name) != place}
    types = {name: interface.read_node_cached(place, tree) for name, place in differing.items()}
    return {COMFYUI: interface.read_cached(tree), **types}


def _types(
    before: Mapping[str, Interface], after: Mapping[str, Interface], unknown: Set[str]
) -> dict[str, tuple[interface.Change, ...]]:
    """The changes of node types by custom node. Nothing is known of a node without its source in both releases."""
    none = Interface({})
    found = {
        name: tuple(interface.compare(before.get(name, none), after.get(name, none)))
        for name in sorted(before.keys() | after.keys())
        if name not in unknown
    }
    return {name: changes for name, changes in found.items() if changes}


def _combined(parts: Mapping[str, Interface]) -> Interface:
    """The known node types of a ComfyUI with its custom nodes. Their modules are named as in a running one."""
    types: dict[str, NodeType] = {}
    for name, each in parts.items():
        for key, kind in each.types.items():
            module = kind.module if name == COMFYUI else f"custom_nodes.{name}"
            types[key] = msgspec.structs.replace(kind, module=module)
    packs = frozenset(name.lower() for name in parts if name != COMFYUI)
    replaced = {old: new for each in parts.values() for old, new in each.replaced.items()}
    return Interface(types, {**replaced, **parts[COMFYUI].replaced}, packs=packs)


def _proposed(before: Interface, old: Release, new: Release, after: Mapping[str, Interface]) -> Interface:
    """The node types of the new release: of an unchanged node as before, otherwise as its code has them.

    A former type of code whose types are not all known stays, with unknown inputs.
    """
    made = _combined(after)
    former = {*old.nodes, *old.unknown, COMFYUI}
    same = {name for name, place in old.nodes.items() if new.nodes.get(name) == place}
    types: dict[str, NodeType] = {}
    for name, kind in before.types.items():
        pack = kind.module.removeprefix("custom_nodes.") if kind.module.startswith("custom_nodes.") else COMFYUI
        if pack in new.unknown or (pack in after and after[pack].unknown):
            types[name] = NodeType(kind.module, None, None, complete=False)
        elif pack in same or pack not in former:
            types[name] = kind
    gone = {name.lower() for name in former - new.nodes.keys() - new.unknown.keys()}
    return Interface({**types, **made.types}, made.replaced, packs=(before.packs - gone) | made.packs)


# --- custom nodes, flags, packages, database --------------------------------------------------------------------------


def _broken(old: Release, new: Release) -> dict[str, tuple[api.Broken, ...]]:
    """The names of ComfyUI that the nodes of the new release use and that it lacks."""
    before, after = (kept(api.Api, api.read, each.tree) for each in (old, new) if each.tree)
    found = {}
    for name, place in sorted(new.nodes.items()):
        former = kept(api.Uses, api.uses, old.nodes[name]) if name in old.nodes else api.Uses(())
        if listed := api.broken(kept(api.Uses, api.uses, place), before, after, former):
            found[name] = tuple(listed)
    return found


def _appearing(old: Release, new: Release) -> dict[str, str]:
    """The unchanged nodes that may have other types, since their code asks for something that only one ComfyUI has."""
    before, after = (kept(api.Api, api.read, each.tree) for each in (old, new) if each.tree)
    found = {}
    for name, place in sorted(new.nodes.items()):
        if old.nodes.get(name) == place and (names := api.appearing(kept(api.Uses, api.uses, place), before, after)):
            found[f"types of {name}"] = f"its code asks for what only one ComfyUI has: {', '.join(names)}"[:200]
    return found


def _known(tree: Path) -> dict[str, application.Flag]:
    return application.flags(application.text(tree, "comfy/cli_args.py"))


def _flags(old: Mapping[str, application.Flag], new: Mapping[str, application.Flag], chosen: Chosen) -> Iterator[Flag]:
    for owner, (before, after) in chosen.items():
        alone, both = set[str](), before.keys() & old.keys() & new.keys()
        for flag, value in after.items():
            problems = application.wrong({flag: value}, new)
            alone |= {what for what, _ in problems}
            if problems and not application.wrong({flag: value}, old):
                yield Flag(owner, flag, "value" if flag in new else "removed", *problems[0])
            elif flag in both and (takes := _takes(new[flag])) != (took := _takes(old[flag])):
                yield Flag(owner, flag, "changed", f"{flag} takes {takes}, before {took}")
        earlier = {what for what, _ in application.wrong(before, old)}
        for what, remedy in application.wrong(after, new):
            if what not in alone | earlier:
                yield Flag(owner, what.partition(" ")[0], "conflict", what, remedy)


_COUNTS = {"0": "no value", "1": "one value", "?": "at most one value", "+": "at least one value"}


def _takes(flag: application.Flag) -> str:
    choices = f" of {', '.join(flag.choices)}" if flag.choices else ""
    return f"{_COUNTS.get(flag.values, 'several values')}{f' ({flag.kind})' * bool(flag.kind)}{choices}"


def _packages(old: Release, new: Release) -> Iterator[Package]:
    changes: dict[tuple[str, str, str], list[str]] = {}
    for name, versions in new.packages.items():
        before = old.packages.get(name, {})
        for package in sorted(versions.keys() & before.keys()):
            if Version(before[package]).release[:1] != Version(versions[package]).release[:1]:
                changes.setdefault((package, before[package], versions[package]), []).append(name)
    for change, lists in sorted(changes.items()):
        by = {who for each in lists if each in new.locks for who in new.locks[each].requesters(change[0])}
        own = {COMFYUI if each == APP else each for each in by if each == APP or each in new.nodes}
        yield Package(*change, tuple(lists), tuple(sorted(own or by)))


def _unavailable(old: Release, new: Release) -> Iterator[Unavailable]:
    for name, lock in new.locks.items():
        before = old.locks[name].unavailable if name in old.locks else {}
        for node in sorted(lock.unavailable.keys() - before.keys()):
            yield Unavailable(node, name, lock.unavailable[node])


def _revisions(tree: Path) -> set[str]:
    """The revisions to which a ComfyUI migrates its database (Alembic); of a file without one, its name."""
    files = {path.stem: foreign.text(path) for path in (tree / "alembic_db/versions").glob("*.py")}
    found = {name: re.search(r"""^revision\b[^=\n]*=\s*["']([^"'\n]+)""", text, re.M) for name, text in files.items()}
    return {match[1] if match else name for name, match in found.items()}


# --- text -------------------------------------------------------------------------------------------------------------


SHOWN = 20
"""Lines of each part of a preview in text; JSON has all of them."""


def rows(found: Preview) -> Iterator[str]:
    """The changes, those that break something first: SHOWN lines of each part, and how many more it has."""
    lines = [
        line
        for part in _parts(found)
        for line in [*part[:SHOWN], *[f"... and {len(part) - SHOWN} more lines; --json has all"] * (len(part) > SHOWN)]
    ]
    name = f"ComfyUI {found.old} -> {found.new}" if found.old != found.new else f"ComfyUI {found.new}"
    yield f"{name}:" if lines else f"{name}: no differences were found"
    yield from lines


def _parts(found: Preview) -> Iterator[list[str]]:
    reports = [msgspec.structs.replace(each, already=0) for each in found.workflows]
    yield [line for each in reports for line in workflows.rows(each)]
    if read := sum(not each.error for each in reports):
        kept = read - sum(each.breaks for each in reports)
        yield [f"{kept} of {counted(read, 'workflow')} {'is' if read == 1 else 'are'} not affected"]
    yield [f"custom node {node} {each.said}" for node, listed in found.broken.items() for each in listed]
    yield [f"{flag.owner}: {flag.what}" + (f" ({flag.remedy})" if flag.remedy else "") for flag in found.flags]
    yield [f"custom node {each.node}: not available for {each.list}: {each.reason}" for each in found.unavailable]
    yield [
        f"package {each.name}: {each.old} -> {each.new} in {', '.join(each.lists)}"
        + (f", required by {', '.join(each.by[:5])}" if each.by else "")
        for each in found.packages
    ]
    if found.migrations:
        yield [f"database: ComfyUI {found.new} migrates it to {', '.join(found.migrations)}"]
        every = f"keeps it: ComfyUI {found.old} has no migrations, and starts with every database"
        yield [f"database: a rollback {'restores the one from the time of the update' if found.restores else every}"]
    if found.newer:
        yield [f"database: ComfyUI {found.new} does not start with a database at {', '.join(found.newer)}"]
    yield [f"{host}: {why}" for host, why in found.unfit.items()]
    fits = {True: "is new enough", False: "is too old", None: "is not reported"}
    yield [
        f"{host}: driver {each.driver or '-'} {fits[each.fits]}: CUDA {each.cuda} needs {each.needs}"
        for host, each in found.drivers.items()
    ]
    yield [f"{name}: {interface.counts(changes)}" for name, changes in found.types.items()]
    changed = [(name, each) for name, changes in found.types.items() for each in changes if each.kind != "added"]
    yield [f"{name}: {each.said}" for name, each in sorted(changed, key=lambda each: each[1].severity)]
    unread = {each.file: each.error for each in found.workflows if each.error}
    yield [f"unknown: {name}: {why}" for name, why in {**found.unknown, **unread}.items()]
