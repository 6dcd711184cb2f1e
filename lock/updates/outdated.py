"""Lists what upstream has newer versions of: ComfyUI, nodes, stacks, kernels, uv and the tool's packages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from packaging.version import Version

from core import config, console, lockfile, workspace
from core.errors import HearthError
from core.stack import stacks
from lock import application, nodes
from lock.updates import packages, releases, upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from core.stack import Stack
    from lock.updates.proposal import Request


@dataclass(frozen=True)
class Entry:
    """A pinned version and the newest one, which is the same if nothing is newer. `days` is the age of the newest."""

    part: str
    name: str
    pinned: str
    newest: str
    days: int | None = None
    note: str = ""


PARALLEL = 32
"""Parallel requests; each mostly waits for its server."""


def outdated(wanted: Request) -> tuple[list[Entry], dict[str, Exception]]:
    """Compare all pins of the requested parts with upstream, in parallel; also the errors of what did not answer."""
    failures: dict[str, Exception] = {}
    jobs = dict(_jobs(wanted))

    def run(name: str) -> list[Entry]:
        try:
            return jobs[name]()
        except (HearthError, OSError, ValueError) as error:
            failures[name] = error
            return []

    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        return [entry for found in pool.map(run, jobs) for entry in found], failures


def _jobs(wanted: Request) -> Iterator[tuple[str, Callable[[], list[Entry]]]]:
    """What to look up, each with its name."""
    if wanted.includes("comfyui"):
        yield "ComfyUI", partial(_comfyui, wanted)
    if wanted.includes("stack"):
        for stack in stacks().values():
            yield f"stack {stack.name}", partial(_stack, stack, wanted)
    if wanted.includes("nodes"):
        for name, node in nodes.catalogue().nodes.items():
            yield name, partial(_repository, "nodes", name, node.url, node.commit, wanted)
    if wanted.includes("kernels"):
        for path in sorted((workspace.current().checkout / "recipes").glob("*/recipe.toml")):
            recipe = config.table(path)
            origin = recipe["source"][0]
            if "git" in origin:
                job = partial(_repository, "kernels", recipe["name"], origin["git"], origin["commit"], wanted)
                yield f"kernel {path.parent.name}", job
            elif "sdist" in origin:
                job = partial(_package, "kernels", origin["sdist"], origin["version"], wanted)
                yield f"kernel {path.parent.name}", job
    if wanted.includes("tool"):
        locked, known = lockfile.versions(), stacks()
        pins = {
            name: each for extra, pin in packages.pinned().items() if extra not in known for name, each in pin.items()
        }
        for name, version in {**{name: locked[name] for name in packages.tool_packages()}, **pins}.items():
            yield name, partial(_package, "tool", name, version, wanted)


def _comfyui(wanted: Request) -> list[Entry]:
    app = application.application()
    known = upstream.releases(releases.origin(app).git)
    commits = {each: commit for each, commit in known.items() if Version(each) > Version(app.version)}
    dates = releases.dated(app, commits)
    notes = [each for each in [releases.moved_tag(app, known)] if each]
    for name, bad in releases.examined(app, commits, dates, wanted):
        if not bad:
            return [Entry("comfyui", "ComfyUI", app.version, name, _days(dates[known[name]]), "; ".join(notes))]
        notes.append(f"{name}: {bad[0]}")
    return [Entry("comfyui", "ComfyUI", app.version, app.version, note="; ".join(notes))]


def _repository(part: str, name: str, url: str, pinned: str, wanted: Request) -> list[Entry]:
    if wanted.before:
        newest = upstream.newer(url, pinned, wanted.before)
        date = upstream.dates(url, [newest])[newest]
    else:
        newest, date = upstream.latest(url)
    return [Entry(part, name, pinned[:9], newest[:9], _days(date) if newest != pinned else None)]


def _stack(stack: Stack, wanted: Request) -> list[Entry]:
    now = packages.pinned()[stack.name]
    found = {"torch": now["torch"], **packages.newer(stack, wanted)}
    dates = {name: upstream.package(name, version=new).date for name, new in found.items() if new != now[name]}
    return [
        Entry("stack", f"{stack.name} {name}", now[name], new, _days(dates.get(name)), stack.deprecated)
        for name, new in found.items()
    ]


def _package(part: str, name: str, pinned: str, wanted: Request) -> list[Entry]:
    found = upstream.package(name, wanted.before)
    newer = all(Version(found.version) > Version(each) for each in pinned.split(", "))
    return [Entry(part, name, pinned, found.version if newer else pinned, _days(found.date) if newer else None)]


def _days(date: datetime | None) -> int | None:
    return (datetime.now(UTC) - date).days if date else None


def rows(found: Sequence[Entry], failures: Mapping[str, Exception]) -> Iterator[str]:
    """A table of what is outdated, and the number of the others."""
    old = [each for each in found if each.newest != each.pinned]
    cells = [(e.part, e.name, e.pinned, e.newest, "-" if e.days is None else f"{e.days} d", e.note) for e in old]
    yield from console.table(("part", "name", "pinned", "newest", "age", ""), cells) if cells else ()
    yield from (f"{each.name} {each.pinned}: {each.note}" for each in found if each not in old and each.note)
    yield f"{len(found) - len(old)} up to date, {len(old)} outdated, {len(failures)} not examined"
