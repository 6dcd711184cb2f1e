"""Runs: submit a plan, apply its steps, follow its events, and receive the uploads that it needs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from io import BufferedReader
from typing import IO, Any, cast

from agent.change.accounts import account, linger, members, rights
from agent.change.adopt import adopt, retire, unadopt
from agent.change.cutover import RESERVE, abandon, cut_over, settle_database
from agent.change.env import env
from agent.change.exporter import exporter
from agent.change.folders import folders, mount
from agent.change.gateway import gateway
from agent.change.lifecycle import (
    delete,
    end_linger,
    erase,
    finish_erase,
    forget,
    forget_mounts,
    halt,
    restart,
    start,
    stop,
    withdraw,
)
from agent.change.memory import drop_caches
from agent.change.releases import prune, release, serve
from agent.change.settings import apply_setting, undo_settings
from agent.change.trees import app, base, node, tool
from agent.change.trial import trial_of
from agent.files import (
    AgentError,
    Json,
    Note,
    append,
    cut,
    os_error,
    record,
    remove_drafts,
    retried,
    sha256,
    sync,
    write,
)
from agent.install import install
from agent.journal import Journal, busy, history, note_pending, now, pending
from agent.layout import Layout
from agent.locks import flock, free, holders
from agent.processes import end_with_programs, wait_for
from agent.requester import asker
from agent.schema.change import Base, CutOver, Env, Release, Step, Stop, Tree, unpacked
from agent.schema.decode import decode
from agent.schema.facts import Report
from agent.schema.live import Received
from agent.schema.records import Event, Plan
from agent.serve.managers import manager_of
from agent.serve.systemd import Systemd

STEPS: dict[str, Callable[[Layout, Any, Note], None]] = {
    "account": account,
    "linger": linger,
    "members": members,
    "rights": rights,
    "mount": mount,
    "folders": folders,
    "tool": tool,
    "base": base,
    "app": app,
    "env": env,
    "node": node,
    "exporter": exporter,
    "gateway": gateway,
    "release": release,
    "cut-over": cut_over,
    "serve": serve,
    "prune": prune,
    "retire": retire,
    "adopt": adopt,
    "withdraw": withdraw,
    "unadopt": unadopt,
    "set": apply_setting,
    "unset": undo_settings,
    "drop-caches": drop_caches,
    "stop": stop,
    "start": start,
    "restart": restart,
    "end-linger": end_linger,
    "forget": forget,
    "forget-mounts": forget_mounts,
    "delete": delete,
    "erase": erase,
}


def submit(layout: Layout, request: Json) -> None:
    """Accept a plan and start applying it. Raises AgentError if another run is in progress or the host has changed.

    A plan with a forced stop aborts the run in progress instead.
    """
    for folder in (layout.prefix, layout.state):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        plan = decode(Plan, request)
        steps = [unpacked(each) for each in plan.steps]
    except ValueError as error:
        raise AgentError("usage", "the plan has a step that this agent does not support", str(error)) from error
    with flock(layout.state / "submit.lock", wait=SUBMIT_SECONDS):  # held briefly: the first client submits its plan
        ends = any(isinstance(step, Stop) and step.force for step in steps)
        other = busy(layout)
        if other and ends:
            _abort(layout, f"{plan.action} by {plan.who}")
        elif other:
            if not other["alive"]:
                manager_of(layout).start_apply()  # the applying process was killed and not restarted
            raise AgentError(
                "busy",
                f"a {other['action']} by {other['who']} is in progress on this host since {other['since']}",
                "",
                "follow it with inv attach, then run the same command again",
            )
        elif layout.release() != plan.base or _missing(layout, steps):
            raise AgentError("busy", "the host was changed since the plan was made", "", "run the same command again")
        record(layout.state / "site.json", layout.site)
        install(layout)
        write(layout.state / RESERVE, bytes(RESERVED))
        plan = replace(plan, **asker(plan.who), since=now())
        begin = Event("begin", who=plan.who, key=plan.key, action=plan.action, release=plan.release)
        Journal(layout, plan.run).add(begin)
        note_pending(layout, plan)
        manager_of(layout).start_apply()


def _abort(layout: Layout, why: str) -> None:
    """Abort the run in progress and stop ComfyUI: the run may be waiting for a hostile one.

    Reverts its switch and starts nothing. If this process is killed, the next apply() resumes the abort.
    """
    manager = manager_of(layout)
    note_pending(layout, replace(pending(layout), aborted=why))
    if isinstance(manager, Systemd):  # else systemd restarts the killed process
        subprocess.run([*manager.ctl, "stop", manager.apply_unit], capture_output=True)
    for pid in holders(layout.lock):
        end_with_programs(pid)
    halt(layout, manager, force=True)
    wait_for(lambda: free(layout.lock), 10)
    apply(layout)


SUBMIT_SECONDS = 30
"""Time limit for another client to submit its plan and for systemd to start the apply unit."""


def _missing(layout: Layout, steps: list[Step]) -> set[str]:
    """Return missing parts and releases that these steps need and do not create: another run may have pruned them."""
    trees = [step for step in steps if isinstance(step, Tree)]
    parts = {source.partition("/")[0] for step in trees for source in step.reuse.values()}
    releases = {step.to for step in steps if isinstance(step, CutOver)}
    for step in steps:
        if isinstance(step, Release):
            parts |= set(step.release.parts.values())
            releases.discard(step.release.id)
    parts -= {step.part for step in steps if isinstance(step, (Base, Tree, Env))}
    lack = {name for name in parts if not (layout.parts / name).is_dir()}
    return lack | {name for name in releases if not layout.manifest(name).id}


RESERVED = 65536
"""Bytes reserved to record a run's result on a full disk: the pending plan with a log's last lines, and the journal."""


def apply(layout: Layout) -> None:
    """Apply or resume the pending plan; without one, clean up after an interrupted run.

    Raises OSError if the disk accepts no writes; the plan then stays pending.
    """
    with flock(layout.lock):
        plan = pending(layout)
        if not plan.run:
            _clear(layout)
            manager_of(layout).start_missed()
            return
        journal = Journal(layout, plan.run)
        if plan.result is None:
            error = _carry_out(layout, plan, journal) if plan.aborted is None else _abandon(layout, plan, journal)
            if not error and plan.steps[-1]["kind"] == "erase":
                finish_erase(layout, journal)
                return
            plan = replace(plan, result=error.get("result", "failed") if error else "done", error=error)
            _record(layout, plan)
        _end(layout, plan, journal)


def _carry_out(layout: Layout, plan: Plan, journal: Journal) -> Report:
    """Run the remaining steps; return the report of the AgentError that ended them, or an empty one."""
    done = {event.step for event in journal.events() if event.event == "done"}
    note = _noting(journal)
    for number, step in enumerate(plan.steps):
        if number in done:
            continue
        try:
            journal.add(Event("step", step=number, title=step["title"]))
            STEPS[step["kind"]](layout, unpacked(step), note)
        except AgentError as error:
            return error.report
        except OSError as error:
            return os_error(error, f"could not {step['title']}").report
        except Exception as error:  # a bug: a retry would not help
            what = f"could not {step['title']}: internal error in Hearth"
            return AgentError("step", what, repr(error), f"please report it with {journal.path}").report
        try:
            journal.add(Event("done", step=number))
        except OSError as error:
            return os_error(error, f"{step['title']}: done, but not recorded").report
    return {}


def _abandon(layout: Layout, plan: Plan, journal: Journal) -> Report:
    """End a run that a forced stop has aborted; return its report."""
    report = AgentError(
        "step", f"aborted by {plan.aborted}", "", "wait for its end, then run the same command again"
    ).report
    try:
        return abandon(layout, plan.run, report, _noting(journal))
    except (AgentError, OSError) as error:
        return AgentError(
            "step", report["what"], f"its changes could not be undone: {error}", "inv doctor shows the host's state"
        ).report


def _noting(journal: Journal) -> Note:
    left = NOTES

    def note(text: str) -> None:
        nonlocal left
        left -= 1
        with suppress(OSError):  # a failed note must not stop a step, least of all a revert
            if left >= 0:
                journal.add(Event("note", text=cut(text, 2000) if left else "further notes are omitted"))

    return note


NOTES = 1000
"""Maximum number of notes per run: a custom node may control their content."""


def _record(layout: Layout, plan: Plan) -> None:
    """Record the result in the plan before deleting anything that the run needs.

    If the disk lacks even that space, delete the plan, which also ends the run.
    """
    ended = replace(plan, steps=())
    try:
        retried(lambda: note_pending(layout, ended))
    except OSError:
        (layout.state / RESERVE).unlink(missing_ok=True)
        try:
            note_pending(layout, ended)
        except OSError:
            retried(lambda: layout.pending.unlink(missing_ok=True))


def _end(layout: Layout, plan: Plan, journal: Journal) -> None:
    """Record the result of a run once and delete its files; the plan last, so that the next apply() can resume."""
    names = ("run", "who", "key", "action", "release", "base")
    asked: Json = {name: getattr(plan, name) for name in names}
    line: Json = {"at": now(), "result": plan.result, **asked, "error": plan.error.get("what", "")}
    (layout.state / RESERVE).unlink(missing_ok=True)
    with suppress(OSError):  # a full disk must not keep the run from ending
        if not any(each.get("run") == plan.run for each in history(layout)):
            append(layout.history, line)
    with suppress(OSError):
        if not any(event.event == "end" for event in journal.events()):
            journal.add(Event("end", result=plan.result or "", error=plan.error))
    if not plan.error.get("kept"):
        settle_database(layout, plan.run)
    _clear(layout)
    retried(lambda: layout.pending.unlink(missing_ok=True))


def _clear(layout: Layout) -> None:
    """Delete the temporary files of ended runs."""
    for path in (layout.cut, layout.state / RESERVE, layout.prefix / ".current.back"):
        retried(lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
    for folder in (layout.state, layout.prefix):
        remove_drafts(folder)
    if (layout.state / "trial").exists():
        trial_of(layout, manager_of(layout)).clear()


def follow(layout: Layout, run_id: str) -> Iterator[Event]:
    """Yield the events of a run up to its end. The journal stays open: a run may end by deleting it.

    Raises AgentError.
    """
    journal = Journal(layout, run_id)
    rest, quiet, gone, idle = b"", 0.0, False, 0
    with ExitStack() as stack:
        held: IO[bytes] | None = None
        while True:
            with suppress(FileNotFoundError):
                held = held or stack.enter_context(journal.path.open("rb"))
            if held is None and not layout.state.exists():
                yield Event("end", result="done")  # the run has deleted the state itself
                return
            whole, _, rest = (rest + held.read() if held is not None else b"").rpartition(b"\n")
            fresh = journal.decoded(whole.decode(errors="replace"))
            end = time.monotonic() + 30
            while any(event.erases for event in fresh) and layout.state.exists() and time.monotonic() < end:
                time.sleep(0.02)
            yield from fresh
            if any(event.event == "end" for event in fresh):
                return
            if gone:
                raise AgentError(
                    "step",
                    "the run ended without a record",
                    "the disk may be full",
                    "inv doctor shows the host's state",
                )
            quiet = 0.0 if fresh else quiet + 0.1
            if quiet > 10:
                gone = pending(layout).run != run_id  # read once more: its last line may be new
                idle = idle + 1 if not gone and free(layout.lock) else 0
                if idle > 3:
                    hint = "fix the error in the log above, then run inv attach, which resumes the run"
                    error = AgentError("step", "the apply unit fails at every start", "", hint)
                    with suppress(AgentError):  # the systemd journal may not be readable
                        error.report["log"] = manager_of(layout).apply_log()
                    raise error
                if idle:
                    manager_of(layout).start_apply()
                yield Event("alive")  # keeps the connection alive
                quiet = 0.0
            time.sleep(0.1)


SILENCE = 60
"""Seconds without data after which an upload ends: its client is suspended or gone. The next upload resumes it."""


def receive(layout: Layout, digest: str, size: int, offset: int) -> Received:
    """Write standard input to a blob of `size` bytes, starting at `offset`; return the bytes received so far (`size`).

    A partial blob stays for the next upload to resume. While another client uploads the same blob, write to a copy.
    Raises AgentError if no data arrives, the blob is damaged, or another run has deleted the file.
    """
    signal.signal(signal.SIGALRM, _silent)
    path = layout.incoming / digest
    part = layout.incoming / f"{digest}.part"
    try:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(flock(part))
            except AgentError:
                other, part = part, layout.incoming / f"{digest}.{os.getpid()}.part"
                file = stack.enter_context(flock(part))
                stack.callback(part.unlink, missing_ok=True)
                shutil.copyfile(other, part)
            if path.exists():
                part.unlink(missing_ok=True)
                return Received(size)
            if os.fstat(file.fileno()).st_size < offset:
                raise FileNotFoundError(part)
            file.truncate(offset)  # data that another client has appended is sent again
            while block := _block():
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            there = os.fstat(file.fileno()).st_size
            if there >= size:
                if sha256(part) != digest:
                    part.unlink()
                    raise AgentError(
                        "step", "the file was damaged during the transfer", "", "run the same command again"
                    )
                part.replace(path)
                sync(layout.incoming)
    except FileNotFoundError:
        what, hint = "the partly transferred file was deleted", "run the same command again"
        raise AgentError("step", what, "another run deleted unused files at the same time", hint) from None
    return Received(there)


def _block() -> bytes:
    """Read the next block from standard input. Uses an alarm, as `select` does not see buffered data.

    Raises AgentError.
    """
    signal.alarm(SILENCE)
    try:
        return cast("BufferedReader", sys.stdin.buffer).read1(1 << 20)
    finally:
        signal.alarm(0)


def _silent(*_: object) -> None:
    cause = "the client is suspended, or its connection was lost"
    raise AgentError(
        "step", f"no data arrived for {SILENCE} seconds", cause, "run the same command again; it continues the transfer"
    )
