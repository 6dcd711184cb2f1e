"""While a host's ComfyUI is replaced, its gateway lets people use the other hosts."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from agent.schema.change import CutOver, Restart
from agent.schema.gateway import Aside
from agent.schema.live import Job
from core import console
from core.errors import HearthError
from core.typed import convert
from deploy import connection
from deploy import host as hosts
from deploy.gateways import members
from deploy.look import find_target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agent.schema.change import Step
    from deploy.connection import Agent
    from deploy.host import Target
    from deploy.plan import Options

EVERY = 1.0
"""Seconds between two looks at a host's jobs."""

LEASE, RENEW = 120, 30.0
"""Seconds after which a gateway puts a host back on its own, and after which a deploy asks for more of them: one that
is killed, or loses its connection, leaves no host out of rotation."""


@contextmanager
def aside(agent: Agent, target: Target, steps: Sequence[Step], options: Options) -> Iterator[None]:
    """Take a host out of its gateways' rotation, and put it back afterwards.

    New people get other hosts; once the host has no job, or after `--drain`, so does everybody. Where that is not
    possible, requests wait at the gateway.
    """
    known = hosts.hosts()
    ends = any(isinstance(step, (CutOver, Restart)) for step in steps) and options.trial != "only"
    with ExitStack() as stack:
        for name in target.gateways if ends else ():
            gateway = known.gateways[name]
            if len(members(gateway, known)) > 1:
                there = stack.enter_context(_connected(name, gateway.host, options))
                if there and _set(there, target.name, "drain"):
                    stack.callback(_set, there, target.name, "ready")
                    console.say(f"gateway {name}: new users go to other hosts than {target.name}")
                    with _kept(there, target.name, "drain"):
                        _await_jobs(agent, 0 if options.force else options.drain)
                    _set(there, target.name, "maint")
                    stack.enter_context(_kept(there, target.name, "maint"))
        yield


@contextmanager
def _kept(there: Agent, name: str, state: str) -> Iterator[None]:
    """Ask for a host's state again and again, before the gateway puts it back."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(RENEW):
            _set(there, name, state)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _connected(name: str, host: str, options: Options) -> Iterator[Agent | None]:
    """The agent of a gateway's host; None if it does not answer."""
    with ExitStack() as stack:
        there = None
        try:
            there = stack.enter_context(connection.connect(find_target(host), options.ask_sudo))
        except HearthError as error:
            console.say(f"gateway {name} does not redirect anyone, so requests wait: {error.what}")
        yield there


def _set(there: Agent, name: str, state: str) -> bool:
    try:
        return convert(there.call("gateway-server", host=name, state=state, seconds=LEASE), Aside).done
    except HearthError as error:
        console.say(f"the gateway did not set {name} to {state}: {error.what}; inv gateway status shows its state")
        return False


def _await_jobs(agent: Agent, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and _has_jobs(agent):
        time.sleep(EVERY)


def _has_jobs(agent: Agent) -> bool:
    try:
        return any(each.status in ("running", "pending") for each in convert(agent.call("jobs", count=1), list[Job]))
    except HearthError:  # ComfyUI does not answer: there is nothing to wait for
        return False
