"""The flags of the ComfyUI that a host runs: which exclude each other, which are set, and by what."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from core import console, foreign, source
from deploy.release import OWN_FLAGS
from lock import application as applications
from ops import fleet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploy.connection import Agent
    from deploy.host import Target


@dataclass(frozen=True)
class Line:
    """One flag: what it takes, which others it excludes, what it is set to there (None: it is not), and by what."""

    name: str
    takes: str
    excludes: tuple[str, ...]
    value: str | None
    origin: str


@dataclass(frozen=True)
class Difference:
    """A flag that the configuration sets otherwise than the release; None where it is not set."""

    name: str
    deployed: str | None
    configured: str | None


@dataclass(frozen=True)
class Flags:
    """All flags of a ComfyUI. Without a `release` it is the one that would be deployed, as the host is configured."""

    host: str
    version: str
    release: str
    lines: tuple[Line, ...]
    differences: tuple[Difference, ...]


def look(names: Sequence[str], *, ask_sudo: bool = False) -> list[fleet.Answer[Flags]]:
    """The flags of the releases in service on hosts."""

    def one(agent: Agent, target: Target) -> Flags:
        found = agent.call("flags")
        text = found["text"] or foreign.text(source.fetch(applications.application()) / "comfy/cli_args.py")
        return compare(target, found["release"], text)

    return fleet.ask_each(names, one, ask_sudo=ask_sudo, seconds=30)


def compare(target: Target, release: Mapping[str, Any], text: str) -> Flags:
    """What a host's configuration sets of the flags in a `comfy/cli_args.py`, against its release (empty: none)."""
    known = applications.flags(text)
    groups: dict[str, list[str]] = {}
    for name, flag in known.items():
        if flag.group:
            groups.setdefault(flag.group, []).append(name)
    configured = target.flags
    argv = release["argv"][release["argv"].index(f"{release['code']}/main.py") + 1 :] if release else ()
    deployed = given(argv) if release else configured

    def line(name: str, flag: applications.Flag) -> Line:
        others = tuple(each for each in groups.get(flag.group, ()) if each != name)
        value = deployed.get(name)
        return Line(name, _takes(flag), others, value, _origin(target, name, value))

    own = {name: value for name, value in deployed.items() if name not in OWN_FLAGS}
    return Flags(
        target.name,
        release.get("version") or target.comfyui,
        release.get("id", ""),
        tuple(line(name, flag) for name, flag in known.items()),
        tuple(
            Difference(name, own.get(name), configured.get(name))
            for name in sorted(own.keys() | configured.keys())
            if own.get(name) != configured.get(name)
        ),
    )


def given(argv: Sequence[str]) -> dict[str, str]:
    """The flags of a command line with their values; of one that is there twice the last, as ComfyUI takes it."""
    found: dict[str, str] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = f"{found[name]} {word}".strip()
    return found


def _takes(flag: applications.Flag) -> str:
    if flag.values == "0":
        return ""
    one = "|".join(flag.choices) or {"int": "number", "float": "number"}.get(flag.kind, "text")
    return {"1": one, "?": f"[{one}]", "*": f"[{one} ...]", "+": f"{one} ..."}.get(flag.values, f"{one} x{flag.values}")


def _origin(target: Target, name: str, value: str | None) -> str:
    if value is None:
        return ""
    if name in OWN_FLAGS:
        return "Hearth"
    same = target.flags.get(name) == value
    return target.origin.get(f"flags.{name}", "") if same else "an earlier configuration"


def show(answers: Sequence[fleet.Answer[Flags]], *, as_json: bool) -> int:
    """Print the flags of hosts; 1 when one of several did not tell them. Raises the error of one that is alone."""
    seen = fleet.heard(answers)
    if as_json:
        console.data_json([msgspec.to_builtins(each) for each in seen.values()])
    else:
        for each in seen.values():
            _print(each)
    return int(len(seen) < len(answers))


def _print(found: Flags) -> None:
    """Flags that are set first, then the others, then what would change with the next deploy."""
    what = f"release {found.release}" if found.release else "nothing is deployed; as configured"
    console.data(console.line(f"{found.host}: ComfyUI {found.version}, {what}"))
    unset = [each for each in found.lines if each.value is None]
    chosen = [each for each in found.lines if each.value is not None]
    rows = [(each.name, each.value or "yes", each.origin) for each in chosen]
    console.table(("set", "to", "by"), rows)
    console.data("")
    console.table(("not set", "takes"), [(each.name, each.takes) for each in unset])
    console.data("\nof each of these lines only one:")
    for group in dict.fromkeys(tuple(sorted((each.name, *each.excludes))) for each in found.lines if each.excludes):
        line = console.line(" ".join(group))
        console.data(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False))
    for each in found.differences:
        there, here = ("not set" if value is None else value or "set" for value in (each.deployed, each.configured))
        console.data("")
        console.data(console.line(f"the configuration differs: {each.name} is {there} there, and {here} in it"))
    if found.differences:
        console.data(f"inv deploy --host {found.host} makes it so")
