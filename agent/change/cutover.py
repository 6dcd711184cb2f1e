"""The cut-over from one release to another, and the way back: a state machine whose every phase is on disk.

`state/cut-over.json` names the run and its phase. A phase is recorded before what it describes is done:

    planned     nothing is done
    trial       the new release runs beside the one in service
    draining    ComfyUI's jobs are waited for
    snapshot    room for a copy of ComfyUI's database is reserved, and the link for the way back made
    stopped     the service is stopped, and its database copied
    switched    `current` becomes the new release
    proving     the new release starts, and is proven
    reverting   `current`, the database and the service become again what they were
    ended       the result stands

A run that was interrupted goes on from its record. Before the switch that means from draining: the old release may
have served meanwhile, after a boot. Once a revert has begun it is finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from agent.api import Endpoint, endpoint
from agent.change.lifecycle import halt
from agent.change.trial import lacking, run_trial
from agent.deletion import remove
from agent.files import Fault, Json, Note, copy, discard, link, os_fault, read, regular, retried, sha256, sync, write
from agent.folders import inside
from agent.layout import DATABASE, Layout
from agent.parts import as_service
from agent.processes import wait_for
from agent.schema.change import CutOver
from agent.serve.health import drain, first_answer, gate, say_changed_types
from agent.serve.managers import last_words, manager_of

MOUNTS_SECONDS = 120
"""How long a cut-over that a boot has interrupted waits for mounts: a server that boots at the same time, too."""


def cut_over(layout: Layout, step: CutOver, note: Note) -> None:
    """Take the old release out of service and the new one in, or go back. Raises Fault when the new one is not in."""
    run = str(read(layout.pending)["run"])
    record = read(layout.cut)
    if record.get("run") != run:
        record = {"run": run, "phase": "planned", "from": layout.release(), "to": step.to, "tried": False}
    Cutover(layout, step, record, note).carry_on()


def abandon(layout: Layout, run: str, report: Json, note: Note) -> Json:
    """End a run's cut-over, if it has one, that somebody cuts short: what it had switched is brought back, and nothing
    is started. How it ended; `report` says why."""
    record = read(layout.cut)
    if record.get("run") != run or record["phase"] not in ("switched", "proving", "reverting"):
        return report
    step = CutOver("", "", "", drain=0, force=True, to=record["to"], trial="no")
    try:
        Cutover(layout, step, {**record, "was_active": False}, note).revert(report)
    except Fault as fault:
        return {**report, "result": "reverted"} if fault.report.get("result") else fault.report


class Cutover:
    """One cut-over; `record` is what lies on disk of it."""

    def __init__(self, layout: Layout, step: CutOver, record: Json, note: Note) -> None:
        self.layout = layout
        self.step = step
        self.record = record
        self.note = note
        self.manager = manager_of(layout)
        self.snapshot = layout.state / f"database-{record['run']}"
        self.way_back = layout.prefix / ".current.back"

    def enter(self, phase: str, **more: object) -> None:
        """Record a phase, before what it describes is done."""
        self.record |= {"phase": phase, **more}
        write(self.layout.cut, json.dumps(self.record))

    def carry_on(self) -> None:
        """Do what is left of it."""
        phase, switched = self.record["phase"], self.layout.release() == self.record["to"]
        if phase == "ended":
            if self.record.get("fault"):
                raise _raised(self.record["fault"])
            return
        if phase == "reverting" or (phase == "proving" and not switched):  # the disk was too full to record a revert
            self.revert(self.record.get("fault") or Fault("gate", "the cut-over was interrupted").report)
        if phase not in ("switched", "proving") or not switched:
            try:
                self.prepare()
                self.enter("ended" if self.step.trial == "only" else "stopped")
            except (Fault, OSError):
                if self.record.get("was_active") and not self.manager.status().active:  # an earlier attempt stopped it
                    retried(self.manager.start)
                raise
            if self.record["phase"] == "ended":
                return
        try:
            if self.record["phase"] == "stopped":
                halt(self.layout, self.manager, force=self.step.force)
                as_service(self.layout, take_snapshot, self.layout.database.parent, self.snapshot)
                sync(self.layout.state)
                self.enter("switched", copied=True)
            if self.record["phase"] == "switched":
                link(self.layout.current, f"releases/{self.record['to']}")
                self.enter("proving")
            self.await_mounts()
            self.manager.install()
            self.manager.start()
            gate(self.layout, self.manager, self.layout.manifest(self.record["to"]), self.note)
            self.enter("ended")
        except Exception as error:  # whatever it is, what ran before must run again
            report = error.report if isinstance(error, Fault) else _unexpected(error).report
            self.revert(report)
        if not self.record["tried"]:
            places = (self.layout.releases / self.record[name] / "proven" for name in ("from", "to"))
            old, new = (read(place, lenient=True) for place in places)
            say_changed_types(old, new, self.note)

    def prepare(self) -> None:
        """All that is done while the old release serves. What fails here has stopped nothing."""
        if missing := self.layout.unmounted():
            what = f"{' and '.join(missing)} went away since the plan was made"
            raise Fault("step", what, "", "mount it there, then run the same command again")
        status = self.manager.status()
        self.record = {"was_active": status.active, "was_enabled": status.enabled, **self.record}
        if not self.record["tried"] and self.step.trial != "no":
            self.enter("trial")
            self.try_out(status.active)
            self.record["tried"] = True
        if self.step.trial == "only":
            return
        self.enter("draining")
        if status.active:  # else it is somebody else's ComfyUI that answers
            drain(endpoint(self.layout), self.step.drain, self.step.force, self.note)
        self.enter("snapshot", copied=False)
        remove(self.snapshot)
        self.snapshot.mkdir()
        os.chown(self.snapshot, *self.layout.owner())
        as_service(self.layout, reserve, self.layout.database.parent, self.snapshot)
        if self.record["from"]:
            link(self.way_back, f"releases/{self.record['from']}")

    def try_out(self, active: bool) -> None:
        """The trial, where it is of use and there is memory for it."""
        if not active and self.step.trial != "only":
            self.note("no trial: nothing is in service that an unhealthy release could interrupt")
        elif short := lacking():
            if self.step.trial == "only":
                raise Fault("trial", f"there is not enough memory for a trial: {short}", "", "stop ComfyUI's jobs")
            self.note(f"no trial, the cut-over alone proves the release: {short}")
        else:
            run_trial(self.layout, self.manager, self.layout.manifest(self.record["to"]), self.note)

    def await_mounts(self) -> None:
        """Wait for mounts that are late, after a boot; systemd would wait for them without end. Raises Fault."""
        if self.layout.unmounted():
            self.note(f"waiting for {' and '.join(self.layout.unmounted())} to be mounted")
        if not wait_for(lambda: not self.layout.unmounted(), MOUNTS_SECONDS):
            what = f"{' and '.join(self.layout.unmounted())} is not mounted"
            raise Fault(
                "step", what, f"waited for {MOUNTS_SECONDS} s", "mount it there, then run the same command again"
            )

    def revert(self, report: Json) -> NoReturn:
        """Bring back what ran before; always raises the Fault that made it necessary.

        Each act is tried more than once. What needs no room on the disk comes first.
        """
        previous = self.record["from"]
        if self.record["phase"] != "reverting":
            with suppress(Fault, OSError):
                report = {**report, "log": last_words(self.manager)}
            (self.layout.state / RESERVE).unlink(missing_ok=True)
            with suppress(OSError):  # without a record it is noticed that `current` was switched back
                retried(lambda: self.enter("reverting", fault=report))
        self.note(f"not healthy, going back to {previous or 'no release'}")
        troubles: list[str] = []

        def attempt(act: Callable[[], object]) -> None:
            try:
                retried(act)
            except (Fault, OSError) as error:
                troubles.append(str(error))

        attempt(self.manager.stop)
        if previous:
            attempt(self.switch_back)
        if self.record.get("copied"):
            try:
                as_service(self.layout, restore, self.snapshot, self.layout.database.parent)
            except (Fault, OSError) as error:
                kept = f"{self.snapshot} holds it as it was before the cut-over"
                troubles.append(f"the database could not be restored: {error}; {kept}")
                report = {**report, "kept": True}
        if previous:
            attempt(self.manager.install)
            if not self.record["was_enabled"]:
                attempt(self.manager.disable)
            if self.record["was_active"]:
                attempt(lambda: self.manager.start(wait=not self.layout.unmounted()))
            back = f"release {previous} is back"
            if self.record["was_active"] and not troubles and not self.layout.unmounted():
                try:
                    old = self.layout.manifest(previous)
                    first_answer(Endpoint.of(old["argv"]), self.manager, old["gate"]["seconds"])
                    back += " and answers"
                except Fault as error:
                    troubles.append(f"release {previous} is back, and does not serve: {error}")
        else:
            attempt(self.manager.uninstall)
            attempt(lambda: discard(self.layout.current))
            back = "there was no release before, so none runs now"
        raise self.reverted(report, back, troubles)

    def switch_back(self) -> None:
        """`current` leads to the old release again: by a rename of what was made before, which needs no room."""
        if os.path.lexists(self.way_back):
            self.way_back.replace(self.layout.current)
            sync(self.layout.prefix)
        elif self.layout.release() != self.record["from"]:
            link(self.layout.current, f"releases/{self.record['from']}")

    def reverted(self, report: Json, back: str, troubles: list[str]) -> Fault:
        """The Fault that a revert ends with, recorded."""
        what = f"release {self.record['to']} is not healthy"
        if troubles:
            cause = "\n".join([f"{report['what']} ({report['cause']})", *troubles])
            fault = Fault("step", f"{what}, and going back failed", cause, "inv facts shows how it is")
        else:
            cause = "\n".join(filter(None, [report["cause"], back]))
            hint = report["hint"] or "read the log above; inv deploy tries again"
            fault = Fault("disk" if report["kind"] == "disk" else "gate", f"{what}: {report['what']}", cause, hint)
            fault.report["result"] = "reverted"
        fault.report |= {"log": report.get("log", []), "kept": report.get("kept", False)}
        with suppress(OSError):
            self.enter("ended", fault=fault.report)
        return fault


RESERVE = "reserve"
"""A file whose room is given up when the disk is full, so that a run can still record how it ended."""


def _raised(report: Json) -> Fault:
    fault = Fault(report["kind"], report["what"], report["cause"], report["hint"])
    fault.report = report
    return fault


def _unexpected(error: Exception) -> Fault:
    if isinstance(error, OSError):
        return os_fault(error, "the cut-over could not be carried out")
    return Fault("gate", f"internal error in Hearth: {error!r}")


# --- the database: run as the service's user -----------------------------------------------------------------------


LARGEST = 20_000_000_000
"""Bytes of a database: an index of models and pictures, some MB."""


def reserve(source: Path, place: Path) -> None:
    """Take the room that a copy of the database needs, so that a full disk is noticed before anything is stopped.

    Raises Fault for a database that is larger than any: a custom node may have made it so.
    """
    with inside(source) as here:
        for name in filter(lambda name: regular(here / name), DATABASE):
            with suppress(FileNotFoundError):
                size = (here / name).lstat().st_size
                if size > LARGEST:
                    what = f"{source / name} is {size} bytes, and ComfyUI's database never is: at most {LARGEST}"
                    raise Fault(
                        "step", what, "", f"inv stop --force, look at it, and move it away: mv {source / name} …"
                    )
                descriptor = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                try:
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                finally:
                    os.close(descriptor)


def take_snapshot(source: Path, place: Path) -> None:
    """Copy the database, while nobody writes to it: a newer ComfyUI migrates it, and an older one then refuses it."""
    with inside(source) as here:
        for name in DATABASE:
            if regular(here / name):  # not where a link leads: this reads what the service's unit hides from it
                copy(here / name, place / name)
            else:
                discard(place / name)


def restore(snapshot: Path, place: Path) -> None:
    """Make the database what it was, file by file; raises OSError when one cannot be restored, and keeps the snapshot.

    The log and journal go first: SQLite would apply a newer one's to the older database.
    """
    with inside(place) as here:
        for name in reversed(DATABASE):
            for draft in here.glob(f".{name}.*"):  # of a restore that was killed
                with suppress(OSError):
                    draft.unlink()
            kept, now = snapshot / name, here / name
            if not kept.exists() or not regular(now):
                retried(lambda now=now: remove(now))  # type: ignore[misc]  # it may be a folder by now
            if kept.exists() and (not regular(now) or sha256(kept) != sha256(now)):
                try:
                    retried(lambda kept=kept, now=now: copy(kept, now))  # type: ignore[misc]
                except OSError:
                    os.replace(kept, now)  # a full disk has room for this, on the same file system  # noqa: PTH105
        retried(lambda: sync(here))  # the snapshot is deleted after this
