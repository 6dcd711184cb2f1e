"""The audit: known vulnerabilities of the locked or deployed packages, custom nodes and ComfyUI.

Packages are looked up by `uv audit`, which queries a service with OSV's API. It audits projects only, so it gets a
lock that contains exactly these packages: nothing is resolved, and no index is queried.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import tomli
import tomlkit

from agent.schema.manifest import ReleaseManifest
from core import files, foreign, shell, source, tools
from core.console import counted
from core.errors import AuditError, SourceError
from lock import advisory, nodes, requirements
from lock import application as applications
from lock.advisory import Repository
from lock.updates import upstream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lock.advisory import Advisory


@dataclass(frozen=True)
class Inventory:
    """What to audit: packages as (name, version) with the places that list them, and repositories."""

    packages: Mapping[tuple[str, str], Sequence[str]]
    repositories: Sequence[Repository]


@dataclass(frozen=True)
class Finding:
    """One known problem; `certain` is false if Hearth cannot tell whether it applies.

    `at` is a version or a commit; `remedy` gives the affected versions or the fix; `where` lists the sources.
    `tolerated` is the reason to keep the version: the audit does not fail.
    """

    name: str
    at: str
    ids: tuple[str, ...]
    what: str
    remedy: str
    source: str
    where: tuple[str, ...] = ()
    certain: bool = True
    tolerated: str = ""


@dataclass(frozen=True)
class Audit:
    """The result: the numbers checked, the findings, and the reason if packages could not be looked up."""

    packages: int
    repositories: int
    advisories: int
    findings: tuple[Finding, ...]
    error: AuditError | None


def locked() -> Inventory:
    """Everything that this checkout locks: the lists for hosts, the tool's own lock, the nodes and ComfyUI."""
    packages: dict[tuple[str, str], list[str]] = defaultdict(list)
    listed = [applications.application(version) for version in applications.versions()]
    for app in listed:
        for stack, platform, python in requirements.combinations(app.version):
            if lock := requirements.find(stack.name, platform.value, python, app.path):
                for each in lock.versions().items():
                    packages[each].append(f"{applications.label(app)}{lock.name}")
    for package in tomli.loads((files.CHECKOUT / "uv.lock").read_text())["package"]:
        if "registry" in package["source"]:
            packages[package["name"], package["version"]].append("uv.lock")
    ours = [_node(name, each.url, each.commit, each.tree) for name, each in nodes.catalogue().nodes.items()]
    return Inventory(packages, [*(_comfyui(app.version) for app in listed), *ours])


def deployed(manifest: ReleaseManifest) -> Inventory:
    """The contents of a release, from its manifest, which must list packages."""
    packages = {each: [f"release {manifest.id}"] for each in (manifest.packages or {}).items()}
    theirs = [_node(name, each.url, each.commit, each.tree) for name, each in manifest.nodes.items()]
    return Inventory(packages, [_comfyui(manifest.version), *theirs])


def _comfyui(version: str) -> Repository:
    """ComfyUI. The version is sufficient; the address is the one that advisories use."""
    return Repository("ComfyUI", "https://github.com/Comfy-Org/ComfyUI", "", version)


def _node(name: str, url: str, commit: str, tree: str) -> Repository:
    """A node, with its own version if its tree is in the cache and declares one. Fetches nothing."""
    pinned = source.Pinned(name=name, version=commit, source=(source.Source(git=url, commit=commit),), tree=tree)
    place, version = source.cached(pinned), ""
    with suppress(SourceError):  # too large to read
        version = str(foreign.pyproject(place).get("version", "")) if place else ""
    return Repository(name, url, commit, version)


def check(inventory: Inventory, service: str = "") -> Audit:
    """Audit an inventory. `service` is the address of an OSV service (default: uv's default, OSV itself).

    The curated list is checked first, so its findings remain if the service does not answer; `error` then has the
    error.
    """
    known = advisory.advisories()
    found = [*_bad_repositories(inventory, known), *_bad_packages(inventory, known)]
    failed = None
    try:
        named = {(each.name, each.at, name) for each in found for name in each.ids}
        asked = _vulnerable(inventory, service)
        found += [each for each in asked if not any((each.name, each.at, name) in named for name in each.ids)]
    except AuditError as error:
        failed = error
    return Audit(len(inventory.packages), len(inventory.repositories), len(known), tuple(found), failed)


def _bad_repositories(inventory: Inventory, known: Sequence[Advisory]) -> Iterator[Finding]:
    for there in inventory.repositories:
        for each in advisory.of(there.url, known):
            affected = advisory.applies(each, there, upstream.holds)
            if affected is not False:
                at, certain = there.commit or there.version, affected is not None
                yield Finding(there.name, at, each.ids, each.what, each.affected, each.source, certain=certain)


def _bad_packages(inventory: Inventory, known: Sequence[Advisory]) -> Iterator[Finding]:
    for (name, version), where in inventory.packages.items():
        for bad in advisory.bad_packages({name: version}, known):
            each = bad.advisory
            found = Finding(name, version, each.ids, each.what, each.affected, each.source, tuple(where))
            yield replace(found, tolerated=each.tolerated)


def _vulnerable(inventory: Inventory, service: str) -> Iterator[Finding]:
    """The findings of `uv audit`. Raises AuditError if the audit fails."""
    words = ["audit", "--frozen", "--output-format", "json"]
    words += ["--preview-features", "audit-command,json-output"]  # both are still previews, and uv warns about that
    words += ["--service-url", service] if service else []
    with tempfile.TemporaryDirectory(prefix="hearth-") as name:
        _project(Path(name), sorted(inventory.packages))
        done = tools.uv(*words, cwd=Path(name), check=False)
    if done.returncode not in (0, 1) or not done.stdout:  # 1: vulnerabilities found
        raise AuditError(
            "audit-service",
            f"{counted(len(inventory.packages), 'package')} not looked up: uv audit failed",
            cause=shell.last_words(done, 20).removeprefix("error: "),
            hint="check the network, or name a service that speaks OSV's API: inv audit --service URL",
        )
    answer = json.loads(done.stdout)
    looked_up = answer["summary"]["audited_packages"]
    if looked_up != len(inventory.packages):
        raise AuditError(
            "audit-service",
            f"uv audit looked up {looked_up} of {counted(len(inventory.packages), 'package')}",
            cause="this uv reads a lock in another way than the one that Hearth's own lock names",
            hint="uv sync, then the same command",
        )
    for each in answer["vulnerabilities"]:
        package = each["dependency"]["name"], each["dependency"]["version"]
        ids = tuple(dict.fromkeys([each["id"], *each["aliases"]]))
        fixed = f"fixed in {', '.join(each['fix_versions'])}" if each["fix_versions"] else "no version repairs it yet"
        what = each["summary"] or (each["description"] or "").strip().partition("\n")[0]
        yield Finding(*package, ids, what, fixed, each["link"] or "", tuple(inventory.packages[package]))


def _project(place: Path, packages: Sequence[tuple[str, str]]) -> None:
    """Write a project whose lock contains exactly these packages, in uv's format.

    `registry` is a folder: with an index, uv would query the status of each package.
    """
    own, python = {"name": "audited", "version": "0"}, {"requires-python": ">=3.11"}
    listed = [{"name": name, "version": version, "source": {"registry": "."}} for name, version in packages]
    root = {**own, "source": {"virtual": "."}, "dependencies": listed}
    (place / "pyproject.toml").write_text(tomlkit.dumps({"project": {**own, **python}}))
    (place / "uv.lock").write_text(tomlkit.dumps({"version": 1, **python, "package": [root, *listed]}))


def summary(found: Audit) -> dict[str, Any]:
    """An audit for JSON; `error` is the reason why packages were not looked up."""
    return {**msgspec.to_builtins(replace(found, error=None)), "error": found.error.what if found.error else ""}


def rows(found: Audit) -> Iterator[str]:
    """The findings, then the totals."""
    for each in found.findings:
        yield f"{each.name} {each.at}: {'' if each.certain else 'possibly: '}{each.what}"
        yield f"    {'; '.join(text for text in (', '.join(each.ids), each.remedy, each.source) if text)}"
        if each.tolerated:
            yield f"    it is kept: {each.tolerated}"
        if each.where:
            yield f"    in {', '.join(each.where)}"
    by = "not looked up" if found.error else "by the vulnerability service"
    yield (
        f"{counted(len(found.findings), 'finding')}: {counted(found.packages, 'package')} ({by}); packages and "
        f"{counted(found.repositories, 'repository')} by the {found.advisories} entries of known-bad.toml"
    )
