"""ComfyUI's recent jobs."""

from __future__ import annotations

import textwrap
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.live import Job
from core import console
from core.flags import number
from core.typed import convert
from deploy import fleet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from deploy.connection import Agent
    from deploy.host import Target

WIDTH = 100


def recent(names: Sequence[str], count: str, *, ask_sudo: bool) -> list[fleet.Answer[list[Job]]]:
    """The last `count` finished jobs of each host, and all running and waiting ones; raises UsageError."""
    most = int(number("number", count, 1, whole=True))

    def one(agent: Agent, _: Target) -> list[Job]:
        return convert(agent.call("jobs", count=most), list[Job])

    return fleet.ask_each(names, one, ask_sudo=ask_sudo, seconds=30)


def summary(seen: Mapping[str, list[Job]]) -> list[dict[str, Any]]:
    """The jobs of hosts, for JSON."""
    return [{"host": name, **msgspec.to_builtins(each)} for name, jobs in seen.items() for each in jobs]


def rows(seen: Mapping[str, list[Job]]) -> Iterator[str]:
    """A table of jobs, the oldest of each host first, then the errors of the failed ones."""
    found = [(name, each) for name, jobs in seen.items() for each in jobs]
    if not found:
        yield from ["no jobs since ComfyUI started"] if seen else []
        return
    alone = len(seen) == 1  # without a column for the host
    headings = ("host", "job", "when", "took", "nodes", "status")
    yield from console.table(headings[alone:], [(name, *_row(each))[alone:] for name, each in found])
    for _, each in found:
        if each.node:
            reason = " ".join(console.printable(each.error).split())
            text = console.line(f"{each.id[:8]}: node {each.node} ({each.node_type}){f': {reason}' * bool(reason)}")
            yield from textwrap.wrap(text, WIDTH, subsequent_indent=" " * 10, max_lines=4, placeholder=" ...")


def _row(job: Job) -> tuple[str, ...]:
    at = job.started or job.queued
    when = f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}" if at else "-"
    took = "-" if job.seconds is None else f"{job.seconds:.1f} s" if job.seconds < 60 else console.clock(job.seconds)
    nodes = f"{job.nodes}, {job.cached} cached" if job.cached else str(job.nodes)
    return job.id[:8], when, took, nodes, job.status
