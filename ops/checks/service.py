"""Checks of the service: whether it runs, answers and starts in time."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from core import console
from core.console import counted
from deploy import refusals
from ops.checks.case import Case, Check
from ops.status import Problem

if TYPE_CHECKING:
    from ops.checks.case import Found

_ERROR = re.compile(r"^\s*(\w+\.)*\w*(Error|Exception|Interrupt)\b|\berror:|CUDA error|Killed|\[ERROR\]", re.MULTILINE)
SLOW = 1 / 3
"""A start that takes this share of the health gate's time-out is slow. Measured: 15 s of 180 s, 51 s with 26 nodes."""


def _service(case: Case) -> Found:
    facts, service, comfyui = case.facts, case.facts.service, case.live.comfyui
    yield from refusals.paused(case.target, facts)
    if not facts.current or facts.paused:
        return
    line = _telling(case.lines)
    if not service.active and case.probe.result not in ("", "success"):
        yield Problem(
            f"the service failed ({case.probe.result}); its log: {line}", f"inv logs {case.at}; inv start {case.at}"
        )
    elif not service.active:
        yield Problem(f"the service is not running ({service.state})", f"inv start {case.at}")
    elif service.restarts >= 3:  # a deploy starts it once; systemd gives up at the fifth within five minutes
        yield Problem(
            f"the service keeps crashing ({counted(service.restarts, 'restart')}); its log: {line}",
            f"inv logs {case.at}; inv rollback {case.at}",
        )
    elif comfyui.state == "silent":
        yield Problem(
            f"ComfyUI accepts connections but does not answer ({comfyui.reason})",
            f"inv logs {case.at}; inv restart {case.at} --force",
        )
    elif comfyui.state == "closed" and (case.live.uptime or 0) > case.target.profile.start_seconds:
        running = console.clock(case.live.uptime or 0)
        yield Problem(f"ComfyUI has been running for {running} but accepts no connections", f"inv logs {case.at}")


def _telling(log: list[str]) -> str:
    """The last line of a log that reports an error, or the last line if none does."""
    lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if _ERROR.search(line)]
    return [*lines, *errors][-1] if lines else "empty"


def _port(case: Case) -> Found:
    yield from refusals.port(case.target, case.facts)


def _exporter(case: Case) -> Found:
    yield from refusals.metrics(case.target, case.facts)
    if case.facts.exporter.unit and not case.facts.metrics_holder:
        unit = case.target.exporter_unit
        yield Problem(
            f"the exporter is not running: no process listens on port {case.target.host.metrics_port}",
            f"on the host: journalctl --unit {unit}, then systemctl restart {unit}",
        )


def _start(case: Case) -> Found:
    timed = [(at, line) for at, line in case.probe.log if at is not None]
    ends = [number for number, (_, line) in enumerate(timed) if "To see the GUI go to" in line]
    if not ends:
        return
    begins = [number for number in range(ends[-1]) if re.match(r"Starting .+\.service", timed[number][1])]
    start = timed[begins[-1] if begins else 0 : ends[-1] + 1]
    took = start[-1][0] - start[0][0]
    if took > SLOW * case.target.profile.start_seconds and len(start) > 1:
        longest, line = max((after[0] - before[0], before[1].strip()) for before, after in pairwise(start))
        scan = any("asset scan" in each.lower() for _, each in start)
        remedy = 'remove "--enable-assets" from the host\'s flags' if scan else f"inv logs {case.at} --lines 500"
        yield Problem(
            f"ComfyUI took {console.clock(took)} to start, {console.clock(longest)} of it after: {line[:80]}", remedy
        )


CHECKS = (
    Check(
        name="service",
        question="Does the service run, and does it answer?",
        detected_by="the state kept by systemd or the supervisor, and the last error in the log",
        fix="fix the error in the log, then inv start; inv rollback returns to the previous release",
        find=_service,
    ),
    Check(
        name="port",
        question="Is ComfyUI's port free?",
        detected_by="the kernel's list of listening sockets, and the process that owns the socket",
        fix="stop that process, or set another `port` for the host and deploy",
        find=_port,
    ),
    Check(
        name="exporter",
        question="Are metrics exported?",
        detected_by="the process that listens on the host's `metrics_port`",
        fix="on the host: systemctl restart comfyui-exporter; its log says why it stopped",
        severity="warning",
        find=_exporter,
    ),
    Check(
        name="start",
        question="Does ComfyUI start quickly?",
        detected_by="the times in the log, from the start to `To see the GUI`, and the longest gap between two lines",
        fix="with thousands of models, remove --enable-assets from the flags; remove the node that causes the gap",
        severity="warning",
        find=_start,
    ),
)
