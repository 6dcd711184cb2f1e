"""What the agent records on a host and reads again, also from agents of other versions (`agent.files.recorded`).

Run plans and events are sent, too: `inv attach` follows them.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from agent.schema.facts import Report
from agent.schema.record import Record
from agent.schema.settings import Applied


class Plan(Record):
    """A run's plan: submitted by the client, then `state/pending.json` until its end. Times: ISO 8601, UTC."""

    run: str = ""  # its id; empty: no run is in progress
    who: str = ""  # see agent/requester.py; from the client: who it claims to be
    key: str = ""  # fingerprint of the SSH key that logged in; empty if unknown
    since: str = ""
    action: str = ""  # such as "deploy"
    release: str = ""  # the release that the run is to put in service
    base: str = ""  # the release in service when the plan was made
    steps: tuple[dict[str, Any], ...] = ()  # see `change.packed`; deleted when the run has ended
    aborted: str | None = None  # the forced stop that aborts it; None: it goes on
    result: str | None = None  # "done", "failed" or "reverted"; None: it has not ended
    error: Report = field(default_factory=Report)  # why it failed


class Event(Record):
    """A line of `state/runs/<run>.jsonl`."""

    event: str  # "begin", "step" or "done" (a step's begin and end), "note", "end", or "alive" (sent when it is quiet)
    at: str = ""  # ISO 8601, UTC
    who: str = ""  # begin: as in the plan, like the following fields
    key: str = ""
    action: str = ""
    release: str = ""
    step: int | None = None  # step, done: its number
    title: str = ""  # step: its title
    text: str = ""  # note
    result: str = ""  # end: as in the plan, like the error
    error: Report = field(default_factory=Report)
    erases: bool = False  # end: the run deletes the state after this line


class CutOverPhase(Record):
    """The phase of a run's cut-over (`state/cut-over.json`, see `agent.change.cutover`). None: not known yet."""

    run: str = ""  # empty: there is none
    phase: str = ""
    base: str = ""  # the release before; empty: none. In the file it is `from`, a keyword of Python
    to: str = ""  # the new release
    tried: bool = False  # the trial is over, or was skipped
    proved: bool = False  # the release has passed its trial with all workflows
    was_active: bool | None = None  # the service ran before
    was_enabled: bool | None = None  # the service started at boot before
    older: str | None = None  # the release whose saved database the new one gets; empty: it keeps the current one
    copied: bool = False  # the copy of the database is complete
    error: Report | None = None  # why it is reverted, then of its end


class SettingChange(Applied):
    """A line of `state/settings.jsonl`: a change outside the prefix, or its end."""

    setting: str = ""
    event: str = "change"  # or "undone", which ends the changes of this place
    at: str = ""  # ISO 8601, UTC


class OldUnit(Record):
    """A unit of an adopted installation."""

    name: str
    path: str
    active: bool
    enabled: bool


class AdoptionChange(Record):
    """A line of `state/adopted.jsonl`: one change of an adoption."""

    event: str  # "unit", "rename", "own" or "database"
    at: str = ""  # ISO 8601, UTC
    unit: OldUnit | None = None  # unit: set aside
    source: str = ""  # rename: from here
    target: str = ""  # rename: to here
    folder: str = ""  # own: of the entries; database: which was copied
    entries: tuple[tuple[Any, ...], ...] = ()  # own: name, uid, gid, mode and inode (older agents: without) before


class Proven(Record):
    """How a release passed the health check (`releases/<id>/proven`)."""

    at: str = ""  # ISO 8601, UTC
    failed_nodes: dict[str, str] = field(default_factory=dict)  # nodes that could not be imported, and why
    types: Any = field(default_factory=dict)  # the module of each node type; from older agents a list of types
    replaced: dict[str, str] = field(default_factory=dict)  # former node types, and what ComfyUI uses for them


class SealedPart(Record):
    """A complete part (`parts/<part>/PART.json`)."""

    part: str = ""  # its name
    bytes: int = 0
    stamp: str = ""  # see `agent.parts.stamp`; empty: incomplete


class Supervision(Record):
    """A supervisor and its ComfyUI (`state/supervisor.json`). A process: its pid, and its start as `started` says."""

    pid: int = 0
    pid_started: str | None = None  # None: from an older agent
    child: int = 0  # 0: not running
    child_started: str | None = None  # None: from an older agent
    restarts: int = 0
    since: str = ""  # ISO 8601, UTC
    offset: int = 0  # bytes of the log before this run of ComfyUI


class Choice(Record):
    """What runs the service (`state/manager.json`)."""

    manager: str = ""  # "systemd-system", "systemd-user" or "process"; empty: not installed, or by an older agent


class JobCounts(Record):
    """The exporter's counts of jobs (`jobs.json` in its runtime directory)."""

    bounds: tuple[float, ...] = ()  # of the buckets, in seconds; other ones: count anew
    known: tuple[str, ...] = ()  # the last ids counted, oldest first
    results: dict[str, int] = field(default_factory=dict)  # "done", "failed" and "interrupted"
    counts: tuple[int, ...] = ()  # jobs in each bucket
    seconds: float = 0  # of all jobs together
