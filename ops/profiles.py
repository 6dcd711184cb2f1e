"""Explains profiles and modes: their settings, the reasons, the versions, and the stacks that each applies to."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core import console
from core.errors import UsageError, suggest
from core.stack import find_stack, stacks
from deploy import host as hosts
from deploy import profile as loaded
from lock import application

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from deploy.profile import Mode, Override, Profile, Setting


@dataclass(frozen=True)
class Line:
    """One flag, variable or other value. `stacks` are those it applies to, with the ComfyUI of the explanation.

    `machines` is the kind of machine that a mode's setting is for.
    """

    name: str
    value: str
    why: str
    versions: str
    stacks: tuple[str, ...]
    machines: str = ""


@dataclass(frozen=True)
class Explained:
    """A profile or mode, for a version of ComfyUI."""

    name: str
    kind: str
    summary: str
    about: Mapping[str, str]
    lines: tuple[Line, ...]
    comfyui: str


SEPARATE, UNIFIED = "separate GPU memory", "shared memory"


def every(host: str = "") -> list[Explained]:
    """All profiles, then all modes, for the ComfyUI that a host selects (default: the pinned one)."""
    selected = [hosts.hosts().hosts[name].comfyui for name in (hosts.select(host, "") if host else ())]
    comfyui = application.version(*selected)
    return [
        *(_profile(name, each, comfyui) for name, each in loaded.profiles().items()),
        *(_mode(name, each, comfyui) for name, each in loaded.modes().items()),
    ]


def one(name: str, host: str = "") -> Explained:
    """Find a profile or mode by name, for the ComfyUI of a host as in `every`; raises UsageError."""
    known = {each.name: each for each in every(host)}
    if name not in known:
        raise UsageError("unknown-name", f"there is no profile or mode {name!r}", hint=suggest(name, known))
    return known[name]


def _profile(name: str, profile: Profile, comfyui: str) -> Explained:
    stack = find_stack(profile.stack)
    about = {
        "stack": f"{stack.name}: torch {stack.torch}, CUDA {stack.cuda}, driver {stack.driver} or newer",
        "Python": ", ".join(profile.pythons),
        "arch": profile.arch,
        "kernels": ", ".join(profile.kernels) or "none",
        "nodes": ", ".join(profile.nodes) or "none",
        "limits": f"{profile.memory_max or 'no limit'} of memory, {profile.start_seconds} s to start",
        "restart": profile.restart,
        "devices": f"policy {profile.device_policy}" if profile.cuda else "none",
    }
    return Explained(name, "profile", profile.summary, _said(about), tuple(_settings(profile, comfyui)), comfyui)


def _mode(name: str, mode: Mode, comfyui: str) -> Explained:
    about = {
        "excludes": ", ".join(mode.excludes),
        "develop": "the host can name folders of nodes under development" if mode.develop else "",
    }
    lines = [*_settings(mode, comfyui), *_plain(mode)]
    if mode.on_unified:
        lines = [replace(each, machines=SEPARATE) for each in lines]
        lines += [replace(each, machines=UNIFIED) for each in _settings(mode.on_unified, comfyui)]
    return Explained(name, "mode", mode.summary, _said(about), tuple(lines), comfyui)


def _said(about: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in about.items() if text}


def _settings(given: Profile | Override, comfyui: str) -> Iterator[Line]:
    known = stacks()

    def line(name: str, setting: Setting) -> Line:
        active = tuple(each.name for each in known.values() if setting.active(each.torch, comfyui))
        return Line(name, "off" if setting.off else setting.value, setting.why, setting.versions, active)

    for settings in (given.flags, given.env):
        for name, setting in settings.items():
            yield line(name, setting)


def _plain(mode: Mode) -> Iterator[Line]:
    for name, value in loaded.plain(mode).items():
        yield Line(
            name, ", ".join(value) if isinstance(value, tuple) else str(value), mode.why[name], "", tuple(stacks())
        )


def list_rows(found: list[Explained]) -> list[str]:
    """A table of names and summaries."""
    return console.table(("", "name", ""), [(each.kind, each.name, each.summary) for each in found])


def rows(found: Explained, *, explain: bool) -> Iterator[str]:
    """One profile or mode, with the reason for each setting if `explain`."""
    yield f"{found.kind} {found.name}: {found.summary}"
    yield from (f"  {name}: {text}" for name, text in found.about.items())
    if not found.lines:
        yield "  sets no flags and no variables"
        return
    versions = ", ".join(f"{each.name} (torch {each.torch})" for each in stacks().values())
    yield from (f"  with ComfyUI {found.comfyui} and {versions}:", "")
    cells = [(each.name, each.value, _for(each), _stacks(each)) for each in found.lines]
    heading, *lines = console.table(("", "value", "for", "active with"), cells)
    yield f"  {heading}"
    for each, text in zip(found.lines, lines, strict=True):
        yield f"  {text}"
        if explain:
            yield from textwrap.wrap(each.why, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _stacks(line: Line) -> str:
    return "all" if line.stacks == tuple(stacks()) else ", ".join(line.stacks) or "none"


def _for(line: Line) -> str:
    return "; ".join(each for each in (line.machines, line.versions) if each)
