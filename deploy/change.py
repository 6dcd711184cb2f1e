"""The only way to change hosts: look, plan, refuse, show, confirm, apply, and check that the host converged."""

from __future__ import annotations

import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING

from agent.schema.change import Erase, packed
from agent.schema.records import Event
from agent.schema.records import Plan as Run
from core import console, workspace
from core.errors import ConnectError, GateError, HostError
from core.typed import convert
from deploy import agent_errors, connection
from deploy.aside import aside
from deploy.facts import Facts
from deploy.group import Consent, on_each
from deploy.host import Target
from deploy.look import find_target, look, web_address
from deploy.plan import Plan
from deploy.refusals import refused
from deploy.upload import Upload
from lock import preview as previews

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.connection import Agent
    from deploy.inputs import Inputs
    from deploy.plan import Options
    from lock.preview import Preview

Planner = Callable[["Agent", Target, Facts], Plan]
"""Plans from a host's facts; it may ask the agent for more."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A way to change hosts.

    `action` is its name in the host's history, `plan` plans it. Afterwards the plan of `check` (default: `plan`) must
    be empty; `unchecked` is the reason if no plan can check it. `state` describes a changed host, unless that is
    "release in service". `inputs` provides the files for steps, with `offline` also those that the host would fetch
    itself. `preview` tells on a dry run what the change breaks; None: nothing to tell.
    """

    action: str
    plan: Planner
    check: Planner | None = None
    unchecked: str = ""
    state: str = ""
    inputs: Inputs | None = None
    offline: bool = False
    preview: Callable[[Agent, Target, Facts], Preview | None] | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of changing one host. `changed`: whether it did anything, or on a dry run would do so.

    `notes` come from the steps; `state` is as in `Change`, empty if the release is in service at `address`.
    `preview` is given on a dry run that changes ComfyUI, the stack or nodes.
    """

    host: str
    release: str
    base: str
    changed: bool
    steps: tuple[str, ...] = ()
    address: str = ""
    notes: tuple[str, ...] = ()
    state: str = ""
    preview: Preview | None = None


def change_each(
    names: Sequence[str], change: Change, options: Options, *, agree: Callable[[], None] | None = None
) -> list[Outcome]:
    """Change hosts in the order of `on_each`. `agree` replaces the plain question, or raises."""
    agree = agree or Consent(names, change.action, options)

    def one(name: str) -> Outcome:
        return carry_out(change, find_target(name), options, agree)

    return on_each(names, one, agree, ask_sudo=options.ask_sudo, keep_going=False)


def carry_out(change: Change, target: Target, options: Options, agree: Callable[[], None]) -> Outcome:
    """Change one host. Raises RefusedError with every reason against it, or GateError."""
    packages = change.inputs.packages if change.inputs else ()
    with connection.connect(target, options.ask_sudo) as agent:
        begun = time.monotonic()

        def planned(planner: Planner) -> tuple[Facts, Plan]:
            facts = look(agent, target, packages, verified=time.monotonic() - begun)  # each part once a command
            return facts, planner(agent, target, facts)

        facts, plan = planned(change.plan)
        preview = change.preview(agent, target, facts) if options.dry_run and change.preview else None
        if plan.refusals:
            for row in previews.rows(preview) if preview else ():
                console.say(console.line(row))
            what = f"{change.action} is refused for {target.name}; nothing was changed"
            error = refused(what, plan.refusals, host=target.name)
            error.previews = {target.name: preview} if preview else {}
            raise error
        show(plan)
        notes: tuple[str, ...] = ()
        if plan.steps and not options.dry_run:
            agree()
            with aside(agent, target, plan.steps, options):
                try:
                    notes = apply(agent, facts, plan, change, offline=change.offline)
                except HostError as error:
                    if error.kind != "offline" or change.offline or change.inputs is None:
                        raise
                    console.say(f"{target.name} cannot reach the package index; uploading packages from this machine")
                    notes = apply(agent, *planned(change.plan), change, offline=True)  # completed actions stay
            if not (change.unchecked or options.trial == "only"):  # a trial changes nothing and can be repeated
                _converged(target.name, planned(change.check or change.plan)[1])
    titles, state = tuple(step.title for step in plan.steps), change.state
    if options.trial == "only" and titles and not options.dry_run:
        state = f"release {plan.release} passed its trial; {plan.base or 'nothing'} stays in service"
    address = "" if change.state else web_address(target)
    return Outcome(target.name, plan.release, plan.base, bool(titles), titles, address, notes, state, preview)


def show(plan: Plan) -> None:
    """Show the steps of a plan, why each is needed, and the plan's notes."""
    for step in plan.steps:
        console.say(console.line(f"  + {step.title}  ({step.why})"))
    for note in plan.notes:
        console.say(console.line(f"  note: {note}"))


def _converged(name: str, left: Plan) -> None:
    remains = [step.title for step in left.steps] + [each.what for each in left.refusals]
    if remains:
        raise GateError(
            "not-converged",
            f"{name} was changed but did not converge; remaining:",
            cause="\n".join(remains),
            hint="run the same command again; if that does not help, please report it as an error in Hearth",
        )


# --- a run on the host -----------------------------------------------------------------------------------------------


def apply(agent: Agent, facts: Facts, plan: Plan, change: Change, *, offline: bool) -> tuple[str, ...]:
    """Send the files of the steps, submit them and follow the run to its end; returns its notes."""
    steps = list(plan.steps)
    with tempfile.TemporaryDirectory(prefix="hearth-") as scratch, workspace.current().reading():
        if change.inputs:
            upload = Upload(agent, facts, change.inputs, Path(scratch), offline)
            steps = upload.pack(steps)
            upload.send()
        run = secrets.token_hex(6)
        body = Run(
            run=run,
            who=f"{getuser()}@{socket.gethostname()}",
            action=change.action,
            release=plan.release,
            base=plan.base,
            steps=tuple(packed(step) for step in steps),
        )
        agent.call("submit", plan=vars(body))
    agent.unpacked = not any(isinstance(step, Erase) for step in steps)
    return follow(agent, run)


def follow(agent: Agent, run: str) -> tuple[str, ...]:
    """Show a run's events until its end and return its notes; raises the run's error."""
    notes: list[str] = []
    for line in agent.stream("follow", run=run):
        event = convert(line, Event)
        if event.event == "step":
            console.say(console.line(f"-> {event.title}"))
        elif event.event == "note":
            notes.append(event.text)
            console.say(console.line(f"   {event.text}"))
        elif event.event == "end":
            if event.error:
                raise agent_errors.error_of(event.error)
            return tuple(notes)
    raise ConnectError(
        "unreachable",
        "the result of the change is unknown: the agent stopped reporting before the run's end",
        hint="it may still be in progress; follow it with inv attach and the same --host",
    )


def attach(name: str, *, ask_sudo: bool = False) -> None:
    """Watch the current run on a host, or show its last one; raises the run's error."""
    target = find_target(name)
    with connection.connect(target, ask_sudo) as agent:
        facts = look(agent, target)
        run = (facts.busy or facts.last).get("run")
        if not run:
            console.say(f"no change was ever made on {target.name}")
            return
        if not facts.busy:
            console.say(f"no run is in progress on {target.name}; its last run:")
        follow(agent, run)
