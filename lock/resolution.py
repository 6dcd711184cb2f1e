"""Resolves the locked lists with uv: avoids known-bad versions; a list lacks the nodes that it has no packages for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core import console, files, shell, tools
from core.console import counted
from core.errors import LockError
from core.stack import Platform
from lock import advisory, nodes, requirements
from lock import application as applications
from lock.requirements import APP, MANAGER, OWN, LockedList

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

    from core.shell import Done
    from core.stack import Stack
    from lock.application import Application
    from lock.nodes import Catalogue


def compile_all(*, check: bool, newest: str = "") -> list[str]:
    """Compile every list of every version whose inputs changed and return their names; with `check` raise LockError.

    A list's first line contains the hash of its inputs, so checking needs no network. Raises LockError with the
    conflicting nodes, and ConfigError for a requirement that cannot be pinned; then no list is written.
    """
    known, done = nodes.catalogue(), dict[str, LockedList]()
    found = [(app, *_examined(app, known)) for app in map(applications.application, applications.versions())]
    stale = {f"{applications.label(app)}{old.name}": old for app, _, few in found for _, old, _ in few}
    if check and stale:
        changed = "ComfyUI's version, a node, the stack's torch or the extra packages changed after they were compiled"
        raise LockError(
            "lock-stale",
            f"the environments of ComfyUI are stale: {', '.join(stale)}",
            cause="\n".join(dict.fromkeys(line for old in stale.values() for line in _problems(old))) or changed,
            hint="inv lock",
        )
    for app, lists, few in found:
        try:
            lists |= {each.name: each for each in compiled(app, known, newest=newest)} if few else {}
        except LockError as error:
            error.what = f"ComfyUI {app.version}: {error.what}"
            raise
    for app, lists, few in found:
        if few:  # all: $HEARTH_APP may have had the recipe's lists
            for each in lists.values():
                files.write(app.path / "locks" / f"{each.name}.txt", each.text)
            for path in (app.path / "locks").glob("*.txt"):
                if path.stem not in lists:
                    console.say(f"removed {path.stem}: its stack does not run ComfyUI {app.version}")
                    path.unlink()
        done |= {f"{applications.label(app)}{name}": each for name, each in lists.items()}
    for line in dict.fromkeys(line for name, each in done.items() for line in _remarks(name, each)):
        console.say(line)
    return list(stale)


def compiled(app: Application, known: Catalogue, *, newest: str = "") -> list[LockedList]:
    """Compile every list whose inputs changed for this ComfyUI and these nodes, and write none.

    Packages uploaded after `newest` (RFC 3339) do not count. Raises LockError and ConfigError as `compile_all` does.
    """
    lists, stale = _examined(app, known)
    if not stale:
        return []
    asked, said = requirements.requirement_inputs(app, known), dict[str, str]()
    for stack in {old.stack: stack for stack, old, _ in stale}.values():
        _check_torch(app, stack, asked[APP])
    with (
        console.Progress("resolving", len(stale), len(stale)) as progress,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,  # uv uses one core to resolve
    ):
        jobs = [pool.submit(_renewed, *each, asked, known, newest) for each in stale]
        try:
            for done in as_completed(jobs):
                lock, reasons = done.result()
                lists[lock.name], said = lock, said | reasons
                progress.step(f"{lock.name}: ComfyUI {app.version} and {counted(len(known.nodes), 'node')}", 1, 0)
        finally:  # after an error, no other list matters
            pool.shutdown(wait=False, cancel_futures=True)
    _check([*lists.values()], said)
    for name in sorted(_idle(app, known, lists, stale, asked)):
        console.say(f"warning: [override] of nodes.toml has {name}, which nothing requires")
    return [lists[old.name] for _, old, _ in stale]


def _examined(app: Application, known: Catalogue) -> tuple[dict[str, LockedList], list[tuple[Stack, LockedList, str]]]:
    """All lists by name, and those whose inputs changed, each with its stack and its new first line."""
    lists: dict[str, LockedList] = {}
    stale: list[tuple[Stack, LockedList, str]] = []
    for stack, platform, python in requirements.combinations(app.version):
        hashes = f"ComfyUI {_inputs(app, stack)} and nodes {requirements.nodes_hash(known)}"
        first = f"# Compiled by `inv lock` from {hashes}; do not edit.\n"
        new = LockedList(stack.name, platform.value, python, "")
        old = lists[new.name] = requirements.find(stack.name, platform.value, python, app.path) or new
        if not old.text.startswith(first) or _problems(old):
            stale.append((stack, old, first))
    return lists, stale


def _check_torch(app: Application, stack: Stack, asked: Iterable[str]) -> None:
    """Raise LockError if ComfyUI requires another torch than its stack has; uv is told to ignore that."""
    pinned = dict(each.split("==") for each in requirements.trio(stack))
    for each in filter(None, map(requirements.parsed, asked)):
        version = pinned.get(canonicalize_name(each.name))
        if version and not each.specifier.contains(version, prereleases=True):
            raise LockError(
                "resolution",
                f"{each} is required, and the stack {stack.name} has {version}",
                hint=f'move the stack: inv update stack. Or exclude it: comfyui = "<{app.version}" below '
                f"[{stack.name}] in config/stacks.toml",
            )


def _renewed(
    stack: Stack, old: LockedList, first: str, asked: Mapping[str, Sequence[str]], known: Catalogue, newest: str
) -> tuple[LockedList, dict[str, str]]:
    """A stale list's replacement, and uv's explanation for each node that it lacks; raises LockError."""
    second, reasons = f"# What they ask for: {asked_hash(asked, known, stack)}\n", dict[str, str]()
    body = old.text.partition(second)[2]
    if not body or _problems(old):  # otherwise: new code, same needs
        with tempfile.TemporaryDirectory(prefix="hearth-") as place:
            body, reasons = Resolver(Path(place), asked, known, stack, old, newest).compiled()
    return replace(old, text=first + second + body), reasons


def _idle(
    app: Application,
    known: Catalogue,
    lists: Mapping[str, LockedList],
    stale: Iterable[tuple[Stack, LockedList, str]],
    asked: Mapping[str, Sequence[str]],
) -> set[str]:
    """The packages of [override] that ComfyUI and the nodes do not require, nor do their packages on any platform."""
    left = set(known.override) - (requirements.named(app, known) if known.override else set())
    for stack, old in {old.platform: (stack, old) for stack, old, _ in stale}.values():
        left -= lists[old.name].versions().keys()
        if left:
            with tempfile.TemporaryDirectory(prefix="hearth-") as place:
                left -= Resolver(Path(place), asked, known, stack, lists[old.name]).needed(left)
    return left


def _inputs(app: Application, stack: Stack) -> str:
    """The hash of a list's inputs except the nodes."""
    inputs = [app.tree, app.extra, app.manager, requirements.trio(stack)]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def _other(name: str, requirement: str) -> bool:
    """Whether an override replaces the package by another one, or by none."""
    return not requirement or canonicalize_name(Requirement(requirement).name) != canonicalize_name(name)


def asked_hash(asked: Mapping[str, Sequence[str]], known: Catalogue, stack: Stack) -> str:
    """The hash of all requirements that a list resolves; it is in the list's second line."""
    decided = {name: each.requirement for name, each in known.override.items()}
    listed = json.dumps([asked, decided, requirements.trio(stack)], sort_keys=True)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def _problems(lock: LockedList) -> list[str]:
    """Why a list must be resolved again although its inputs are the same: known-bad versions, and clashes."""
    try:
        versions = lock.versions()
    except LockError as error:
        return [error.what]
    bad = [each.said for each in advisory.bad_packages(versions) if not each.advisory.tolerated]
    return [*bad, *(f"{' and '.join(names)} install the same files" for names in advisory.clashing(versions))]


def _check(lists: Sequence[LockedList], said: Mapping[str, str]) -> None:
    """Raise LockError for nodes that no list has, and for packages that overwrite each other's files.

    `said` is uv's explanation for each node that some list lacks.
    """
    place = nodes.catalogue_file()
    if nowhere := sorted(set[str].intersection(*(set(each.unavailable) for each in lists))):
        raise LockError(
            "resolution",
            f"no platform and Python has packages that meet the requirements of {', '.join(nowhere)}",
            cause="\n".join(said.get(name, lists[0].unavailable[name]) for name in nowhere),
            hint=f"list it in [left-out]: {place}, or set the package there with [override.PACKAGE] and a reason",
        )
    for lock in lists:
        for keep, *others in advisory.clashing(lock.versions()):
            raise LockError(
                "same-files",
                f"{' and '.join([keep, *others])} install the same files: only one would remain ({lock.name})",
                cause="\n".join(
                    f"{each} is required by {', '.join(lock.requesters(each))}" for each in [keep, *others]
                ),
                hint=f"choose one below [override] of {place}: "
                + "; ".join(f'{each} = {{ requirement = "{keep}", why = "..." }}' for each in others),
            )


def _remarks(name: str, lock: LockedList) -> Iterator[str]:
    """What a user should know about a list: known-bad versions that it keeps, and nodes that it lacks."""
    for each in advisory.bad_packages(lock.versions()):
        yield f"warning: {each.said}; it is kept: {each.advisory.tolerated}"
    for node, reason in lock.unavailable.items():
        yield f"{name} lacks {node}: {reason}"


_UNSOLVABLE = "No solution found"
"""uv's words for a conflict. Other failures, such as of the network, exclude no node."""


class Resolver:
    """Resolves one list in a folder with the requirements files that uv gets."""

    def __init__(
        self,
        place: Path,
        asked: Mapping[str, Sequence[str]],
        known: Catalogue,
        stack: Stack,
        old: LockedList,
        newest: str = "",
    ) -> None:
        self.limit = ["--exclude-newer", newest] if newest else []
        self.place, self.asked, self.known, self.old, self.platform = place, asked, known, old, Platform(old.platform)
        self.nodes = [file for file in asked if file.endswith(".node.txt")]
        self.avoided: dict[str, str] = {}  # known-bad versions as constraints, each with its description
        pinned = requirements.trio(stack)
        for file, lines in asked.items():
            constraints = requirements.constraints_of(file)
            head = [f"-c {constraints}"] if constraints in asked else []
            listed = [*head, *(pinned if file == OWN else []), *map(requirements.plain, lines)]
            (place / file).write_text("".join(f"{line}\n" for line in listed))
        decided = [each.requirement for each in known.override.values() if each.requirement]
        (place / "overrides").write_text("\n".join([*pinned, *decided]) + "\n")
        # uv cannot replace one package by another: exclude it for dependencies; the nodes' own lines are already
        # replaced.
        gone = [name for name, each in known.override.items() if _other(name, each.requirement)]
        (place / "excludes").write_text("\n".join(gone))
        (place / "avoided").write_text("")
        if old.text:  # uv keeps the pins of an existing output file where possible
            (place / "list").write_text(old.text)

    def compiled(self) -> tuple[str, dict[str, str]]:
        """The list, which begins with the nodes that it lacks, and uv's explanation for each; raises LockError."""
        said = {file: reason for file in self.nodes if (reason := self.unfit(file))}
        done = self._resolve_all(said)
        alone: dict[str, Done] = {}
        if done.returncode:
            if (own := self._uv([APP, OWN])).returncode:
                raise self._impossible(own)
            alone = self._each(lambda file: [APP, OWN, file], self._suspects())
        fresh = {file: each.stderr for file, each in alone.items() if _UNSOLVABLE in each.stderr}
        if fresh and f"{MANAGER}.node.txt" not in fresh:
            said |= fresh
            done = self._resolve_all(said)
        if done.returncode:
            raise self._conflict(
                done, [file for file, each in alone.items() if each.returncode > 0 and file not in said]
            )
        lacking = {file.removesuffix(".node.txt"): text for file, text in said.items()}
        for name in self.known.nodes:
            if name not in lacking and (missing := sorted(nodes.closure(self.known, [name]) & lacking.keys())):
                lacking[name] = f"it requires the node {missing[0]}"
        lines = [f"# Without {name}: {_reason(text)}\n" for name, text in lacking.items()]
        listed = (self.place / "list").read_text().replace("\n    #   -c avoided", "")
        return "".join(lines) + listed, lacking

    def _resolve_all(self, without: Iterable[str]) -> Done:
        """Resolve the list; again as long as it contains known-bad versions that can be avoided."""
        files = [APP, OWN, *(file for file in self.nodes if file not in without)]
        while (done := self._uv(files, "--output-file", "list")).returncode == 0:
            versions = replace(self.old, text=(self.place / "list").read_text()).versions()
            bad = {
                each.constraint: each.said for each in advisory.bad_packages(versions) if not each.advisory.tolerated
            }
            if not bad:
                break
            self.avoided |= bad
            (self.place / "avoided").write_text("\n".join(self.avoided))
        return done

    def _uv(self, chosen: Iterable[str], *more: str) -> Done:
        words = ["pip", "compile", "--quiet", "--no-header", "--generate-hashes", "--only-binary", ":all:"]
        words += ["--python-version", self.old.python, "--python-platform", self.platform.uv_name]
        words += ["--overrides", "overrides", "--excludes", "excludes", "--constraints", "avoided", *self.limit]
        return tools.uv(*words, *more, *chosen, "--python", sys.executable, cwd=self.place, check=False)

    def needed(self, names: Set[str]) -> Set[str]:
        """The packages among these that the list has if [override] does not exclude them; all if that is not known."""
        excluded = (self.place / "excludes").read_text().splitlines()
        (self.place / "excludes").write_text("\n".join(each for each in excluded if each not in names))
        lacking = {f"{name}.node.txt" for name in self.old.unavailable}
        done = self._uv([APP, OWN, *(file for file in self.nodes if file not in lacking)])
        return names if done.returncode else names & replace(self.old, text=done.stdout).versions().keys()

    def _suspects(self) -> list[str]:
        """The nodes that may have requirements that cannot be met: only new ones, if the others still fit together."""
        known = set[str]()
        with suppress(LockError):  # a damaged list
            known = self.old.files
        former = [file for file in self.nodes if file in known]
        fit = former and self._uv([APP, OWN, *former]).returncode == 0
        return [file for file in self.nodes if not (fit and file in former)]

    def _each(self, chosen: Callable[[str], list[str]], nodes: Sequence[str]) -> dict[str, Done]:
        with ThreadPoolExecutor() as pool:
            return dict(zip(nodes, pool.map(lambda file: self._uv(chosen(file)), nodes), strict=True))

    def unfit(self, file: str) -> str:
        """Why a node cannot have a wheel that it pins by address; uv does not look at its tags."""
        python = self.old.python
        for requirement in map(Requirement, self.asked[file]):
            wheel = requirements.wheel(requirement.url or "")
            applies = wheel and requirements.applies(requirement, self.platform, python)
            if wheel and applies and not wheel[2] & {*requirements.tags(self.platform, python)}:
                return f"{requirement.url} is not for {self.platform.value}, Python {python}"
        return ""

    def _impossible(self, done: Done) -> LockError:
        """The error for uv's failure with ComfyUI alone, without any node."""
        what, hint = f"uv did not finish {self.old.name}", "free some memory, then run the same command again"
        if _UNSOLVABLE in done.stderr:
            what = f"no set of versions meets the requirements of ComfyUI itself ({self.old.name})"
            hint = f"set the package below [override.PACKAGE] of {nodes.catalogue_file()}, with a reason"
        elif done.returncode > 0:
            what, hint = f"uv could not resolve {self.old.name}", "check the network and the index"
        return LockError("resolution", what, cause=self._cause(done), hint=hint)

    def _cause(self, done: Done) -> str:
        said = shell.last_words(done, 100).replace(".node.txt", "")
        return "\n".join([said, *(f"avoided: {each}" for each in self.avoided.values())])

    def _conflict(self, done: Done, bad: Sequence[str]) -> LockError:
        if done.returncode < 0:
            return self._impossible(done)
        without = self._each(lambda file: [APP, OWN, *(each for each in self.nodes if each != file)], self.nodes)
        names = [file.removesuffix(".node.txt") for file in bad]
        helps = [file.removesuffix(".node.txt") for file, each in without.items() if each.returncode == 0]
        return LockError(
            "resolution",
            f"no set of versions meets all requirements of ComfyUI and its nodes ({self.old.name})",
            cause=self._cause(done),
            hint=(f"not available even alone: {', '.join(names)}. " if names else "")
            + (
                f"it resolves without {' or without '.join(helps)}: move it to [left-out]"
                if helps
                else "move several nodes to [left-out]"
            )
            + f" in {nodes.catalogue_file()}, or set the package there with [override.PACKAGE] and a reason",
        )


def _reason(said: str) -> str:
    """One line that explains why a node's requirements cannot be met: uv's hint about wheels, if there is one."""
    hints = re.findall(r"hint: (.*[Ww]heel.*)", said)
    return hints[0] if hints else "no versions of its packages fit together here" if "\n" in said else said
