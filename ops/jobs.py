"""ComfyUI's recent jobs."""

from __future__ import annotations

import textwrap
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from agent.schema.live import Job
from core import console
from core.errors import UsageError
from ops import fleet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.connection import Agent
    from deploy.host import Target

WIDTH = 100


def recent(names: Sequence[str], count: str, *, ask_sudo: bool) -> list[fleet.Answer[list[Job]]]:
    """The last `count` jobs of hosts that are over, and all that run and wait; raises UsageError."""
    if not (count.isdecimal() and int(count)):
        raise UsageError(f"--number {count} makes no sense", hint="give how many, such as --number 50")

    def one(agent: Agent, _: Target) -> list[Job]:
        return msgspec.convert(agent.call("jobs", count=int(count)), list[Job])

    return fleet.ask_each(names, one, ask_sudo=ask_sudo, seconds=30)


def show(answers: Sequence[fleet.Answer[list[Job]]], *, as_json: bool) -> int:
    """Print jobs, a host's oldest first; below the table, why some failed. 1 when a host of several told none.

    Raises NoAnswerError, or another error of a host that is the only one.
    """
    seen = fleet.heard(answers)
    found = [(name, each) for name, told in seen.items() for each in told]
    if as_json:
        console.data_json([{"host": name, **msgspec.to_builtins(each)} for name, each in found])
    elif not found and seen:
        console.data("no jobs: ComfyUI remembers none since it started")
    elif found:
        alone = len(answers) == 1  # then the host is no column
        headings = ("host", "job", "when", "took", "nodes", "status")
        console.table(headings[alone:], [(name, *_row(each))[alone:] for name, each in found])
        for _, each in found:
            if each.node:
                reason = " ".join(console.printable(each.error).split())
                text = console.line(f"{each.id[:8]}: node {each.node} ({each.node_type}){f': {reason}' * bool(reason)}")
                console.data(textwrap.fill(text, WIDTH, subsequent_indent=" " * 10, max_lines=4, placeholder=" ..."))
    return int(len(seen) < len(answers))


def _row(job: Job) -> tuple[str, ...]:
    at = job.started or job.queued
    when = f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}" if at else "-"
    took = "-" if job.seconds is None else f"{job.seconds:.1f} s" if job.seconds < 60 else console.clock(job.seconds)
    nodes = f"{job.nodes}, {job.cached} cached" if job.cached else str(job.nodes)
    return job.id[:8], when, took, nodes, job.status
