"""The flags of the ComfyUI on a host: which are set and by what, and which exclude each other."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.schema.live import CommandLine
from core import console
from core.typed import convert
from deploy import fleet
from deploy.release import OWN_FLAGS
from deploy.survey import settings
from lock import application as applications

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from deploy.connection import Agent
    from deploy.host import Target


@dataclass(frozen=True)
class Line:
    """One flag: its arguments, the flags it excludes, its value (None: not set), and the origin of the value."""

    name: str
    takes: str
    excludes: tuple[str, ...]
    value: str | None
    origin: str


@dataclass(frozen=True)
class Difference:
    """A flag with another value in the configuration than in the release; None is not set."""

    name: str
    deployed: str | None
    configured: str | None


@dataclass(frozen=True)
class Flags:
    """All flags of a ComfyUI. Without a `release`, those that a deploy would set."""

    host: str
    version: str
    release: str
    lines: tuple[Line, ...]
    differences: tuple[Difference, ...]


def look(names: Sequence[str], *, ask_sudo: bool = False) -> list[fleet.Answer[Flags]]:
    """Read the flags of the active release on each host."""

    def one(agent: Agent, target: Target) -> Flags:
        found = convert(agent.call("flags"), CommandLine)
        app = target.host.comfyui
        text = found.text or applications.text(applications.tree(applications.application(app)), "comfy/cli_args.py")
        return compare(target, found, text)

    return fleet.ask_each(names, one, ask_sudo=ask_sudo, seconds=30)


def compare(target: Target, there: CommandLine, text: str) -> Flags:
    """Compare a host's configuration with its release, if any, for the flags in a `comfy/cli_args.py`."""
    known = applications.flags(text)
    groups: dict[str, list[str]] = {}
    for name, flag in known.items():
        if flag.group:
            groups.setdefault(flag.group, []).append(name)
    configured = target.flags
    deployed = settings(there.words) if there.release else configured

    def line(name: str, flag: applications.Flag) -> Line:
        others = tuple(each for each in groups.get(flag.group, ()) if each != name)
        value = deployed.get(name)
        return Line(name, _takes(flag), others, value, _origin(target, name, value))

    own = {name: value for name, value in deployed.items() if name not in OWN_FLAGS}
    return Flags(
        target.name,
        there.version or target.comfyui,
        there.release,
        tuple(line(name, flag) for name, flag in known.items()),
        tuple(
            Difference(name, own.get(name), configured.get(name))
            for name in sorted(own.keys() | configured.keys())
            if own.get(name) != configured.get(name)
        ),
    )


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
    return target.flag_origin(name) if same else "an earlier configuration"


def rows(seen: Iterable[Flags]) -> Iterator[str]:
    """The set flags of each host, the others, the exclusive groups, and what the next deploy would change."""
    for found in seen:
        what = f"release {found.release}" if found.release else "nothing is deployed; as configured"
        yield f"{found.host}: ComfyUI {found.version}, {what}"
        chosen = [(each.name, each.value or "yes", each.origin) for each in found.lines if each.value is not None]
        yield from console.table(("set", "to", "by"), chosen)
        unset = [(each.name, each.takes) for each in found.lines if each.value is None]
        yield from ("", *console.table(("not set", "takes"), unset))
        yield from ("", "mutually exclusive, by line:")
        for group in dict.fromkeys(tuple(sorted((each.name, *each.excludes))) for each in found.lines if each.excludes):
            text = console.line(" ".join(group))
            yield from textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
        for each in found.differences:
            there, here = ("not set" if it is None else it or "set" for it in (each.deployed, each.configured))
            yield ""
            yield f"configuration differs: {each.name} is {there} in the release, {here} in the configuration"
        if found.differences:
            yield f"to apply it: inv deploy --host {found.host}"
