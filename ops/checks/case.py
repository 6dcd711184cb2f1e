"""A check, and its input: one host, as seen by the agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from agent.schema.manifest import ReleaseManifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.schema.facts import Facts
    from agent.schema.gateway import GatewayState
    from agent.schema.live import Live, Probe
    from deploy.host import Target
    from deploy.inputs import Inputs
    from deploy.plan import Plan
    from deploy.refusals import Refusal
    from ops.status import Problem

    Found = Iterator[Problem | Refusal]

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Case:
    """One host; `now` is this machine's clock (seconds since 1970).

    `gateway` is the gateway that runs there, with its name; None if none does.
    """

    target: Target
    facts: Facts
    live: Live
    probe: Probe
    inputs: Inputs
    planned: Plan
    now: float
    gateway: tuple[str, GatewayState] | None = None

    @property
    def at(self) -> str:
        """The flag that names the host."""
        return f"--host {self.target.name}"

    @property
    def release(self) -> ReleaseManifest:
        """The manifest of the current release; without an id if nothing is deployed."""
        return self.facts.release(self.facts.current) or ReleaseManifest()

    @property
    def lines(self) -> list[str]:
        """The service's log without times."""
        return [line for _, line in self.probe.log]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One kind of problem. `find` is pure: it yields the problems of a case."""

    name: str
    question: str
    detected_by: str
    fix: str
    severity: Severity = "error"
    find: Callable[[Case], Found] = field(compare=False)
