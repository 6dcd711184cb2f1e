"""The doctor: looks at hosts and at this machine, says what is wrong, and which command mends it."""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.live import Probed
from core import console, files, shell
from core.arch import known_archs
from core.errors import StorageError
from core.stack import Platform, find_stack
from deploy import flow, plan
from deploy import host as hosts
from ops import fleet
from ops.checks import CHECKS, Case, Check, Severity
from ops.status import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deploy.connection import Agent
    from deploy.host import Profile, Target

SECONDS = 60.0
"""How long hosts have: torch is asked where ComfyUI does not answer, and an emulated or busy machine takes its time."""


@dataclass(frozen=True)
class Finding:
    """What a check found on a host."""

    host: str
    check: str
    severity: Severity
    what: str
    remedy: str


def examine(host: str, group: str, *, ask_sudo: bool = False) -> tuple[list[str], list[Finding]]:
    """Who was looked at, and what is wrong there. A host that cannot be reached is a finding, too.

    Without a host and a group: where kernels are built, and the ComfyUI of this machine where there is one.
    """
    names = hosts.select(host, group)
    found: list[Finding] = []
    if not (host or group):
        found = workbench()
        if not Path(flow.find_target(hosts.LOCAL).prefix, "current").expanduser().exists():
            return [HERE], found
    for answer in fleet.ask_each(names, _one, ask_sudo=ask_sudo, seconds=SECONDS):
        if answer.error is not None:
            check = "storage" if isinstance(answer.error, StorageError) else "reach"
            found.append(Finding(answer.host, check, "error", answer.error.what, answer.error.hint))
        found += answer.value or []
    return [*([] if host or group else [HERE]), *names], found


def _one(agent: Agent, target: Target) -> list[Finding]:
    stock = flow.shelf(target)
    packages = sorted({each for node in stock.nodes.values() for each in node.system})
    said = agent.call("probe", **flow.questions(target, packages), roots=list(target.host.model_roots))
    seen = msgspec.convert(said, Probed)
    planned = plan.make(target, seen.facts, stock, plan.Options())
    case = Case(target, seen.facts, seen.live, seen.probe, stock, planned, time.time())
    return judge(case)


def judge(case: Case) -> list[Finding]:
    """What all checks find; errors first, in the order of the checks."""
    found = [_finding(case.target.name, check, problem) for check in CHECKS for problem in check.find(case)]
    return sorted(found, key=lambda each: each.severity != "error")


def _finding(host: str, check: Check, problem: Problem) -> Finding:
    return Finding(host, check.name, check.severity, problem.what, problem.remedy)


# --- this machine, where kernels are built -------------------------------------------------------------------------

HERE = "this machine"
ROOM = 15_000_000_000
"""Bytes that a stack, its compiler and a build take in the cache, measured: 10 GB for cu130, and objects."""


def workbench() -> list[Finding]:
    """What keeps kernels from being built here for the hosts that are configured."""
    found = [Finding(HERE, "build", severity, each.what, each.remedy) for severity, each in _workbench()]
    return sorted(set(found), key=lambda each: (each.severity != "error", each.what))


def _workbench() -> Iterator[tuple[Severity, Problem]]:
    from kernels import store, toolchain

    for program, installer in (("git", "apt-get install git"), ("uv", "pip install uv")):
        if not shell.which(program):
            yield "error", Problem(f"{program} is not installed", installer)
    asked = _profiles()
    severity: Severity = "error" if asked else "warning"  # without hosts nobody may want to build here
    for profile in asked or [each for each in hosts.profiles().values() if each.kernels]:
        arch = known_archs()[profile.arch]
        target = Platform.parse(arch.platform)
        for error in toolchain.faults(find_stack(profile.stack), target, arch.python):
            yield severity, Problem(f"kernels for {profile.arch} cannot be built here: {error.what}", error.hint)
        cpu = target.cpu
        if cpu != platform.machine() and not (shell.which(f"qemu-{cpu}-static") or shell.which(f"qemu-{cpu}")):
            what = f"wheels for {profile.arch} are not imported here after the build: there is no emulator for {cpu}"
            yield "warning", Problem(what, "apt-get install qemu-user-static")
    for entry in store.entries():
        if entry.fault:
            yield "error", Problem(f"{entry.manifest.file}: {entry.fault}", "inv build-kernels builds it again")
    place = next(path for path in (files.cache(), *files.cache().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < ROOM:
        what = f"{console.size(free)} free at {place}, and a build takes {console.size(ROOM)}"
        yield "warning", Problem(what, "inv wheels --prune, or HEARTH_CACHE on a larger disk")


def _profiles() -> list[Profile]:
    """The profiles of configured hosts that ask for kernels."""
    wanted = [hosts.target(name).profile for name in hosts.hosts().hosts if name != hosts.LOCAL]
    return [each for each in wanted if each.kernels]


# --- shown ---------------------------------------------------------------------------------------------------------


def show(names: Sequence[str], findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print what was found; 0 when nothing was, 1 when there are only warnings, 2 when there are errors."""
    if as_json:
        console.data_json([_plain(each) for each in findings])
    else:
        for host in names:
            listed = [each for each in findings if each.host == host]
            console.data(f"{host}: {_counted(listed)}")
            for each in listed:
                console.data(console.line(f"  {each.severity}: {each.what}  [{each.check}]"))
                console.data(console.line(f"    next: {each.remedy}"))
    return 2 if any(each.severity == "error" for each in findings) else int(bool(findings))


def _plain(finding: Finding) -> dict[str, Any]:
    how = next((check.how for check in CHECKS if check.name == finding.check), "")
    return {**vars(finding), "how": how}


def _counted(findings: Sequence[Finding]) -> str:
    errors = sum(each.severity == "error" for each in findings)
    if not findings:
        return f"all is well ({len(CHECKS)} checks)"
    return f"{errors} errors, {len(findings) - errors} warnings"


def page() -> str:
    """`docs/troubleshooting.md`: every check, what it finds and what mends it, and the guides' own chapters."""
    lines = [
        "# Troubleshooting",
        "",
        "`inv doctor --host NAME` looks for all of this, and names what it found with the next command. Without a",
        "host it looks at this machine. This page is made of its checks (`ops/checks.py`).",
        "",
    ]
    for check in CHECKS:
        lines += [f"## {check.name}", "", f"{check.question} ({check.severity})", "", f"- Found by: {check.how}."]
        lines += [f"- Mended by: {check.mend}.", ""]
    lines += ["## From the guides", "", "What their chapters on troubleshooting list, and the check that finds it.", ""]
    lines += ["| case | check |", "| --- | --- |"]
    cases = sorted({(case, check.name) for check in CHECKS for case in check.cases})
    by_case: dict[str, list[str]] = {}
    for case, name in cases:
        by_case.setdefault(case, []).append(f"[{name}](#{name})")
    lines += [f"| {case} | {', '.join(names)} |" for case, names in by_case.items()]
    return "\n".join(lines) + "\n"


PAGE = files.CHECKOUT / "docs/troubleshooting.md"

if __name__ == "__main__":
    PAGE.write_text(page())
