"""The doctor: runs its checks on hosts and on this machine, and names the fix of every problem."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agent.schema.live import Probed
from core import files
from core.console import counted
from core.errors import HostError
from core.typed import convert
from deploy import fleet, gateways, plan
from deploy import host as hosts
from deploy.inputs import gather
from deploy.look import find_target, questions
from ops import workstation
from ops.checks import CHECKS, Case, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deploy.connection import Agent
    from deploy.host import Target

SECONDS = 60.0
"""The time-out for hosts: asking torch, where ComfyUI does not answer, is slow on an emulated or busy machine."""


@dataclass(frozen=True)
class Finding:
    """A problem that a check found on a host, or with severity "info" a fact about this machine."""

    host: str
    check: str
    severity: Severity | Literal["info"]
    what: str
    remedy: str


def examine(host: str, group: str, *, ask_sudo: bool = False) -> tuple[list[str], list[Finding]]:
    """Check hosts, and return their names and the findings. An unreachable host is a finding, too.

    Without a host and a group, checks this machine, and its ComfyUI if one is deployed.
    """
    names = hosts.select(host, group)
    found: list[Finding] = []
    if not (host or group):
        found = this_machine()
        if not Path(find_target(hosts.LOCAL).prefix, "current").expanduser().exists():
            return [workstation.NAME], found
    for answer in fleet.ask_each(names, _one, ask_sudo=ask_sudo, seconds=SECONDS):
        if answer.error is not None:
            check = "storage" if isinstance(answer.error, HostError) and answer.error.kind == "storage" else "reach"
            found.append(Finding(answer.host, check, "error", answer.error.what, answer.error.hint))
        found += answer.value or []
    return [*([] if host or group else [workstation.NAME]), *names], found


def _one(agent: Agent, target: Target) -> list[Finding]:
    inputs = gather(target)
    answer = agent.call("probe", **vars(questions(target, inputs.packages)))
    seen = convert(answer, Probed)
    planned = plan.make(target, seen.facts, inputs, plan.Options())
    runs = gateways.run_by(target.name, hosts.hosts())
    gateway = (runs[0], gateways.look(agent, runs[1])) if runs else None
    case = Case(target, seen.facts, seen.live, seen.probe, inputs, planned, time.time(), gateway)
    return judge(case)


def judge(case: Case) -> list[Finding]:
    """Run all checks; errors come first, in the order of the checks."""
    name = case.target.name
    found = [
        Finding(name, check.name, check.severity, problem.what, problem.remedy)
        for check in CHECKS
        for problem in check.find(case)
    ]
    return sorted(found, key=lambda each: each.severity != "error")


def this_machine() -> list[Finding]:
    """This machine's capabilities and problems."""
    seen = workstation.look()
    able = [Finding(workstation.NAME, "abilities", "info", each, "") for each in seen.abilities]
    return able + [
        Finding(workstation.NAME, "build", severity, each.what, each.remedy) for severity, each in seen.problems
    ]


# --- shown ---------------------------------------------------------------------------------------------------------


def summary(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings for JSON; `how` is how the check detected each."""
    how = {check.name: check.detected_by for check in CHECKS}
    return [{**vars(each), "how": how.get(each.check, "")} for each in findings]


def rows(names: Sequence[str], findings: Sequence[Finding]) -> Iterator[str]:
    """The findings of each host, and below each problem how to fix it."""
    for host in names:
        listed = [each for each in findings if each.host == host]
        yield f"{host}: {_counted([each for each in listed if each.severity != 'info'])}"
        for each in listed:
            if each.severity == "info":
                yield f"  {each.what}"
            else:
                yield f"  {each.severity}: {each.what}  [{each.check}]"
                yield f"    fix: {each.remedy}"


def _counted(problems: Sequence[Finding]) -> str:
    errors = sum(each.severity == "error" for each in problems)
    return (
        f"{counted(errors, 'error')}, {counted(len(problems) - errors, 'warning')}" if problems else "no problems found"
    )


def code(findings: Sequence[Finding]) -> int:
    """The exit code: 0 without problems, 1 with warnings only, 2 with errors."""
    severities = {each.severity for each in findings}
    return 2 if "error" in severities else int("warning" in severities)


def page() -> str:
    """`docs/troubleshooting.md`: every check, how it detects a problem, and how to fix it."""
    lines = [
        "# Troubleshooting",
        "",
        "`inv doctor --host NAME` runs these checks on a host and prints how to fix each problem. Without a host it",
        "checks this machine. This page is generated from the checks (`ops/checks/`).",
        "",
    ]
    for check in CHECKS:
        lines += [f"## {check.name}", "", f"{check.question} ({check.severity})", ""]
        lines += [f"- Detected by: {check.detected_by}.", f"- Fix: {check.fix}.", ""]
    return "\n".join(lines)


PAGE = files.CHECKOUT / "docs/troubleshooting.md"

if __name__ == "__main__":
    PAGE.write_text(page())
