"""Optional system settings: listed, applied by name, and undone from the host's own record."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from agent.schema.requests import DropIns
from core import config, console, files
from core.errors import ConfigError, UsageError, suggest
from deploy import fleet, refusals
from deploy.change import Change, change_each
from deploy.look import look as facts_of
from deploy.plan import Plan
from ops import settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.schema.change import Step
    from agent.schema.settings import Applied, State
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options
    from deploy.refusals import Refusal


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A setting of `recipes/system/tuning.toml`: one of `sysctl`, `value` (kernel files) or `unit`."""

    what: str
    expect: str
    cost: str
    source: str
    needs: Literal["", "gpu", "unified", "memory"] = ""
    sysctl: dict[str, str] = {}
    value: dict[str, str] = {}
    unit: str = ""


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"left_out": "left-out"}):
    """The whole file; `left_out` gives the reasons against settings that others recommend."""

    settings: dict[str, Setting]
    left_out: dict[str, str]


@functools.cache
def known() -> Known:
    """Return the settings that Hearth knows; raises ConfigError."""
    path = files.CHECKOUT / "recipes/system/tuning.toml"
    found = config.load(path, Known)
    for name, each in found.settings.items():
        if sum(map(bool, (each.sysctl, each.value, each.unit))) != 1:
            raise ConfigError("config", f"{path}: {name} must have one of sysctl, value and unit")
    return found


def drop_ins(name: str, setting: Setting) -> DropIns:
    """The drop-in file of a setting."""
    if setting.unit:
        text = (files.CHECKOUT / "recipes/system" / setting.unit).read_text()
        return DropIns({f"/etc/systemd/system/hearth-{name}.service": text})
    head = f"# Written by Hearth: inv tune --undo {name} removes it.\n"
    if setting.sysctl:
        lines = "".join(f"{key} = {value}\n" for key, value in setting.sysctl.items())
        return DropIns({f"/etc/sysctl.d/90-hearth-{name}.conf": head + lines})
    lines = "".join(f"w {place} - - - - {value}\n" for place, value in setting.value.items())
    return DropIns({f"/etc/tmpfiles.d/hearth-{name}.conf": head + lines})


def unfit(setting: Setting, facts: Facts) -> str:
    """The reason why a setting does not apply to a host; empty if it applies."""
    if setting.needs and not facts.gpus:
        return "no NVIDIA GPU there"
    unified = any(gpu.unified for gpu in facts.gpus)
    if setting.needs == "unified" and not unified:
        return "for a GPU that shares the machine's memory"
    return "for a GPU with memory of its own" if setting.needs == "memory" and unified else ""


# --- plans: pure ---------------------------------------------------------------------------------------------------


def apply(target: Target, facts: Facts, state: State, names: Sequence[str]) -> Plan:
    """The plan that applies settings; empty if all are in force."""
    found = refusals.unsettable(target, facts)
    steps: list[Step] = []
    for name in names:
        against = _unfit_here(name, facts, state)
        found += against
        todo = [each for each in state.seen[name] if each.now != each.wanted]
        # a file is rewritten only if Hearth applied the setting
        if not against and ([each for each in todo if each.kind != "file"] or (todo and name in state.applied)):
            setting = known().settings[name]
            title = f"set {name}: {now(name, state)} -> {becomes(setting)}"
            undo = f"inv tune --undo {name}"
            steps.append(settings.apply_step(name, drop_ins(name, setting), title, undo=undo, why=setting.expect))
    return Plan.of(facts, steps, found)


def _unfit_here(name: str, facts: Facts, state: State) -> list[Refusal]:
    setting = known().settings[name]
    values = [each for each in state.seen[name] if each.kind == "value"]
    if why := unfit(setting, facts):
        return [refusals.unfit_setting(name, f"of no use on this machine: {why}")]
    if not setting.unit and not values:
        listed = ", ".join(setting.sysctl or setting.value)
        return [refusals.unfit_setting(name, f"the machine has no {listed}")]
    if closed := [each.place for each in values if not each.writable and each.now != each.wanted]:
        remedy = "a container cannot set it: set it on the machine that runs the container"
        return [refusals.unfit_setting(name, f"{closed[0]} is not writable", remedy)]
    return []


def undo(target: Target, facts: Facts, state: State, names: Sequence[str], *, force: bool) -> Plan:
    """The plan that undoes settings (default: all that `inv tune` applied)."""
    mine = [name for name in names or known().settings if name in state.applied]
    steps = [
        settings.undo_step(name, f"undo {name}: {', '.join(_back(each) for each in state.applied[name])}", force=force)
        for name in mine
    ]
    return Plan.of(facts, steps, refusals.unsettable(target, facts) if mine else [])


def _back(change: Applied) -> str:
    if change.kind == "value":
        return f"restore {change.place} to {change.old}"
    return f"{'remove' if change.old is None else 'restore'} {change.place}" if change.kind == "file" else change.place


# --- carried out ---------------------------------------------------------------------------------------------------


def seen(agent: Agent, names: Sequence[str]) -> State:
    """The state of settings on a host."""
    return settings.look(agent, {name: drop_ins(name, known().settings[name]) for name in names})


def named(text: str) -> list[str]:
    """The names in a comma-separated list of settings; raises UsageError."""
    found = [each for each in text.split(",") if each]
    for each in found:
        if each not in known().settings:
            if each in ("mps", "gpu-access"):
                raise UsageError(
                    "unknown-name",
                    f"{each} is a task of its own",
                    hint=f"run inv {each}; for its help: inv --help {each}",
                )
            raise UsageError("unknown-name", f"there is no setting {each!r}", hint=suggest(each, known().settings))
    return found


def run(hosts: Sequence[str], applied: str, undone: str | bool, options: Options, *, as_json: bool) -> int:
    """Run `inv tune`: list settings, apply the named ones, or undo the named ones (True: all)."""
    from ops import lifecycle

    if applied and undone:
        raise UsageError("usage", "--apply and --undo exclude each other", hint="run the command twice, once with each")
    if not (applied or undone):
        return show(look(hosts, ask_sudo=options.ask_sudo), as_json=as_json)
    names = [] if undone is True else named(applied or str(undone))

    def planner(agent: Agent, target: Target, facts: Facts) -> Plan:
        state = seen(agent, names or list(known().settings))
        if undone:
            return undo(target, facts, state, names, force=options.force)
        return apply(target, facts, state, names)

    action, state = ("undo tune", "the previous values are restored") if undone else ("tune", "set")
    what = ", ".join(names) or "all settings"
    results = change_each(hosts, Change(action=action, plan=planner, state=f"{what} {state}"), options)
    return lifecycle.show(results, as_json=as_json, dry_run=options.dry_run)


# --- shown ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A setting's state on a host. `on`: Hearth applied it. `unfit`: the reason why it does not apply there."""

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
        return rows(facts_of(agent, target), seen(agent, list(known().settings)))

    return fleet.ask_each(names, one, ask_sudo=ask_sudo, seconds=30)


def rows(facts: Facts, state: State) -> list[Row]:
    """The display of each setting; pure."""
    return [
        Row(
            name, name in state.applied, now(name, state), becomes(each), unfit(each, facts) or _absent(name, state),
            each.what, each.expect, each.cost, each.source,
        )
        for name, each in known().settings.items()
    ]  # fmt: skip


def now(name: str, state: State) -> str:
    """A setting's current value, in words."""
    found = state.seen[name]
    if units := [each for each in found if each.kind == "unit"]:
        return str(units[0].now)
    by_place: dict[str, list[str]] = {}
    for each in found:
        if each.kind == "value":
            by_place.setdefault(each.place if "cpufreq" not in each.place else "", []).append(str(each.now))
    return ", ".join("/".join(dict.fromkeys(each)) for each in by_place.values()) or "not there"


def _absent(name: str, state: State) -> str:
    return "" if any(each.kind != "file" for each in state.seen[name]) else "not available on this machine"


def becomes(setting: Setting) -> str:
    """A setting's value after applying it, in words."""
    return "on" if setting.unit else ", ".join([*setting.sysctl.values(), *setting.value.values()])


def show(answers: Sequence[fleet.Answer[list[Row]]], *, as_json: bool) -> int:
    """Print the settings of hosts; returns 1 if a host did not answer."""

    def plain(_: str, rows: list[Row]) -> dict[str, Any]:
        return {"settings": msgspec.to_builtins(rows), "left_out": known().left_out}

    fleet.show(answers, lines, plain, as_json=as_json)
    return int(any(each.error for each in answers))


def lines(name: str, rows: list[Row]) -> list[str]:
    """A host's settings: a table, then the purpose of each."""
    table = [(each.name, "Hearth" if each.on else "-", each.now, each.becomes, each.unfit or "yes") for each in rows]
    found = [f"{name}:", *console.table(("setting", "set by", "now", "would be", "applies"), table), ""]
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
