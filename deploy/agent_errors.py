"""The client's exceptions for the errors that an agent reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import BusyError, GateError, HearthError, HostError, UsageError

if TYPE_CHECKING:
    from agent.schema.facts import Report

_ERRORS: dict[str, tuple[type[HearthError], str]] = {
    "busy": (BusyError, "busy"),
    "drain": (BusyError, "drain"),
    "gate": (GateError, "unhealthy"),
    "trial": (GateError, "unhealthy"),
    "changed": (HostError, "changed"),
    "disk": (HostError, "disk-full"),
    "offline": (HostError, "offline"),
    "storage": (HostError, "storage"),
    "gpu": (HostError, "gpu"),
    "silent": (HostError, "no-answer"),
    "log": (HostError, "log"),
    "usage": (UsageError, "usage"),
}
"""The error and its kind for each kind of the agent's errors. All others are steps that failed."""


def error_of(report: Report) -> HearthError:
    """The client's exception for an error report of the agent."""
    error, kind = _ERRORS.get(report["kind"], (HostError, "step-failed"))
    cause = "\n".join([*report["cause"].splitlines(), *(f"| {line}" for line in report.get("log", []))])
    return error(kind, report["what"], cause=cause, hint=report["hint"])
