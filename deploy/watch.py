"""Watch: compare users' jobs before and after a deploy, to return to the previous release if they got worse.

The client polls ComfyUI's history, which a release loses when it ends. Without the client, nothing is watched.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

from agent.schema.live import Job
from core import console
from core.console import counted
from core.errors import ConnectError, HostError
from core.typed import convert
from deploy import connection
from deploy.look import look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.change import Outcome
    from deploy.connection import Agent
    from deploy.host import Target
    from deploy.plan import Options

JOBS, RATE = 5, 0.2
"""Jobs that a failure rate needs, before and after; and the increase that is too much (20 percentage points)."""

SAME, SLOWER, SECONDS = 3, 1.5, 1.0
"""Jobs of the same workflow that their median time needs, before and after; and the factor that is too much, if it is
also at least so many seconds."""

HISTORY = 200
"""Number of the latest jobs to read."""

EVERY = 15.0
"""Seconds between two looks."""

RESTARTS = 2
"""Number of deaths of ComfyUI that are too many. Its history is lost with it, with the jobs that it died of."""


def finished(agent: Agent) -> list[Job] | None:
    """The users' jobs that ended by themselves; None if ComfyUI does not answer."""
    try:
        found = convert(agent.call("jobs", count=HISTORY), list[Job])
    except HostError:
        return None
    return [job for job in found if job.workflow and job.status in ("success", "error")]


def worse(before: Sequence[Job], after: Sequence[Job]) -> str:
    """What got worse, in words; empty if nothing did or there are too few jobs."""
    rates = [sum(job.status == "error" for job in jobs) / max(1, len(jobs)) for jobs in (before, after)]
    if min(len(before), len(after)) >= JOBS and round(rates[1] - rates[0], 6) >= RATE:
        return f"{rates[1]:.0%} of {counted(len(after), 'job')} failed, before {rates[0]:.0%} of {len(before)}"
    for workflow in {job.workflow for job in after}:
        old, new = (_seconds(jobs, workflow) for jobs in (before, after))
        if min(len(old), len(new)) >= SAME and median(new) > max(SLOWER * median(old), median(old) + SECONDS):
            took = f"{median(new):.1f} s (median), before {median(old):.1f} s"
            return f"{counted(len(new), 'job')} of a workflow took {took}"
    return ""


def _seconds(jobs: Sequence[Job], workflow: str) -> list[float]:
    """The times of a workflow's jobs that succeeded, except those that came from ComfyUI's cache."""
    return [
        job.seconds
        for job in jobs
        if job.workflow == workflow and job.status == "success" and job.seconds is not None and job.cached < job.nodes
    ]


def watch(target: Target, outcome: Outcome, before: Sequence[Job], options: Options) -> str:
    """Poll the jobs for the time of the options; returns what got worse, empty if nothing did."""
    name, seen = target.name, dict[str, Job]()
    console.say(
        f"watching {name}, with {counted(len(before), 'job')} before to compare; Ctrl-C ends this, not the release"
    )
    end = time.monotonic() + options.watch
    try:
        with connection.connect(target, options.ask_sudo) as agent:
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(EVERY, left))
                found = finished(agent)
                seen |= {job.id: job for job in found or ()}
                why = worse(before, [*seen.values()])
                if not why and found is not None:
                    continue
                facts = look(agent, target)
                if facts.current != outcome.release:
                    console.say(f"{name} has another release now: no longer watched")
                    return ""
                if facts.service.restarts >= RESTARTS:
                    why = f"ComfyUI died {counted(facts.service.restarts, 'time')}"
                if why:
                    return why
    except KeyboardInterrupt:
        console.say(f"{name} is no longer watched; release {outcome.release} stays in service")
        return ""
    except ConnectError as error:
        what = f"{name} is no longer watched; release {outcome.release} stays in service"
        raise ConnectError(error.kind, what, cause=error.what, hint=f"inv jobs --host {name}") from error
    console.say(f"{name}: {counted(len(seen), 'job')} with release {outcome.release}, not worse than before")
    return ""
