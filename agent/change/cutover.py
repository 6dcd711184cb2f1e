"""Cut-over from one release to another, with rollback: a state machine that records every phase on disk.

`state/cut-over.json` contains the run and its phase. Each phase is recorded before its actions:

    planned     nothing done yet
    trial       run the new release beside the current one
    draining    wait for ComfyUI's jobs
    snapshot    reserve space for a copy of ComfyUI's database; create the link for the rollback
    stopped     stop the service and copy its database
    switched    point `current` at the new release; give an older one the database of its time
    proving     start and prove the new release
    reverting   restore `current`, the database and the service
    ended       the result is final

An interrupted run resumes from its record. Before the switch it resumes from draining, because the old release may
have served again after a boot. A revert that has begun is always completed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from agent.api import Endpoint, endpoint
from agent.change.database import forget, reserve, restore, revision, revisions, take_snapshot
from agent.change.lifecycle import halt
from agent.change.trial import memory_shortage, run_trial
from agent.deletion import remove
from agent.files import (
    AgentError,
    Note,
    damaged,
    discard,
    link,
    os_error,
    read,
    record,
    recorded,
    retried,
    sync,
)
from agent.journal import pending
from agent.layout import Layout
from agent.look.storage import databases
from agent.parts import as_service
from agent.processes import wait_for
from agent.schema.change import CutOver
from agent.schema.decode import decode
from agent.schema.facts import Report
from agent.schema.records import CutOverPhase, Proven
from agent.serve.health import clearer, drain, first_answer, gate, report_changed_types
from agent.serve.managers import last_words, manager_of
from agent.serve.proofs import Prover

MOUNTS_SECONDS = 120
"""Time limit for late mounts after a boot: the file server may be booting, too."""


def cut_over(layout: Layout, step: CutOver, note: Note) -> None:
    """Replace the current release by the new one, or roll back.

    Raises AgentError if the new release is not in service.
    """
    run = pending(layout).run
    found = _recorded(layout)
    if found.run != run:
        found = CutOverPhase(run, "planned", layout.release(), step.to)
    Cutover(layout, step, found, note).carry_on()


def abandon(layout: Layout, run: str, report: Report, note: Note) -> Report:
    """Abort a run's cut-over, if any: revert the switch and start nothing. Return the final report; `report` is the
    reason for the abort."""
    found = _recorded(layout)
    if found.run != run or found.phase not in ("switched", "proving", "reverting"):
        return report
    step = CutOver("", "", "", drain=0, force=True, to=found.to, trial="no")
    try:
        Cutover(layout, step, replace(found, was_active=False), note).revert(report)
    except AgentError as error:
        return {**report, "result": "reverted"} if error.report.get("result") else error.report


def _recorded(layout: Layout, *, lenient: bool = False) -> CutOverPhase:
    """Return the recorded phase of the last cut-over. Raises AgentError if it is damaged, unless `lenient`."""
    found = read(layout.cut, lenient=lenient)
    try:
        return decode(CutOverPhase, {**found, "base": found.get("from", "")}, lenient=True)
    except ValueError as error:
        if lenient:
            return CutOverPhase()
        raise damaged(layout.cut, str(error)) from None


class Cutover:
    """One cut-over; `record` is its record on disk."""

    def __init__(self, layout: Layout, step: CutOver, found: CutOverPhase, note: Note) -> None:
        self.layout = layout
        self.step = step
        self.record = found
        self.note = note
        self.manager = manager_of(layout)
        self.snapshot = layout.state / f"database-{found.run}"
        self.way_back = layout.prefix / ".current.back"

    def enter(self, phase: str, **more: Any) -> None:
        """Record a phase before its actions."""
        self.record = replace(self.record, phase=phase, **more)
        values = dict(vars(self.record))
        base = values.pop("base")
        record(self.layout.cut, {"from": base, **values})

    def carry_on(self) -> None:
        """Resume from the recorded phase. Raises AgentError if the new release is not in service."""
        phase, switched = self.record.phase, self.layout.release() == self.record.to
        if phase == "ended":
            if self.record.error:
                raise _raised(self.record.error)
            return
        if phase == "reverting" or (phase == "proving" and not switched):  # the disk was too full to record a revert
            self.revert(self.record.error or AgentError("gate", "the cut-over was interrupted").report)
        if phase not in ("switched", "proving") or not switched:
            try:
                self.prepare()
                self.enter("ended" if self.step.trial == "only" else "stopped")
            except (AgentError, OSError):
                if self.record.was_active and not self.manager.status().active:  # stopped by an earlier attempt
                    retried(self.manager.start)
                raise
            if self.record.phase == "ended":
                return
        try:
            if self.record.phase == "stopped":
                halt(self.layout, self.manager, force=self.step.force)
                as_service(self.layout, take_snapshot, self.layout.database.parent, self.snapshot)
                sync(self.layout.state)
                self.enter("switched", copied=True)
            if self.record.phase == "switched":
                link(self.layout.current, f"releases/{self.record.to}")
                if self.record.older:  # now: before the switch, a resumed run would copy it as the current one
                    self.manager.stop()  # a boot may have started it
                    as_service(self.layout, restore, self.database, self.layout.database.parent, True)
                self.enter("proving")
            self.await_mounts()
            self.manager.install()
            self.manager.start()
            self.prove()
            self.enter("ended")
        except Exception as error:  # any error must restore the previous release
            report = error.report if isinstance(error, AgentError) else _unexpected(error).report
            self.revert(report)
        if not self.record.proved:
            places = (self.layout.releases / name / "proven" for name in (self.record.base, self.record.to))
            old, new = (recorded(place, Proven, lenient=True) for place in places)
            report_changed_types(old, new, self.note)

    def prepare(self) -> None:
        """Do everything that is possible while the old release serves. A failure here has stopped nothing."""
        self.layout.check_mounted()
        status = self.manager.status()
        if self.record.was_active is None:
            self.record = replace(self.record, was_active=status.active, was_enabled=status.enabled)
        older = self.older_database()
        if self.record.older is None:
            self.record = replace(self.record, older=older)
        if not self.record.tried and self.step.trial != "no":
            self.enter("trial")
            self.record = replace(self.record, proved=self.try_out(status.active), tried=True)
        if self.step.trial == "only":
            return
        self.enter("draining")
        if status.active:  # else another ComfyUI holds the port
            drain(endpoint(self.layout), self.step.drain, self.step.force, self.note)
        self.enter("snapshot", copied=False)
        remove(self.snapshot)
        self.snapshot.mkdir()
        self.layout.databases.mkdir(exist_ok=True)  # now: a full disk has no room for it later
        os.chown(self.snapshot, *self.layout.owner())
        as_service(self.layout, reserve, self.layout.database.parent, self.snapshot)
        if self.record.base:
            link(self.way_back, f"releases/{self.record.base}")

    def older_database(self) -> str:
        """Return the release whose saved database the new one gets, because it cannot open the current one; or "".

        Raises AgentError if there is none.
        """
        to, now = self.record.to, as_service(self.layout, revision, self.layout.database.parent)
        known = revisions(self.layout, to)
        if not now or not known or now in known:  # a ComfyUI without migrations opens every database
            return ""
        for name, at in sorted(databases(self.layout).items(), key=lambda each: each[1], reverse=True):
            if as_service(self.layout, revision, self.layout.databases / name) in known:
                self.note(f"release {to} cannot open ComfyUI's database ({now}); it gets the copy from {at}")
                return name
        what = f"release {to} cannot open ComfyUI's database, which a newer ComfyUI has migrated to {now}"
        path = self.layout.database
        hint = f"to begin with an empty database: inv stop, mv {path} {path}.newer, and run the same command again"
        raise AgentError("step", what, "no copy from before that is kept", hint)

    def prove(self) -> None:
        """Run the health gate, and the plan's workflows unless the trial has. Raises AgentError."""
        release = self.layout.manifest(self.record.to)
        clear = clearer(self.layout, self.note)
        prover = Prover(self.layout, self.manager, release, release.argv, self.note, clear)
        proofs = () if self.record.proved else self.step.proofs
        gate(self.layout, self.manager, release, self.note, lambda: prover.run(proofs))

    def try_out(self, active: bool) -> bool:
        """Run the trial if it is useful and memory suffices; return whether the release passed it with all workflows.

        Raises AgentError.
        """
        if not active and self.step.trial != "only":
            self.note("no trial: no release is in service, so an unhealthy one cannot interrupt it")
        elif short := memory_shortage(self.step.proofs):
            if self.step.trial == "only":
                raise AgentError(
                    "trial",
                    f"there is not enough memory for a trial: {short}",
                    "",
                    "wait for ComfyUI's jobs, or stop them; then run the same command again",
                )
            self.note(f"no trial, the release is checked after the cut-over only: {short}")
        else:
            return run_trial(
                self.layout, self.manager, self.layout.manifest(self.record.to), self.note, self.step, self.database
            )
        return False

    @property
    def database(self) -> Path:
        """The folder of the database that the new release gets."""
        older = self.record.older
        return self.layout.databases / older if older else self.layout.database.parent

    def await_mounts(self) -> None:
        """Wait for late mounts after a boot; systemd would wait without a limit. Raises AgentError."""
        if self.layout.unmounted():
            self.note(f"waiting for {' and '.join(self.layout.unmounted())} to be mounted")
        if not wait_for(lambda: not self.layout.unmounted(), MOUNTS_SECONDS):
            what = f"{' and '.join(self.layout.unmounted())} is not mounted"
            raise AgentError(
                "step", what, f"waited for {MOUNTS_SECONDS} s", "mount it there, then run the same command again"
            )

    def revert(self, report: Report) -> NoReturn:
        """Restore the previous release; always raise the AgentError that caused the revert.

        Each action is retried. Actions that need no disk space come first.
        """
        previous = self.record.base
        if self.record.phase != "reverting":
            with suppress(AgentError, OSError):
                report = {**report, "log": last_words(self.manager)}
            with suppress(OSError):
                (self.layout.state / RESERVE).unlink(missing_ok=True)
            with suppress(OSError):  # without a record, carry_on() detects that `current` was reverted
                retried(lambda: self.enter("reverting", error=report))
        self.note(f"not healthy, rolling back to {previous or 'no release'}")
        failures: list[str] = []

        def attempt(act: Callable[[], object]) -> None:
            try:
                retried(act)
            except (AgentError, OSError) as error:
                failures.append(str(error))

        attempt(self.manager.stop)
        if previous:
            attempt(self.switch_back)
        if self.record.copied:
            try:
                as_service(self.layout, restore, self.snapshot, self.layout.database.parent)
            except (AgentError, OSError) as error:
                kept = f"{self.snapshot} is the copy from before the cut-over"
                failures.append(f"the database could not be restored: {error}; {kept}")
                report = {**report, "kept": True}
        if previous:
            attempt(self.manager.install)
            if not self.record.was_enabled:
                attempt(self.manager.disable)
            if self.record.was_active:
                attempt(lambda: self.manager.start(wait=not self.layout.unmounted()))
            back = self.check_restored(previous, failures)
        else:
            attempt(self.manager.uninstall)
            attempt(lambda: discard(self.layout.current))
            back = "there was no previous release, so none runs now"
        raise self.reverted(report, back, failures)

    def check_restored(self, previous: str, failures: list[str]) -> str:
        """Return the state of the restored release in words; add a failure if it does not answer."""
        if self.record.was_active and not failures and not self.layout.unmounted():
            try:
                old = self.layout.manifest(previous)
                first_answer(Endpoint.of(old.argv), self.manager, old.gate.seconds)
            except AgentError as error:
                failures.append(f"release {previous} is restored, but does not answer: {error}")
            else:
                return f"release {previous} is restored and answers requests"
        return f"release {previous} is restored"

    def switch_back(self) -> None:
        """Point `current` at the old release by renaming a link made before, which needs no disk space."""
        if os.path.lexists(self.way_back):
            self.way_back.replace(self.layout.current)
            sync(self.layout.prefix)
        elif self.layout.release() != self.record.base:
            link(self.layout.current, f"releases/{self.record.base}")

    def reverted(self, report: Report, back: str, failures: list[str]) -> AgentError:
        """Record and return the AgentError of a revert."""
        what = f"release {self.record.to} is not healthy"
        if failures:
            cause = "\n".join([f"{report['what']} ({report['cause']})", *failures])
            error = AgentError("step", f"{what}, and the rollback failed", cause, "inv doctor shows the host's state")
        else:
            cause = "\n".join(filter(None, [report["cause"], back]))
            hint = report["hint"] or "read the log above; to try again: inv deploy"
            error = AgentError("disk" if report["kind"] == "disk" else "gate", f"{what}: {report['what']}", cause, hint)
            error.report["result"] = "reverted"
        error.report |= {"log": report.get("log", []), "kept": report.get("kept", False)}
        with suppress(OSError):
            self.enter("ended", error=error.report)
        return error


RESERVE = "reserve"
"""A file to delete when the disk is full, to free space for the record of a run's result."""


def _raised(report: Report) -> AgentError:
    error = AgentError(report["kind"], report["what"], report["cause"], report["hint"])
    error.report = report
    return error


def _unexpected(error: Exception) -> AgentError:
    if isinstance(error, OSError):
        return os_error(error, "the cut-over failed")
    return AgentError("gate", f"internal error in Hearth: {error!r}")


def settle_database(layout: Layout, run: str) -> None:
    """Delete a run's copy of the database, or save it for the previous release if the new one has migrated it."""
    snapshot = layout.state / f"database-{run}"
    with suppress(AgentError, OSError):
        retried(lambda: _save_database(layout, run, snapshot))
    forget(snapshot)


def _save_database(layout: Layout, run: str, snapshot: Path) -> None:
    found = _recorded(layout, lenient=True)
    ended = found.run == run and found.phase == "ended" and not found.error
    if not ended or layout.release() != found.to:
        return
    forget(layout.databases / found.to)  # its database is in use again
    if found.base not in ("", found.to) and snapshot.is_dir():
        before, after = (as_service(layout, revision, each) for each in (snapshot, layout.database.parent))
        if before and after and before != after:
            forget(layout.databases / found.base)
            snapshot.replace(layout.databases / found.base)
            sync(layout.databases)
