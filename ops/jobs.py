"""ComfyUI's recent jobs."""

from __future__ import annotations

import textwrap
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from core import console
from core.errors import UsageError
from deploy import connection, flow
from deploy.host import select
from ops.logs import clean

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 100


class Job(msgspec.Struct, frozen=True):
    """A job: `status` is success, error, interrupted, running or pending; `nodes` of its workflow, `cached` of them.

    `queued` and `started` are in seconds since 1970, `seconds` is how long it took; None where that is not known yet.
    `node`, `node_type` and `error` say where and why it failed.
    """

    id: str
    status: str
    nodes: int
    queued: float | None = None
    started: float | None = None
    seconds: float | None = None
    cached: int = 0
    node: str = ""
    node_type: str = ""
    error: str = ""


def recent(host: str, count: str, *, ask_sudo: bool) -> list[Job]:
    """The last `count` jobs that are over, and all that run and wait; raises NoAnswerError or UsageError."""
    if not (count.isdecimal() and int(count)):
        raise UsageError(f"--number {count} makes no sense", hint="give how many, such as --number 50")
    (name,) = select(host, "")
    with connection.connect(flow.find_target(name), ask_sudo) as agent:
        return msgspec.convert(agent.call("jobs", count=int(count)), list[Job])


def show(found: Sequence[Job], *, as_json: bool) -> None:
    """Print jobs, the oldest first; below the table, why some failed."""
    if as_json:
        console.data_json([msgspec.to_builtins(each) for each in found])
    elif not found:
        console.data("no jobs: ComfyUI remembers none since it started")
    else:
        console.table(("job", "when", "took", "nodes", "status"), map(_row, found))
        for each in found:
            if each.node:
                reason = " ".join(clean(each.error, coloured=False).split())
                text = f"{each.id[:8]}: node {each.node} ({each.node_type}){f': {reason}' * bool(reason)}"
                console.data(textwrap.fill(text, WIDTH, subsequent_indent=" " * 10, max_lines=4, placeholder=" ..."))


def _row(job: Job) -> tuple[str, ...]:
    at = job.started or job.queued
    when = f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}" if at else "-"
    took = "-" if job.seconds is None else f"{job.seconds:.1f} s" if job.seconds < 60 else console.clock(job.seconds)
    nodes = f"{job.nodes}, {job.cached} cached" if job.cached else str(job.nodes)
    return job.id[:8], when, took, nodes, job.status
