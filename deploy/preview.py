"""What a deploy changes and breaks on a host: its release against the one in service."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from packaging.version import Version

from agent.schema.live import NodeTypes
from agent.schema.manifest import ReleaseManifest
from core import console, files, source
from core.errors import ConfigError, HearthError, SourceError
from core.stack import find_stack
from core.typed import convert
from deploy import fleet
from deploy import host as hosts
from deploy.look import find_target, look
from deploy.profile import modes, profiles
from deploy.selection import choose
from lock import application, interface, nodes, workflows
from lock import preview as previews
from lock.preview import Driver, Preview, Release

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from core.stack import Stack
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.inputs import Inputs
    from lock.interface import Interface
    from lock.nodes import Node
    from lock.workflows import Workflows


def preview(agent: Agent, target: Target, facts: Facts, inputs: Inputs) -> Preview | None:
    """Compare a host's release with the one to deploy; None if they have the same ComfyUI, stack and nodes.

    Never fails: what cannot be had is unknown.
    """
    manifest = facts.release(facts.current)
    wanted = {name: node for name, node in inputs.nodes.items() if name not in target.host.developed}
    if manifest is None or _same(manifest, target, inputs, wanted):
        return None
    try:
        return _preview(agent, target, facts, inputs, manifest, wanted)
    except (HearthError, OSError, ValueError, LookupError, TypeError, RecursionError, msgspec.MsgspecError) as error:
        return Preview(old=manifest.version, new=inputs.application.version, unknown={"preview": _reason(error)})


def _same(manifest: ReleaseManifest, target: Target, inputs: Inputs, wanted: Mapping[str, Node]) -> bool:
    """Whether a release has the wanted ComfyUI, stack and nodes, except for those that are not available."""
    before = (manifest.tree, manifest.stack, manifest.torch)
    known = {name: each.commit for name, each in manifest.nodes.items()}
    lacking = {name for lock in inputs.locks.values() for name in lock.unavailable}
    commits = {name: node.commit for name, node in wanted.items() if name not in lacking or name in known}
    return before == (inputs.application.tree, target.stack.name, target.stack.torch) and commits == known


def _preview(
    agent: Agent, target: Target, facts: Facts, inputs: Inputs, manifest: ReleaseManifest, wanted: Mapping[str, Node]
) -> Preview:
    selection, _ = choose(target, facts, inputs)
    name = selection.lock.name if selection else ""
    packages = {name: selection.lock.versions(selection.requesters)} if selection else {}
    lacking = selection.lock.unavailable if selection else {}
    new = _release(inputs.application.version, inputs.application,
                   {each: node.pinned(each) for each, node in wanted.items() if each not in lacking})  # fmt: skip
    new = replace(new, packages=packages, locks={name: selection.lock} if selection else {})
    old = _release(manifest.version, _source(manifest, inputs), _nodes(manifest, wanted))
    old = replace(old, packages={name: manifest.packages or {}})
    found, unknown, types = workflows.collect(), dict[str, str](), None
    try:
        types, saved = running(agent, target.name, saved=True)
        found |= saved
    except HearthError as error:
        unknown[f"workflows saved on {target.name}"] = _reason(error)
    chosen = {target.name: (target.flags_for(old.version), target.flags)}
    made = previews.preview(old, new, chosen, found, types)
    unknown |= {} if selection else {"packages": "no locked list fits the host"}
    unknown |= {} if manifest.packages is not None else {"packages": "an older Hearth did not record those in service"}
    return msgspec.structs.replace(
        made,
        flags=tuple(msgspec.structs.replace(each, owner=_owner(target, each.flag)) for each in made.flags),
        unavailable=tuple(each for each in made.unavailable if each.node in wanted),
        drivers={target.name: driver(target.stack, facts)} if target.profile.cuda else {},
        unknown={**made.unknown, **unknown},
    )


def _owner(target: Target, flag: str) -> str:
    origin = target.flag_origin(flag)
    return f"{target.name} ({origin})" if origin else target.name


def driver(stack: Stack, facts: Facts) -> Driver:
    """A host's driver, and the one that a stack needs."""
    try:
        fits = Version(facts.driver) >= Version(stack.driver)
    except ValueError:
        fits = None
    return Driver(facts.driver, stack.cuda, stack.driver, fits)


def _reason(error: BaseException) -> str:
    return console.line(getattr(error, "what", "") or repr(error))[:300]


# --- sources ----------------------------------------------------------------------------------------------------------


def _source(manifest: ReleaseManifest, inputs: Inputs) -> source.Pinned | None:
    """The source of a release's ComfyUI; None if an older Hearth did not record it."""
    listed = convert(manifest.sources, tuple[source.Source, ...])
    app, tree = inputs.application, manifest.tree
    if not (listed and tree):
        return None
    return source.Pinned(
        name=app.name, version=manifest.version, source=listed, tree=tree, paths=app.paths, folder=app.folder
    )


def _nodes(manifest: ReleaseManifest, wanted: Mapping[str, Node]) -> dict[str, source.Pinned]:
    """The sources of a release's nodes. Which of their files are left out is taken from the wanted ones."""
    found = {}
    for name, each in manifest.nodes.items():
        known = wanted.get(name) or nodes.Node(url="", commit="", tree="", why="")
        found[name] = msgspec.structs.replace(known, **vars(each)).pinned(name)
    return found


def _release(version: str, app: source.Pinned | None, pinned: Mapping[str, source.Pinned]) -> Release:
    """Fetch the sources of a release, in parallel if the cache lacks them."""
    recipes = {previews.COMFYUI: app, **pinned}
    with ThreadPoolExecutor(max_workers=nodes.PARALLEL) as pool:
        trees = dict(zip(recipes, pool.map(_tree, recipes.values()), strict=True))
    found = {name: each for name, each in trees.items() if not isinstance(each, str)}
    unknown = {name: each for name, each in trees.items() if isinstance(each, str)}
    tree = found.pop(previews.COMFYUI, None)
    return Release(version=version, tree=tree, nodes=found, packages={}, unknown=unknown)


def _tree(recipe: source.Pinned | None) -> Path | str:
    """The tree of a source, or the reason why there is none."""
    if recipe is None:
        return "an older Hearth did not record its source"
    try:
        try:
            tree = source.fetch(recipe)
        except SourceError as error:
            if error.kind != "hash-mismatch" or not recipe.source[0].git:
                raise
            return source.fetch(source.pin(recipe))  # the same commit, of which other files are taken now
    except HearthError as error:
        return _reason(error)
    if recipe.source[0].folder and files.tree_hash(tree) != recipe.tree:
        return f"{tree} has changed since"
    return tree


# --- hosts and profiles -----------------------------------------------------------------------------------------------


def running(agent: Agent, host: str, *, saved: bool) -> tuple[Interface, Workflows]:
    """The node types of a host's running ComfyUI and, with `saved`, the workflows that its users saved."""
    answer = convert(agent.call("node-types", workflows=saved), NodeTypes)
    found: Workflows = {}
    for name, content in sorted(answer.workflows.items()):
        label = f"{host}:{name}"
        try:
            unread = "it has no nodes" if content else "it is too large, or not JSON"
            found[label] = workflows.graphs(label, [content], unread)
        except ConfigError as error:
            found[label] = error
    return interface.reported(answer.types), found


def of_update(old: Release, new: Release) -> Preview:
    """Compare two releases of this checkout, with its workflows, and with its hosts and their flags and drivers.

    Hosts are asked only if the torch or CUDA of their stack changes; one that does not answer is unknown.
    """
    made = previews.preview(old, new, chosen_flags(old.version, new.version), workflows.collect())
    targets = [find_target(name) for name in hosts.hosts().hosts]
    unfit = {
        each.name: f"its stack {each.stack.name} runs only ComfyUI {each.stack.comfyui}, not {new.version}"
        for each in targets
        if _selects(each.host, old.version) and not each.stack.runs(new.version)
    }
    moved = {name for name, stack in new.stacks.items() if _needs(stack) != _needs(old.stacks.get(name))}
    asked = [each.name for each in targets if each.profile.cuda and each.stack.name in moved]
    answers = fleet.ask_each(
        asked, lambda agent, target: driver(new.stacks[target.stack.name], look(agent, target)), limited=True
    )
    late = {f"driver of {each.host}": f"not checked: {_reason(each.error)}" for each in answers if each.error}
    drivers = {each.host: each.value for each in answers if each.value}
    return msgspec.structs.replace(made, unfit=unfit, drivers=drivers, unknown={**made.unknown, **late})


def _needs(stack: Stack | None) -> tuple[str, str, str] | None:
    return (stack.torch, stack.cuda, stack.driver) if stack else None


def _selects(host: hosts.Host, version: str) -> bool:
    """Whether a host runs a version of ComfyUI; also if its channel has none yet."""
    wanted = host.comfyui
    if wanted in application.CHANNELS:
        return application.channels().get(wanted, version) == version
    return version == (application.version() if wanted == application.PINNED else wanted)


def chosen_flags(old: str, new: str) -> previews.Chosen:
    """The flags of all profiles and modes, and of the hosts that run the old one, for two versions of ComfyUI."""
    plain = hosts.Host(scope="user")
    targets = {f"profile {name}": hosts.Target(name, plain, name, each, {}) for name, each in profiles().items()}
    affected = [name for name, host in hosts.hosts().hosts.items() if _selects(host, old)]
    targets |= {f"host {name}": hosts.target(name) for name in affected}
    found = {name: (each.flags_for(old), each.flags_for(new)) for name, each in targets.items()}
    torch = find_stack().torch
    for name, mode in modes().items():
        for unified in (False, True)[: 1 + bool(mode.on_unified)]:
            settings = mode.on(unified=unified).flags.items()
            first, second = (
                {flag: each.value for flag, each in settings if each.active(torch, version)} for version in (old, new)
            )
            found[f"mode {name}" + " (unified memory)" * unified] = (first, second)
    return found
