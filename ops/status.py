"""The status of hosts at a glance.

Drift is what a deploy would change, from the same plan and facts: damaged parts, edited units, and locks or settings
that are not deployed yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.live import Disk, Glance
from core import console
from core.console import counted
from core.flags import number
from core.typed import convert
from deploy import fleet, plan
from deploy.inputs import gather
from deploy.look import questions
from ops.gpu import cells as gpu_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.schema.facts import Facts
    from agent.schema.live import Live
    from deploy.connection import Agent
    from deploy.host import Target
    from deploy.inputs import Inputs

SECONDS = 10.0
"""The time-out for hosts."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and how to fix it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Status:
    """One host; `drift` is what a deploy would change."""

    host: str
    facts: Facts
    live: Live
    drift: tuple[str, ...]
    problems: tuple[Problem, ...]


def look(names: Sequence[str], *, ask_sudo: bool = False, seconds: float = SECONDS) -> list[fleet.Answer[Status]]:
    """The status of hosts, in parallel."""
    known: dict[str, Inputs] = {}  # hosts of one configuration have the same inputs
    return fleet.ask_each(names, lambda agent, target: _one(agent, target, known), ask_sudo=ask_sudo, seconds=seconds)


def _one(agent: Agent, target: Target, known: dict[str, Inputs]) -> Status:
    key = f"{target.host.comfyui} {target.profile}"
    inputs = known.get(key) or known.setdefault(key, gather(target))
    answer = convert(agent.call("status", **vars(questions(target, inputs.packages))), Glance)
    planned = plan.make(target, answer.facts, inputs, plan.Options())
    return judge(target, answer.facts, answer.live, planned)


def judge(target: Target, facts: Facts, live: Live, planned: plan.Plan) -> Status:
    """Find the problems of a host; pure."""
    name = target.name
    at = f"--host {name}"
    drift = tuple(step.title for step in planned.steps) if facts.current else ()
    strays = f"data/custom_nodes contains {', '.join(facts.unused)}, which is never loaded" if facts.unused else ""
    found: list[Problem] = []

    def problem(what: str, remedy: str) -> None:
        found.append(Problem(what, remedy))

    if not facts.current:
        problem("nothing is deployed", f"inv deploy {at}")
    elif facts.paused:
        pass  # the plan's refusals give the reason and the user, and name a run in progress
    elif not facts.service.active:
        problem(f"the service is not running: {facts.service.state}", f"inv doctor {at}, then inv start {at}")
    elif live.comfyui.state == "silent":
        problem(f"ComfyUI accepts connections but does not answer: {live.comfyui.reason}", f"inv logs {at}")
    elif live.comfyui.state == "closed":
        starting = live.uptime is not None and live.uptime < target.profile.start_seconds
        since = console.clock(live.uptime or 0)
        what = f"ComfyUI has been starting for {since}" if starting else "ComfyUI accepts no connections"
        problem(what, f"inv logs {at}")
    if facts.current and not facts.service.enabled and not facts.paused:
        problem("the service is not started at boot", f"inv resume {at}")
    if facts.service.restarts:
        problem(f"the service was restarted {counted(facts.service.restarts, 'time')}", f"inv doctor {at}")
    if facts.last and facts.last.get("result") != "done":
        last = facts.last
        problem(f"the last {last['action']} ({last['at']}) {last['result']}: {last['error']}", f"inv attach {at}")
    for node, why in facts.failed_nodes.items():
        problem(f"node {node} cannot be imported: {why}", f"inv doctor {at}")
    if drift:
        more = f" and {len(drift) - 1} more" if len(drift) > 1 else ""
        problem(f"a deploy would {drift[0]}{more}", f"inv deploy {at} --dry-run")
    if strays:
        problem(strays, f"inv doctor {at}")
    for each in planned.refusals:
        problem(each.what, each.remedy)
    return Status(name, facts, live, (*drift, *([strays] if strays else ())), tuple(found))


# --- shown ---------------------------------------------------------------------------------------------------------


def watch(names: Sequence[str], every: str | bool, *, ask_sudo: bool = False) -> None:
    """Show the status repeatedly until Ctrl-C; raises UsageError."""
    seconds = number("watch", "2" if every is True else str(every), 0.5)
    console.refreshed(lambda: rows(look(names, ask_sudo=ask_sudo)), seconds)


def code(answers: Sequence[fleet.Answer[Status]]) -> int:
    """The exit code: 0 if all hosts were reached and have no problems, otherwise 1."""
    return int(any(each.value is None or each.value.problems for each in answers))


def summary(answers: Sequence[fleet.Answer[Status]]) -> list[dict[str, Any]]:
    """The status of hosts, for JSON."""
    return [_plain(each) for each in answers]


def _plain(answer: fleet.Answer[Status]) -> dict[str, Any]:
    """The status of a host, for JSON."""
    status, error = answer.value, answer.error
    if status is None:
        assert error is not None
        problems = [{"what": error.what, "remedy": error.hint, "kind": error.kind}]
        return {"host": answer.host, "reached": False, "well": False, "problems": problems}
    facts, live = status.facts, status.live
    release = facts.release(facts.current)
    about = {
        name: getattr(release, name, None) for name in ("version", "torch", "stack", "profile", "python", "kernels")
    }
    return {
        "host": status.host,
        "reached": True,
        "well": not status.problems,
        "release": facts.current,
        **about,
        "service": msgspec.to_builtins(facts.service),
        "last": facts.last,
        "deployed": facts.deployed,
        "busy": facts.busy,
        "drift": list(status.drift),
        "problems": [{"what": each.what, "remedy": each.remedy} for each in status.problems],
        **msgspec.to_builtins(live),
    }


def rows(answers: Sequence[fleet.Answer[Status]]) -> list[str]:
    """Tables of services and machines, 100 columns wide at most, then the problems."""
    seen = [each.value for each in answers if each.value is not None]
    machines = console.table(MACHINES, (row for each in seen for row in _machine(each)))
    return [*console.table(SERVICES, map(_service, answers)), "", *([*machines, ""] if seen else ()), *notes(answers)]


SERVICES = ("host", "", "release", "ComfyUI", "deployed", "up", "restarts", "jobs", "drift")
MACHINES = ("host", "GPU", "used", "memory", "°C", "power", "free RAM", "free disk")
HOST = 16
"""The width of a host's name, in columns."""


def _service(answer: fleet.Answer[Status]) -> tuple[str, ...]:
    """A host's service; its jobs are running + waiting."""
    host, status = answer.host[:HOST], answer.value
    if status is None:
        return (host, "not reached", *["-"] * (len(SERVICES) - 2))
    facts, live = status.facts, status.live
    if not facts.current:
        state = "empty"
    elif facts.paused:
        state = "paused"
    else:
        state = {"answers": "serves"}.get(live.comfyui.state, live.comfyui.state) if facts.service.active else "stopped"
    return (
        host,
        state,
        facts.current[:8] or "-",
        live.comfyui.version or "-",
        _deployed(facts, live),
        console.age(live.uptime) if live.uptime is not None and facts.service.active else "-",
        str(facts.service.restarts),
        f"{len(live.comfyui.running)} + {live.comfyui.pending}" if live.comfyui.state == "answers" else "-",
        str(len(status.drift)) if status.drift else "none",
    )


def _deployed(facts: Facts, live: Live) -> str:
    """The age of the last deploy or rollback by the host's clock, and its result unless it succeeded."""
    if not facts.deployed:
        return "-"
    ago = live.time - datetime.fromisoformat(facts.deployed["at"]).timestamp()
    how = facts.deployed["result"]
    return console.age(ago) if how == "done" else f"{how}, {console.age(ago)}"


def _machine(status: Status) -> list[tuple[str, ...]]:
    """A row per GPU of a host, with the free memory of the machine and the free space at the prefix."""
    live = status.live
    place = live.disks.get(status.facts.prefix) or Disk()
    room = (console.size(live.memory.get("MemAvailable", 0)), console.size(place.free) if place.total else "-")
    rows = [(status.host[:HOST], *gpu_cells(each, 12), *room) for each in live.gpus]
    return rows or [(status.host[:HOST], "none", *["-"] * (len(MACHINES) - 4), *room)]


def notes(answers: Sequence[fleet.Answer[Status]]) -> list[str]:
    """The problems of each host, with their fixes."""
    lines: list[str] = []
    for each in answers:
        if each.error is not None:
            lines.append(f"{each.host}: {each.error.what}; fix: {each.error.hint}")
        else:
            assert each.value is not None
            lines += [f"{each.host}: {found.what}; fix: {found.remedy}" for found in each.value.problems]
    return [console.line(each) for each in lines] or ["no problems found"]
