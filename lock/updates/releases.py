"""Releases of ComfyUI: finds the newest good one among the tags of its repository, and pins it in app.toml."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import msgspec
import tomlkit
from packaging.utils import canonicalize_name
from packaging.version import Version

from core import files, source
from core.errors import ConfigError, SourceError, UsageError, suggest
from lock import advisory, application, requirement_files, requirements
from lock.updates import upstream
from lock.updates.proposal import Move

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from lock.application import Application
    from lock.updates.proposal import Proposal, Request


def origin(app: Application) -> source.Source:
    """The git source of ComfyUI; raises ConfigError."""
    found = next((each for each in app.source if each.git), None)
    if found is None:
        raise ConfigError(
            "config", f"{app.path}/app.toml names no git source", hint="add a [[source]] with git, commit"
        )
    return found


def move(wanted: Request, made: Proposal) -> None:
    """Move to the newest ComfyUI that is not known to be bad, or to the requested one."""
    channel = wanted.channel
    fresh = channel and application.moving(channel) != channel  # it has no version yet, or its folder was deleted
    app = application.application(application.moving(channel))
    url, to = origin(app).git, wanted.to.removeprefix("v")
    known = upstream.releases(url)
    newer = [each for each in known if Version(each) > Version(app.version)]
    if to and to not in known:
        hint = f"{suggest(to, known)}; newer than {app.version}: {', '.join(newer[:10]) or 'none'}"
        raise UsageError("unknown-name", f"{url} has no tag v{to}", hint=hint)
    if problem := moved_tag(app, known):
        if to == app.version in known:
            raise SourceError("tag-moved", problem, hint="find out why; to accept it, edit app.toml and run inv lock")
        made.warnings.append(problem)
    commits = {each: known[each] for each in ([to] if to else newer) if each != app.version}
    dates = dated(app, commits)
    for name, bad in examined(app, commits, dates, wanted):
        if to or not bad:
            break
        made.skipped.append(f"ComfyUI {name}: {bad[0]}")
    else:
        if fresh:  # the pinned one is the newest
            application.set_channel(channel, app.version)
            made.moves.append(Move("comfyui", f"ComfyUI ({channel})", "none", app.version))
        return
    notes = [f"known problem: {each}" for each in bad]
    if place := _place(wanted, app.version, name):
        notes += ["only git carries this version: app.toml's other sources were removed"] * (len(app.source) > 1)
        pinned = _pinned(app, name, known[name])
        _write(msgspec.structs.replace(pinned, folder=str(place)), f"v{name}, {dates[known[name]]:%Y-%m-%d}")
    title = f"ComfyUI ({channel})" if channel else "ComfyUI"
    made.moves.append(Move("comfyui", title, app.version, name, f"{dates[known[name]]:%Y-%m-%d}", tuple(notes)))


def _place(wanted: Request, old: str, new: str) -> Path | None:
    """The folder of a new version: that of the pinned one, or of a channel's; None if this version is there already.

    Keeps the old one if a host or a channel selects it.
    """
    if not wanted.channel:
        if old in {*application.channels().values(), *wanted.kept} and new != old:
            application.copied(old)
        return application.folder()
    application.set_channel(wanted.channel, new)
    return None if new in application.versions() else application.copied(new)


def dated(app: Application, commits: Mapping[str, str]) -> dict[str, datetime]:
    """When versions were made, by commit. Meanwhile fetches what the first one requires: it is usually taken."""
    with ThreadPoolExecutor(1) as pool:
        if first := next(iter(commits.values()), ""):
            pool.submit(_lists, app, first)  # an error comes again when the version is examined
        return upstream.dates(origin(app).git, commits.values())


AHEAD = 8
"""Versions that are examined at the same time, once the newest one is bad."""


def examined(
    app: Application, commits: Mapping[str, str], dates: Mapping[str, datetime], wanted: Request
) -> Iterator[tuple[str, list[str]]]:
    """The versions with their problems, in the same order. Nothing more is fetched if the first one is good."""

    def one(name: str) -> tuple[str, list[str]]:
        return name, problems(app, name, commits[name], dates[commits[name]], wanted)

    names = [*commits]
    yield from map(one, names[:1])
    with ThreadPoolExecutor(max_workers=AHEAD) as pool:
        for start in range(1, len(names), AHEAD):
            yield from pool.map(one, names[start : start + AHEAD])


def problems(app: Application, version: str, commit: str, date: datetime, wanted: Request) -> list[str]:
    """Why not to take a version: it is known to be bad, requires what is, or is younger than the cool-down."""
    if wanted.before and date > wanted.before:
        return [f"of {date:%Y-%m-%d}: younger than the cool-down"]
    bad = [each for each in advisory.of(origin(app).git, advisory.advisories()) if each.has(version)]
    try:
        listed = _required(app, commit)
    except (SourceError, ConfigError) as error:
        if error.kind == "source-unreachable":
            raise
        return [f"{error.what}: {error.cause}"]
    asked = filter(None, map(requirements.parsed, (*listed.requirements, *listed.constraints)))
    pins = [each for each in asked if re.fullmatch(r"==[^,*]+", str(each.specifier))]
    exact: dict[str, str] = {canonicalize_name(each.name): str(each.specifier)[2:] for each in pins}
    return [*(f"{each.what} ({each.source})" for each in bad), *(each.said for each in advisory.bad_packages(exact))]


def _required(app: Application, commit: str) -> requirement_files.Listed:
    """What ComfyUI requires at a commit; raises SourceError, and ConfigError for files that cannot be read."""
    if not (found := requirement_files.read(_lists(app, commit))).requirements:
        raise _other(origin(app).git, commit, "its requirements.txt names no packages")
    return found


def _other(url: str, commit: str, cause: str) -> SourceError:
    hint = "choose another version with --to, or another repository in app.toml"
    return SourceError("not-comfyui", f"{url} is not a ComfyUI at commit {commit[:9]}", cause=cause, hint=hint)


def _lists(app: Application, commit: str) -> Path:
    """The requirements files of ComfyUI at a commit; raises SourceError for another program."""
    return source.fetch(_requirements(msgspec.structs.replace(origin(app), commit=commit)))


@cache  # the commit that is chosen was examined before
def _requirements(at: source.Source) -> source.Pinned:
    """The pinned requirements files of a source; raises SourceError for another program than ComfyUI."""
    names = _names(at)
    if missing := sorted({"main.py", "nodes.py", "folder_paths.py", "requirements.txt", "comfy/cli_args.py"} - names):
        raise _other(at.git, at.commit, f"it lacks {', '.join(missing)}")
    paths = (*(each for each in names if re.fullmatch(r"[^/]*\.txt|(?:requirements|constraints)[^/]*/.*", each)),)
    recipe = source.Pinned(name="requirements", version=at.commit[:9], source=(at,), tree="", paths=paths)
    return source.pin(recipe)


def _names(at: source.Source) -> set[str]:
    """The files of a commit, below the source's folder."""
    below = f"{at.subfolder}/" if at.subfolder else ""
    return {each.removeprefix(below) for each in upstream.entries(at.git, at.commit) if each.startswith(below)}


def between(old: str, new: str, wanted: Request) -> Iterator[str]:
    """The good versions between two, the highest first."""
    app = application.application()
    known = upstream.releases(origin(app).git)
    commits = {each: commit for each, commit in known.items() if Version(old) < Version(each) < Version(new)}
    dates = dated(app, commits)
    return (name for name, bad in examined(app, commits, dates, wanted) if not bad)


def moved_tag(app: Application, known: Mapping[str, str]) -> str:
    """What is wrong with the tag of the pinned ComfyUI: it was moved or deleted."""
    pinned = origin(app).commit
    if app.version not in known:
        return f"the tag v{app.version} of the pinned ComfyUI does not exist; commit {pinned[:9]} stays pinned"
    if known[app.version] != pinned:
        return f"the tag v{app.version} is at commit {known[app.version][:9]}, but {pinned[:9]} is pinned"
    return ""


def _pinned(app: Application, version: str, commit: str) -> Application:
    """The application at a commit: its paths, manager and tree."""
    at = msgspec.structs.replace(origin(app), commit=commit)
    _required(app, commit)
    names, lists = _names(at), _lists(app, commit)
    kept = [each for each in app.paths if any(name == each or name.startswith(f"{each}/") for name in names)]
    fresh = {each.partition("/")[0] for each in names} - {each.partition("/")[0] for each in app.paths}
    paths = sorted([*kept, *(each for each in fresh if not _LEFT_OUT.fullmatch(each))]) if app.paths else []
    manager = requirement_files.read(lists, _MANAGER).requirements if (lists / _MANAGER).exists() else []
    new = msgspec.structs.replace(app, version=version, source=(at,), paths=tuple(paths), tree="")
    return source.pin(msgspec.structs.replace(new, manager=next(iter(manager), "")))


_MANAGER = "manager_requirements.txt"

# Top-level entries that do not run: tests, other systems' scripts, examples, and folders that data/ has in their place.
_LEFT_OUT = re.compile(
    r"\..*|tests.*|.*\.(?:bat|ps1|sh|ini|example|ipynb)|CODEOWNERS|CONTRIBUTING.*|notebooks|script_examples"
    r"|new_updater\.py|manager_requirements\.txt|input|output|models|AGENTS\.md|CLAUDE\.md|QUANTIZATION\.md|SECURITY\.md"
)


def _write(app: Application, comment: str) -> None:
    """Write a pinned application to app.toml, and keep its comments and the other keys."""
    path = app.path / "app.toml"
    document = tomlkit.parse(path.read_text())
    document["version"], document["tree"] = app.version, app.tree
    if "manager" in document or app.manager:
        document["manager"] = app.manager
    if "paths" in document and [*document["paths"]] != [*app.paths]:
        lines = [""]
        for word in (f"{tomlkit.string(each).as_string()}, " for each in app.paths):
            lines += [word] if len(lines[-1] + word) > 116 else [lines.pop() + word]
        text = "".join(f"    {line.rstrip()}\n" for line in lines)
        document["paths"] = tomlkit.parse(f"paths = [\n{text}]")["paths"]
    sources = document["source"]
    for index in reversed(range(len(sources))):
        if "git" not in sources[index]:
            del sources[index]
    sources[0]["commit"] = app.source[0].commit
    sources[0]["commit"].comment(comment)
    files.write(path, tomlkit.dumps(document).rstrip() + "\n")
