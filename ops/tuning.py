"""Settings of a machine outside Hearth's prefix: listed, applied when named, undone from the host's own record."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from agent.schema import change
from agent.schema.settings import Applied, State
from core import config, console, files
from core.errors import ConfigError, UnknownNameError, UsageError, near
from deploy import flow
from deploy.plan import Plan, Refusal
from ops import fleet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.schema.change import Step
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options

Change = dict[str, Any]
"""One change, as `agent/change/settings.py` has its kinds."""


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A setting of `recipes/system/tuning.toml`; either `sysctl`, `value` (files of the kernel's) or `unit`."""

    what: str
    expect: str
    cost: str
    source: str
    needs: Literal["", "gpu", "unified", "memory"] = ""
    sysctl: dict[str, str] = {}
    value: dict[str, str] = {}
    unit: str = ""


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"left_out": "left-out"}):
    """The whole file; `left_out` says of what others recommend why it is not here."""

    settings: dict[str, Setting]
    left_out: dict[str, str]


@functools.cache
def known() -> Known:
    """The settings that Hearth knows; raises ConfigError."""
    path = files.CHECKOUT / "recipes/system/tuning.toml"
    found = config.load(path, Known)
    for name, each in found.settings.items():
        if sum(map(bool, (each.sysctl, each.value, each.unit))) != 1:
            raise ConfigError(f"{path}: {name} must have one of sysctl, value and unit")
    return found


def changes(name: str, setting: Setting) -> list[Change]:
    """What a setting changes: now, and from every boot on."""
    told = f"# Written by Hearth: inv tune --undo {name} takes it away.\n"
    if setting.unit:
        unit = f"hearth-{name}.service"
        text = (files.CHECKOUT / "recipes/system" / setting.unit).read_text()
        return [file(f"/etc/systemd/system/{unit}", text), {"kind": "unit", "place": unit}]
    if setting.sysctl:
        lines = "".join(f"{key} = {value}\n" for key, value in setting.sysctl.items())
        values = {f"/proc/sys/{key.replace('.', '/')}": value for key, value in setting.sysctl.items()}
        first = file(f"/etc/sysctl.d/90-hearth-{name}.conf", told + lines)
    else:
        values = setting.value
        lines = "".join(f"w {place} - - - - {value}\n" for place, value in values.items())  # tmpfiles.d(5)
        first = file(f"/etc/tmpfiles.d/hearth-{name}.conf", told + lines)
    return [first, *({"kind": "value", "place": place, "value": value} for place, value in values.items())]


def file(place: str, text: str, **more: str) -> Change:
    """The change that writes a file."""
    return {"kind": "file", "place": place, "text": text, **more}


def unfit(setting: Setting, facts: Facts) -> str:
    """Why a setting makes no sense on a host; empty when it does."""
    if setting.needs and not facts.gpus:
        return "no NVIDIA GPU there"
    unified = any(gpu.unified for gpu in facts.gpus)
    if setting.needs == "unified" and not unified:
        return "for a GPU that shares the machine's memory"
    return "for a GPU with memory of its own" if setting.needs == "memory" and unified else ""


# --- plans: pure ---------------------------------------------------------------------------------------------------


def able(target: Target, facts: Facts) -> list[Refusal]:
    """What keeps anything outside the prefix from being changed."""
    found: list[Refusal] = []
    if target.host.scope == "user":
        what = 'scope = "user" changes nothing outside the login\'s own folders'
        found.append(Refusal(what, f'set scope = "system" for {target.name}, or do it there by hand'))
    elif not facts.root:
        found.append(
            Refusal(f"needs root, and this is {facts.login}", "log in as root, or as who may sudo (--ask-sudo)")
        )
    elif not facts.manager.startswith("systemd"):
        found.append(Refusal("the host runs no systemd, which would keep it over a boot", "do it there by hand"))
    return found


def apply(target: Target, facts: Facts, state: State, names: Sequence[str]) -> Plan:
    """The plan that applies settings; empty where everything is so already."""
    refusals = able(target, facts)
    steps: list[Step] = []
    for name in names:
        setting = known().settings[name]
        seen = state.seen[name]
        values = [each for each in seen if each.kind == "value"]
        todo = [each for each in seen if each.now != each.wanted]
        if why := unfit(setting, facts):
            refusals.append(Refusal(f"{name} makes no sense on {target.name}: {why}", "leave it out"))
        elif not setting.unit and not values:
            places = ", ".join(each["place"] for each in changes(name, setting) if each["kind"] == "value")
            refusals.append(Refusal(f"{name}: the machine has no {places}", "leave it out"))
        elif closed := [each.place for each in values if not each.writable and each in todo]:
            what = f"{name}: {closed[0]} cannot be written there"
            refusals.append(Refusal(what, "in a container the machine that it runs on decides: set it there"))
        elif [each for each in todo if each.kind in ("value", "unit")] or (todo and name in state.applied):
            title = f"set {name}: {now(name, state)} -> {becomes(setting)}"
            step = setting_step(name, changes(name, setting), title, setting.expect, f"inv tune --undo {name}")
            steps.append(step)
    return finished(facts, steps, refusals)


def undo(target: Target, facts: Facts, state: State, names: Sequence[str], *, force: bool) -> Plan:
    """The plan that undoes settings (none named: all that `inv tune` applied)."""
    mine = [name for name in names or known().settings if name in state.applied]
    steps = []
    for name in mine:
        title = f"undo {name}: {', '.join(_back(each) for each in state.applied[name])}"
        steps.append(undo_step(name, title, force=force))
    return finished(facts, steps, able(target, facts) if mine else [])


def _back(change: Applied) -> str:
    if change.kind == "value":
        return f"{change.place} back to {change.old}"
    return f"{'remove' if change.old is None else 'put back'} {change.place}" if change.kind == "file" else change.place


def setting_step(
    name: str, wanted: list[Change], title: str, why: str, undone: str, options: Options | None = None
) -> Step:
    """The step that applies a setting; with `options` ComfyUI is stopped before and started after."""
    step = change.Set(title, why, undone, name, tuple(wanted))
    return replace(step, serves=True, drain=options.drain, force=options.force) if options else step


def undo_step(name: str, title: str, *, force: bool, options: Options | None = None) -> Step:
    """The step that undoes a setting."""
    step = change.Unset(title, "asked for", "the same command without --undo", (name,), force)
    return replace(step, serves=True, drain=options.drain, force=options.force) if options else step


def finished(facts: Facts, steps: list[Step], refusals: list[Refusal], notes: Sequence[str] = ()) -> Plan:
    """A plan that leaves the release as it is; with refusals it has no steps."""
    return Plan(
        facts.current, facts.current, () if refusals else tuple(steps), refusals=tuple(refusals), notes=tuple(notes)
    )


# --- carried out ---------------------------------------------------------------------------------------------------


def seen(agent: Agent, names: Sequence[str]) -> State:
    """What a host says of settings."""
    wanted = {name: changes(name, known().settings[name]) for name in names}
    return msgspec.convert(agent.call("settings", changes=wanted), State)


def named(text: str) -> list[str]:
    """Names of settings, as the command line has them (commas between); raises UnknownNameError."""
    found = [each for each in text.split(",") if each]
    for each in found:
        if each not in known().settings:
            if each in ("mps", "gpu-access"):
                raise UnknownNameError(f"{each} is a task of its own", hint=f"inv {each}; inv --help {each}")
            raise UnknownNameError(f"there is no setting {each!r}", hint=near(each, known().settings))
    return found


def run(hosts: Sequence[str], applied: str, undone: str | bool, options: Options, *, as_json: bool) -> int:
    """What `inv tune` does: list settings, apply those named, or undo those named (True: all)."""
    from ops import lifecycle

    if applied and undone:
        raise UsageError("--apply and --undo exclude each other", hint="one after the other")
    if not (applied or undone):
        return show(look(hosts, ask_sudo=options.ask_sudo), as_json=as_json)
    names = [] if undone is True else named(applied or str(undone))

    def make(agent: Agent, target: Target, facts: Facts) -> Plan:
        state = seen(agent, names or list(known().settings))
        if undone:
            return undo(target, facts, state, names, force=options.force)
        return apply(target, facts, state, names)

    action, state = ("undo tune", "as before Hearth") if undone else ("tune", "set")
    what = ", ".join(names) or "all settings"
    results = flow.change(hosts, action, make, options, state=f"{what} {state}", converges=True)
    return lifecycle.show(results, as_json=as_json, dry_run=options.dry_run)


# --- shown ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A setting as it is on a host. `on`: Hearth applied it. `unfit` says why it makes no sense there."""

    name: str
    on: bool
    now: str
    becomes: str
    unfit: str
    what: str
    expect: str
    cost: str
    source: str


def look(names: Sequence[str], *, ask_sudo: bool = False) -> list[fleet.Answer[list[Row]]]:
    """Every setting, on every host."""

    def one(agent: Agent, target: Target) -> list[Row]:
        return rows(flow.look(agent, target), seen(agent, list(known().settings)))

    return fleet.ask_each(names, one, ask_sudo=ask_sudo, seconds=30)


def rows(facts: Facts, state: State) -> list[Row]:
    """What is told of each setting; pure."""
    return [
        Row(
            name, name in state.applied, now(name, state), becomes(each), unfit(each, facts) or _absent(name, state),
            each.what, each.expect, each.cost, each.source,
        )
        for name, each in known().settings.items()
    ]  # fmt: skip


def now(name: str, state: State) -> str:
    """How a setting is now, in words."""
    found = state.seen[name]
    if units := [each for each in found if each.kind == "unit"]:
        return "on" if units[0].now == [True, True] else "off"
    by_place: dict[str, list[str]] = {}
    for each in found:
        if each.kind == "value":
            by_place.setdefault(each.place if "cpufreq" not in each.place else "", []).append(str(each.now))
    return ", ".join("/".join(dict.fromkeys(each)) for each in by_place.values()) or "not there"


def _absent(name: str, state: State) -> str:
    return "" if any(each.kind != "file" for each in state.seen[name]) else "the machine has no such thing"


def becomes(setting: Setting) -> str:
    """How a setting would be, in words."""
    return "on" if setting.unit else ", ".join([*setting.sysctl.values(), *setting.value.values()])


def show(answers: Sequence[fleet.Answer[list[Row]]], *, as_json: bool) -> int:
    """Print the settings of hosts; 1 when one could not be asked."""

    def plain(_: str, rows: list[Row]) -> dict[str, Any]:
        return {"settings": msgspec.to_builtins(rows), "left_out": known().left_out}

    fleet.show(answers, lines, plain, as_json=as_json)
    return int(any(each.error for each in answers))


def lines(name: str, rows: list[Row]) -> list[str]:
    """A host's settings: a table, then what each is for."""
    table = [(each.name, "Hearth" if each.on else "-", each.now, each.becomes, each.unfit or "yes") for each in rows]
    found = [f"{name}:", *console.aligned(("setting", "set by", "now", "would be", "makes sense"), table), ""]
    for each in rows:
        for label, text in ((each.name, each.what), ("expected", each.expect), ("cost", each.cost)):
            found += _wrapped(label, text)
        found += [f"  source: {each.source}"]
    at = f" --host {name}"
    return [*found, "", f"inv tune{at} --apply NAME[,NAME]; inv tune{at} --undo; left out, and why: --json"]


def _wrapped(label: str, text: str) -> list[str]:
    import textwrap

    start = f"{label}: " if label not in ("expected", "cost") else f"  {label}: "
    return textwrap.wrap(text, 100, initial_indent=start, subsequent_indent="    ")
