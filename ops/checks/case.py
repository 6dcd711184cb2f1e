"""What a check is, and what it is given: one host, as seen by the agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from deploy.facts import Facts
from ops.mps import Mps
from ops.status import Live, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploy.host import Target
    from deploy.inputs import Inputs
    from deploy.plan import Plan

Severity = Literal["error", "warning"]


class Kernel(msgspec.Struct, frozen=True):
    """Lines of the kernel log about processes killed for memory and about GPU faults."""

    readable: bool
    lines: tuple[str, ...]


class Containers(msgspec.Struct, frozen=True):
    """Container engines, the version of the NVIDIA container toolkit, and the devices that it describes (CDI)."""

    engines: tuple[str, ...]
    toolkit: str
    devices: tuple[str, ...]
    refresh: bool


class Probe(msgspec.Struct, frozen=True):
    """The answer of `agent/look/probe.py`, beside facts and status.

    `log` has lines with their times (seconds since 1970) if the service manager keeps them; `access` the permissions
    that the service lacks, by path; `torch` the state of CUDA, asked only if ComfyUI does not answer.
    """

    result: str = ""
    oom_kills: int = 0
    synchronized: bool | None = None
    compiler: str = ""
    headers: str = ""
    installed: dict[str, str] = {}
    torch: dict[str, Any] = {}
    access: dict[str, str] = {}
    kernel: Kernel = Kernel(True, ())
    log: tuple[tuple[float | None, str], ...] = ()
    containers: Containers = Containers((), "", (), False)
    mps: Mps = Mps()


@dataclass(frozen=True)
class Case:
    """One host; `now` is this machine's clock (seconds since 1970)."""

    target: Target
    facts: Facts
    live: Live
    probe: Probe
    inputs: Inputs
    planned: Plan
    now: float

    @property
    def at(self) -> str:
        """The flag that names the host."""
        return f"--host {self.target.name}"

    @property
    def release(self) -> dict[str, Any]:
        """The manifest of the current release; empty if nothing is deployed."""
        return self.facts.release(self.facts.current) or {}

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
    find: Callable[[Case], Iterator[Problem]] = field(compare=False)
