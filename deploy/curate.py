"""Changes to the list of custom nodes: what upstream has, what an update would bring, who provides a node type."""

from __future__ import annotations

import ast
import difflib
import json
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import tomlkit

from core import console, files, foreign, source, tools
from core.errors import ConfigError, ProcessError, SourceUnreachableError, UnknownNameError, UsageError, near
from deploy import advisory, nodes, review

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.shell import Done
    from deploy.nodes import Catalogue


@dataclass(frozen=True)
class Change:
    """What an update of a node brings: commits (the latest first), requirements and files of its start that differ.

    `powers` are what it could not do before (`review.gained`), and symbolic links that it had not.
    """

    name: str
    old: str
    new: str
    commits: tuple[str, ...]
    requirements: tuple[str, ...]
    imported: tuple[str, ...]
    powers: tuple[str, ...] = ()


def add(address: str, why: str) -> str:
    """Pin a node's latest commit, or the one of `URL@REV`, and list it; returns its name.

    What is known to be bad of it is said. Raises UsageError, ConfigError when it is listed already or left out, and
    what reaching its upstream raises.
    """
    if not why:
        raise UsageError("a node is listed with its reason", hint='--why "what it is for"')
    url, rev = _revision(address)
    nodes.check_address("inv nodes.add", url)
    name = url.rstrip("/").rpartition("/")[2].removesuffix(".git")
    known = nodes.catalogue()
    if name in known.nodes:
        raise ConfigError(f"{name} is listed already", hint="inv nodes.update")
    if name in known.left_out:
        raise ConfigError(f"{name} is left out: {known.left_out[name]}", hint="take it out of [left-out] first")
    for each in advisory.of(url, advisory.advisories()):
        console.say(f"warning: {name} is known to be bad ({each.affected}): {each.what}; {each.source}")
    commit = newest(url, rev or "HEAD")
    node = nodes.Node(url=url, commit=commit, tree="", why=why)
    nodes.check("inv nodes.add", name, node)
    pinned = source.pin(node.pinned(name))
    with _history(url, commit) as git:
        date = _date(git, commit)
    document = _document()
    table = tomlkit.table()
    table.update({"url": url, "commit": commit, "tree": pinned.tree, "why": why})
    table["commit"].comment(date)
    document.setdefault("nodes", tomlkit.table(is_super_table=True))[name] = table
    _write(document)
    return name


def _revision(address: str) -> tuple[str, str]:
    """The two parts of `URL@REV`; the URL may name a user, as git@host:path does, and the revision be left out."""
    user = re.match(r"([a-z]+://)?([^/@]*@)?", address)
    start = user.end() if user else 0
    url, _, rev = address[start:].partition("@")
    return address[:start] + url, rev


def remove(name: str) -> None:
    """Take a node off the list and out of all sets; raises UnknownNameError."""
    known = nodes.catalogue()
    if name not in known.nodes:
        raise UnknownNameError(f"there is no node {name!r}", hint=near(name, known.nodes))
    document = _document()
    del document["nodes"][name]
    for members in document.get("sets", {}).values():
        if name in members:
            members.remove(name)
    _write(document)


def outdated(known: Catalogue) -> dict[str, tuple[str, str]]:
    """The nodes whose upstream has another latest commit: pinned and latest, by name."""
    with ThreadPoolExecutor(max_workers=nodes.PARALLEL) as pool:
        latest = dict(zip(known.nodes, pool.map(lambda node: newest(node.url), known.nodes.values()), strict=True))
    return {name: (node.commit, latest[name]) for name, node in known.nodes.items() if node.commit != latest[name]}


def update(names: Sequence[str], *, dry_run: bool) -> list[Change]:
    """Pin the latest commits of these nodes (all, when none is named) and say what that brings."""
    known = nodes.catalogue()
    for name in names:
        if name not in known.nodes:
            raise UnknownNameError(f"there is no node {name!r}", hint=near(name, known.nodes))
    chosen = {name: known.nodes[name] for name in names} or known.nodes
    changes: list[Change] = []
    document = _document()
    for name, (old, new) in outdated(msgspec.structs.replace(known, nodes=chosen)).items():
        node = known.nodes[name]
        before = nodes.fetch({name: node})[name]
        pinned = source.pin(msgspec.structs.replace(node, commit=new, tree="").pinned(name))
        entry = document["nodes"][name]
        entry["commit"], entry["tree"] = new, pinned.tree
        with _history(node.url, new) as git:
            entry["commit"].comment(_date(git, new))
            found = _change(name, git, (old, new), (before, source.fetch(pinned)))
        links = sorted(_links(node.url, new) - _links(node.url, old))
        powers = (*found.powers, *([f"symbolic links: {', '.join(links)}"] if links else []))
        changes.append(replace(found, powers=powers))
    if changes and not dry_run:
        _write(document)
    return changes


def newest(url: str, rev: str = "HEAD") -> str:
    """The commit that a branch or tag of a repository is at; raises SourceUnreachableError or UnknownNameError."""
    if re.fullmatch(r"[0-9a-f]{40}", rev):
        return rev
    done = tools.git("ls-remote", "--", url, rev, f"{rev}^{{}}", check=False)
    if done.returncode:
        raise SourceUnreachableError(
            f"{url} does not answer", cause=done.stderr.strip(), hint="check the address and the network"
        )
    found = done.stdout.split()
    if not found:
        raise UnknownNameError(f"{url} has no {rev!r}", hint="a branch, a tag or a whole commit")
    return str(found[-2])  # of an annotated tag, the commit comes after it


@contextmanager
def _history(url: str, commit: str) -> Iterator[partial[Done]]:
    """A repository's commits without their files, for as long as the context lasts: git, to ask it."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as place:
        git = partial(tools.git, env={"GIT_DIR": place})
        git("init", "--quiet", "--bare")
        git("fetch", "--quiet", "--filter=tree:0", "--", url, commit)
        yield git


def holds(url: str, commit: str, wanted: str) -> bool | None:
    """Whether a commit has another one in its history; None when its repository does not tell."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):  # a host said it, and git would take --words for options
        return None
    try:
        with _history(url, commit) as git:
            return {0: True, 1: False}.get(git("merge-base", "--is-ancestor", wanted, commit, check=False).returncode)
    except ProcessError:
        return None


def _date(git: partial[Done], commit: str) -> str:
    return git("log", "-1", "--format=%cs", commit).stdout.strip()


def _change(name: str, git: partial[Done], commits: tuple[str, str], trees: tuple[Path, Path]) -> Change:
    (old, new), (before, after) = commits, trees
    log = git("log", "--format=%h %cs %s", "--max-count=30", f"{old}..{new}", check=False)
    said = log.stdout.splitlines() if log.returncode == 0 else ["(its history was rewritten)"]
    lines = difflib.unified_diff(nodes.requirements(before), nodes.requirements(after), lineterm="", n=0)
    wanted = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    changed = [
        name
        for name in sorted(imported(before) | imported(after))
        if not ((before / name).exists() and (after / name).exists())
        or files.sha256(before / name) != files.sha256(after / name)
    ]
    return Change(name, old, new, tuple(said), tuple(wanted), tuple(changed), review.gained(before, after))


def _links(url: str, commit: str) -> set[str]:
    """The symbolic links of a commit: what is fetched has copies in their places, or was refused."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as place:
        git = partial(tools.git, env={"GIT_DIR": place})
        git("init", "--quiet", "--bare")
        git("fetch", "--quiet", "--depth=1", "--filter=blob:none", "--", url, commit)
        listed = git("ls-tree", "-r", "-z", "--full-tree", commit).stdout.split("\0")
    return {line.partition("\t")[2] for line in listed if line.startswith("120000 ")}


def imported(tree: Path) -> set[str]:
    """The files that run when ComfyUI imports a node, as far as import statements tell."""
    there = {name for name, _ in files.tree(tree)}
    found: set[str] = set()
    pending: list[str] = [name for name in ("__init__.py", "prestartup_script.py", "install.py") if name in there]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        for statement in ast.walk(foreign.python(tree / name)):
            pending += [each for each in _targets(statement, Path(name).parent) if each in there]
    return found


def _targets(statement: ast.AST, folder: Path) -> list[str]:
    """The files that an import statement in a folder may mean; nodes import their own folder as a package or not."""
    if isinstance(statement, ast.Import):
        modules = [alias.name for alias in statement.names]
        bases = [folder, Path()]
    elif isinstance(statement, ast.ImportFrom):
        start = folder
        for _ in range(statement.level - 1):
            start = start.parent
        stem = statement.module or ""
        modules = [stem, *(f"{stem}.{alias.name}".lstrip(".") for alias in statement.names)]
        bases = [start] if statement.level else [folder, Path()]
    else:
        return []
    paths = [base / module.replace(".", "/") for base in bases for module in modules]
    return [str(each) for path in paths for each in (path.with_suffix(".py"), path / "__init__.py")]


def search(workflow: Path) -> dict[str, list[str]]:
    """The node types of a workflow that ComfyUI does not have itself, each with the known nodes that name it.

    Raises ConfigError for a file that is no workflow.
    """
    try:
        content = json.loads(workflow.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{workflow} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{workflow} is no JSON: {error}", hint="save the workflow again, or export it") from None
    types = _types(content)
    if not types:
        raise ConfigError(f"{workflow} holds no nodes", hint="a workflow as ComfyUI saves or exports it")
    from deploy.application import application

    own = _named(source.fetch(application()))
    known = nodes.catalogue()
    trees = nodes.fetch(known.nodes)
    names = {name: _named(tree) for name, tree in trees.items()}
    return {each: [name for name in names if _names(names[name], each)] for each in sorted(types - own)}


def _names(strings: set[str], node_type: str) -> bool:
    """Whether a node's code names a type: as it is, or put together as in `Seed (rgthree)`."""
    parts = re.fullmatch(r"(.+) \((.+)\)", node_type)
    return node_type in strings or bool(parts and {parts[1], parts[2]} <= strings)


def _types(content: Any) -> set[str]:
    """Node types of a workflow in either form: as the editor saves it, or as the API takes it."""
    if not isinstance(content, dict):
        return set()
    listed = content.get("nodes")
    if isinstance(listed, list):
        parts = [content, *(content.get("definitions", {}) or {}).get("subgraphs", [])]
        inside = {str(part.get("id")) for part in parts[1:]}  # a subgraph's id is a type, too
        return {str(node.get("type")) for part in parts for node in part.get("nodes", [])} - inside - _EDITORS
    return {str(node["class_type"]) for node in content.values() if isinstance(node, dict) and "class_type" in node}


_EDITORS = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode", "None"}
"""Types that only the editor knows."""


def _named(tree: Path) -> set[str]:
    """Every string in a tree's Python files: node types are among them, however they are registered."""
    kept = files.cache() / "strings" / f"{tree.name}.json"
    if not kept.exists():
        found: set[str] = set()
        for path in (path for name, path in files.tree(tree) if name.endswith(".py")):
            found |= {
                node.value
                for node in ast.walk(foreign.python(path))
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 100
            }
        files.write(kept, json.dumps(sorted(found)))
    return set(json.loads(kept.read_text()))


def _document() -> tomlkit.TOMLDocument:
    path = nodes.catalogue_file()
    return tomlkit.parse(path.read_text()) if path.exists() else tomlkit.document()


def _write(document: tomlkit.TOMLDocument) -> None:
    files.write(nodes.catalogue_file(), tomlkit.dumps(document))
