"""Changes to the list of custom nodes: upstream updates with their effects, and the nodes that provide a node type."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import tomlkit
from tomlkit.items import Comment, Table, Whitespace

from core import console, files, foreign, source, workspace
from core.errors import ConfigError, HearthError, ProcessError, SourceError, UsageError, suggest
from lock import advisory, nodes, requirement_files, review, workflows
from lock.updates import upstream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from tomlkit.container import Container

    from core.shell import Done
    from lock.nodes import Node


@dataclass(frozen=True)
class Change:
    """The effects of a node's update.

    `commits` are the latest first; requirements and files that run at import are the changed ones. `powers` are new
    capabilities (`review.gained`), and new symbolic links. `date` is the day of the new commit.
    """

    name: str
    old: str
    new: str
    commits: tuple[str, ...]
    requirements: tuple[str, ...]
    imported: tuple[str, ...]
    powers: tuple[str, ...] = ()
    date: str = ""


def add(address: str, why: str) -> str:
    """Pin a node's latest commit, or the one of `URL@REV`, and list it; returns its name.

    Reports known problems of the repository. Raises UsageError; ConfigError if the node is already listed or left out;
    and upstream errors.
    """
    if not why:
        raise UsageError("usage", "a node needs a reason", hint='add --why "its purpose"')
    url, rev = _revision(address)
    nodes.check_address("inv nodes.add", url)
    name = url.rstrip("/").rpartition("/")[2].removesuffix(".git")
    known = nodes.catalogue()
    if name in known.nodes:
        raise ConfigError("config", f"{name} is already listed", hint="inv nodes.update")
    if name in known.left_out:
        raise ConfigError(
            "config", f"{name} is left out: {known.left_out[name]}", hint="remove it from [left-out] first"
        )
    for bad in advisory.of(url, advisory.advisories()):
        console.say(f"warning: {name} has known problems ({bad.affected}): {bad.what}; {bad.source}")
    commit = upstream.newest(url, rev or "HEAD")
    node = nodes.Node(url=url, commit=commit, tree="", why=why)
    nodes.check("inv nodes.add", name, node)
    pinned = source.pin(node.pinned(name))
    date = f"{upstream.dates(url, [commit])[commit]:%Y-%m-%d}"
    document = _document()
    table = tomlkit.table()
    table.update({"url": url, "commit": commit, "tree": pinned.tree, "why": why})
    table["commit"].comment(date)
    listed = document.setdefault("nodes", tomlkit.table(is_super_table=True))
    after = _comments_after(listed[[*listed][-1]]) if listed else []
    listed[name] = table
    for each in after:
        listed[name].add(each)
    _write(document)
    return name


def _revision(address: str) -> tuple[str, str]:
    """Split `URL@REV`. The URL may contain a user (git@host:path), and the revision is optional."""
    user = re.match(r"([a-z]+://)?([^/@]*@)?", address)
    start = user.end() if user else 0
    url, _, rev = address[start:].partition("@")
    return address[:start] + url, rev


def remove(name: str) -> None:
    """Remove a node from the list and from all sets; raises UsageError."""
    known = nodes.catalogue()
    if name not in known.nodes:
        raise UsageError("unknown-name", f"there is no node {name!r}", hint=suggest(name, known.nodes))
    document = _document()
    table = document["nodes"][name]
    for before, each in pairwise(_tables(document)):
        if each is table:
            above, below = _comments_after(before), _comments_after(table)
            for line in [*above, *below[bool(above) :]]:  # one blank line is enough
                before.add(line)
    del document["nodes"][name]
    for members in document.get("sets", {}).values():
        if name in members:
            members.remove(name)
    _write(document)


def update(names: Sequence[str], *, dry_run: bool) -> list[Change]:
    """Pin the latest commits of these nodes (default: all) and report the effects.

    A failed update does not stop the others: all errors are raised at the end.
    """
    changes, failures = pin_latest(names, dry_run=dry_run)
    if failures:
        for line in rows(changes) if changes else ():  # otherwise the error would suppress them
            console.say(line)
        raise together(failures)
    return changes


def pin_latest(
    names: Sequence[str], *, dry_run: bool, before: datetime | None = None
) -> tuple[list[Change], dict[str, Exception]]:
    """Pin the latest commits of these nodes, or the latest ones `before` a time; the effects, and errors by name."""
    known = nodes.catalogue()
    for name in names:
        if name not in known.nodes:
            raise UsageError("unknown-name", f"there is no node {name!r}", hint=suggest(name, known.nodes))
    chosen = {name: known.nodes[name] for name in names} or known.nodes
    changes: list[Change] = []
    document = _document()
    latest, failures = _latest(chosen, before)
    for name, new in latest.items():
        if new == chosen[name].commit:
            continue
        try:
            change, tree = _updated(name, chosen[name], new)
        except (HearthError, OSError, ValueError) as error:
            failures[name] = error
            continue
        entry = document["nodes"][name]
        entry["commit"], entry["tree"] = new, tree
        entry["commit"].comment(change.date)
        changes.append(change)
    if changes and not dry_run:
        _write(document)
    return changes, failures


def _latest(chosen: Mapping[str, Node], before: datetime | None) -> tuple[dict[str, str], dict[str, Exception]]:
    """The latest commits of nodes by name, and the errors of the others."""
    failures: dict[str, Exception] = {}

    def one(name: str) -> str:
        try:
            return upstream.newer(chosen[name].url, chosen[name].commit, before)
        except (HearthError, OSError, ValueError) as error:
            failures[name] = error
            return ""

    with ThreadPoolExecutor(max_workers=nodes.PARALLEL) as pool:
        found = dict(zip(chosen, pool.map(one, chosen), strict=True))
    return {name: commit for name, commit in found.items() if commit}, failures


def together(failures: Mapping[str, Exception]) -> HearthError:
    """Combine the errors of several upstreams into one; it has their class if they all share one."""
    kinds = {(type(error), error.kind) for error in failures.values() if isinstance(error, HearthError)}
    same = len(kinds) == 1 and all(isinstance(error, HearthError) for error in failures.values())
    found, kind = kinds.pop() if same else (SourceError, "nodes")
    lines = {name: getattr(error, "cause", "").splitlines() for name, error in failures.items()}
    said = {name: next((x for x in each if not x.startswith("warning:")), "") for name, each in lines.items()}
    causes = [
        f"{name}: {getattr(error, 'what', error)}" + f": {said[name]}" * bool(said[name])
        for name, error in failures.items()
    ]
    return found(
        kind,
        f"{len(failures)} upstream(s) could not be examined: {', '.join(failures)}",
        cause="\n    ".join(causes),
        hint="the others were; if a node's repository no longer exists, run inv nodes.remove",
    )


def _updated(name: str, node: Node, new: str) -> tuple[Change, str]:
    """The effects of a node's update, and its tree."""
    before = nodes.fetch({name: node})[name]
    pinned = source.pin(msgspec.structs.replace(node, commit=new, tree="").pinned(name))
    links = _links(node.url, new)
    with suppress(ProcessError):  # history rewritten: the old commit is unknown, so all links count as new
        links -= _links(node.url, node.commit)
    with upstream.history(node.url, new) as git:
        return _change(name, git, (node.commit, new), (before, source.fetch(pinned)), links), pinned.tree


def _change(
    name: str, git: partial[Done], commits: tuple[str, str], trees: tuple[Path, Path], links: set[str]
) -> Change:
    (old, new), (before, after) = commits, trees
    log = git("log", "--format=%h %cs %s", "--max-count=30", f"{old}..{new}", check=False)
    subjects = log.stdout.splitlines() if log.returncode == 0 else ["(its history was rewritten)"]
    asked, asks = (dict.fromkeys(requirement_files.read(tree).lines) for tree in (before, after))
    wanted = [f"-{line}" for line in asked if line not in asks] + [f"+{line}" for line in asks if line not in asked]
    was, now = review.read(before), review.read(after)
    changed = [
        name
        for name in sorted(was.imported | now.imported)
        if not ((before / name).exists() and (after / name).exists())
        or files.sha256(before / name) != files.sha256(after / name)
    ]
    powers = (*review.gained(was, now), *([f"symbolic links: {', '.join(sorted(links))}"] if links else []))
    date = git("log", "-1", "--format=%cs", new).stdout.strip()
    return Change(name, old, new, tuple(subjects), tuple(wanted), tuple(changed), powers, date)


def _links(url: str, commit: str) -> set[str]:
    """The symbolic links of a commit. The fetched tree has copies instead, or the fetch was refused."""
    return {name for name, mode in upstream.entries(url, commit).items() if mode == "120000"}


def imported(tree: Path) -> set[str]:
    """The files that run when ComfyUI imports a node, according to the import statements."""
    return review.read(tree).imported


def search(workflow: Path) -> dict[str, list[str]]:
    """The node types of a workflow that ComfyUI lacks, each with the known nodes whose code contains the name.

    Raises ConfigError for a file that is not a workflow, and not a picture or other medium with one.
    """
    from lock.application import application

    types = {node.type for graph in workflows.read(workflow) for node in graph} - workflows.EDITOR
    return providers(types - _named(source.fetch(application())))


def providers(types: Iterable[str]) -> dict[str, list[str]]:
    """The known nodes whose Python code contains the name of a node type, or else whose JavaScript does."""
    known = nodes.catalogue()
    trees = nodes.fetch(known.nodes)
    names = {name: _named(tree) for name, tree in trees.items()}
    found = {each: [name for name in names if _names(names[name], each)] for each in sorted(types)}
    scripts = {name: _scripts(tree) for name, tree in trees.items()} if not all(found.values()) else {}
    return {
        each: there or [name for name in scripts if _script_names(scripts[name], each)] for each, there in found.items()
    }


def _names(strings: set[str], node_type: str) -> bool:
    """Whether a node's code names a type: literally, or composed as in `Seed (rgthree)`."""
    parts = re.fullmatch(r"(.+) \((.+)\)", node_type) if len(node_type) < 200 else None  # `strings` are shorter
    return node_type in strings or bool(parts and {parts[1], parts[2]} <= strings)


def _scripts(tree: Path) -> str:
    """A tree's JavaScript, which defines types that exist only in the editor."""
    texts: list[str] = []
    for path in sorted(tree.rglob("*.js")):
        with suppress(SourceError):  # too large
            texts.append(foreign.text(path, foreign.LIMIT))
    return "\n".join(texts)


def _script_names(script: str, node_type: str) -> bool:
    """Whether JavaScript names a type, as in `registerNodeType("SetNode", ...)` or `add("Label")` with " (rgthree)"."""
    name, _, tag = node_type.partition(" (")
    return any(
        f"{quote}{node_type}{quote}" in script or (tag and f"{quote}{name}{quote}" in script and f" ({tag}" in script)
        for quote in "\"'`"
    )


def _named(tree: Path) -> set[str]:
    """All strings in a tree's Python files. They include the node types, regardless of how nodes register them."""
    kept = workspace.current().cache / "strings" / f"{tree.name}.json"
    if not kept.exists():
        found = review.read(tree)
        if found.failed:
            console.say(f"{tree.name} cannot be read, so its node types are unknown")
            return set()
        files.write(kept, json.dumps(sorted(found.strings)))
    return set(json.loads(kept.read_text()))


def _tables(container: Container) -> Iterator[Table]:
    """The tables of a document that have a header, in its order."""
    for _, item in container.body:
        if isinstance(item, Table):
            yield from () if item.is_super_table() else (item,)
            yield from _tables(item.value)


def _comments_after(table: Table) -> list[Comment | Whitespace]:
    """Take the lines from the first blank one after a table's last key out of it: they are about the next table."""
    body, taken = table.value.body, list[Comment | Whitespace]()
    while body and isinstance(line := body[-1][1], (Comment, Whitespace)):
        taken.insert(0, line)
        body.pop()
    while taken and isinstance(taken[0], Comment):  # its own
        body.append((None, taken.pop(0)))
    return taken


def _document() -> tomlkit.TOMLDocument:
    path = nodes.catalogue_file()
    return tomlkit.parse(path.read_text()) if path.exists() else tomlkit.document()


def _write(document: tomlkit.TOMLDocument) -> None:
    files.write(nodes.catalogue_file(), tomlkit.dumps(document))


LATEST = "every node is at its latest commit"


def rows(found: Sequence[Change]) -> Iterator[str]:
    """The updates of nodes, with their effects."""
    for each in found:
        yield f"{each.name} {each.old[:9]} -> {each.new[:9]}"
        yield from (f"    {line}" for line in each.commits)
        for title, lines in (
            ("requirements", each.requirements),
            ("changed files that run at import", each.imported),
            ("new capabilities", each.powers),
        ):
            if lines:
                yield f"  {title}:"
                yield from (f"    {line}" for line in lines)
    if not found:
        yield LATEST


def search_rows(found: Mapping[str, Sequence[str]]) -> list[str]:
    """A table of a workflow's node types and the known nodes that may provide them."""
    cells = [(each, ", ".join(names) or "no known node") for each, names in found.items()]
    return console.table(("node type", "in"), cells) if found else ["all nodes of the workflow are part of ComfyUI"]
