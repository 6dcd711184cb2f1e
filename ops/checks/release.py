"""Checks of the release: whether it is complete, unchanged, and as configured."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from deploy import plan
from ops.checks.case import Case, Check
from ops.status import Problem

if TYPE_CHECKING:
    from ops.checks.case import Found


def _deployed(case: Case) -> Found:
    facts = case.facts
    if not facts.current:
        yield Problem("nothing is deployed", f"inv deploy {case.at}")
    if facts.busy and not facts.busy["alive"]:
        yield Problem(f"a {facts.busy['action']} by {facts.busy['who']} was interrupted", f"inv attach {case.at}")
    if facts.last and facts.last.get("result") != "done":
        yield Problem(
            f"the last {facts.last['action']} {facts.last['result']}: {facts.last['error']}", f"inv deploy {case.at}"
        )


def _drift(case: Case) -> Found:
    if not case.facts.current:
        return
    for name, error in case.facts.parts.items():
        if error and name in case.release.parts.values():
            yield Problem(f"{name} is damaged: {error}", f"inv deploy {case.at}")
    if steps := case.planned.steps:
        more = f", and {len(steps) - 1} more" if len(steps) > 1 else ""
        yield Problem(f"a deploy would {steps[0].title} ({steps[0].why}){more}", f"inv deploy {case.at} --dry-run")
    if case.facts.unused:
        yield Problem(
            f"{case.facts.prefix}/data/custom_nodes contains {', '.join(case.facts.unused)}, which is never loaded",
            f"find out who put it there, and why; if in doubt, inv quarantine {case.at}",
        )


def _confined(case: Case) -> Found:
    for what in plan.unconfined(case.target, case.facts):
        yield Problem(what, 'use a newer kernel, or scope = "system" for this host')


def _packages(case: Case) -> Found:
    wanted, found = case.release.torch, case.probe.installed.get("torch", "")
    if wanted and found.partition("+")[0] != wanted:
        yield Problem(f"torch is {found or 'missing'}, the release requires {wanted}", f"inv deploy {case.at}")


def _nodes(case: Case) -> Found:
    for name, why in case.facts.failed_nodes.items():
        yield Problem(
            f"node {name} cannot be imported: {why}",
            f"inv nodes.update --name {shlex.quote(name)}; inv lock; inv deploy {case.at}",
        )


CHECKS = (
    Check(
        name="deployed",
        question="Is a release deployed, and was the last change completed?",
        detected_by="the `current` link in the prefix, the run in progress, and the last line of the host's history",
        fix="inv deploy; inv attach follows a run in progress",
        find=_deployed,
    ),
    Check(
        name="drift",
        question="Is the release unchanged since its deploy, and as configured?",
        detected_by="size, time and mode of every file, compared with the parts' stamps; and the plan of a deploy",
        fix="inv deploy repairs it; inv deploy --dry-run shows the changes",
        severity="warning",
        find=_drift,
    ),
    Check(
        name="confined",
        question="Are custom nodes confined?",
        detected_by="the unit of a system service; without root, Landlock in the kernel (5.13 or newer, enabled)",
        fix='use a newer kernel, add "landlock" to its lsm= parameter, or set scope = "system"',
        severity="warning",
        find=_confined,
    ),
    Check(
        name="packages",
        question="Does the environment contain the torch version of the release?",
        detected_by="the metadata of the packages in the environment",
        fix="inv deploy rebuilds the environment",
        find=_packages,
    ),
    Check(
        name="nodes",
        question="Can ComfyUI import every custom node?",
        detected_by="ComfyUI's output during the health check of the release",
        fix="inv nodes.update --name NAME, or remove the node from the host's `nodes`; then inv deploy",
        severity="warning",
        find=_nodes,
    ),
)
