"""Deploys, rollbacks and bundles."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from core import console, workspace
from core.errors import BundleError, GateError, HearthError, RefusedError, UsageError, suggest
from deploy import bundle as bundles
from deploy import connection, plan, watch
from deploy import host as hosts
from deploy.change import Change, carry_out, change_each
from deploy.group import Consent, on_each
from deploy.inputs import gather
from deploy.look import find_target, look
from deploy.preview import preview
from deploy.profile import Profile
from deploy.refusals import refused
from deploy.release import requesters
from deploy.release_refusals import unfit_stack
from deploy.selection import unseen
from lock import image_base
from lock.updates import transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agent.schema.change import Proof
    from agent.schema.live import Job
    from deploy.bundle import Opened
    from deploy.change import Outcome
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options, Plan
    from lock.preview import Preview

    Build = Callable[[Sequence[Sequence[str]]], None]


@transaction.reading()
def deploy_each(
    names: Sequence[str], options: Options, *, build: Build | None, bundle: str, keep_going: bool
) -> list[Outcome]:
    """Deploy to hosts with `deploy` and `on_each`. `bundle` is a file (empty: none)."""
    if build and bundle:
        raise UsageError(
            "usage", "--build and --bundle exclude each other", hint="a bundle contains the wheels; omit --build"
        )
    with bundles.opened(Path(bundle)) if bundle else nullcontext() as opened:
        agree = Consent(names, "deploy", options)
        one = functools.partial(deploy, options=options, build=build, bundle=opened, agree=agree)
        return on_each(names, one, agree, ask_sudo=options.ask_sudo, keep_going=keep_going)


def deploy(
    name: str,
    options: Options,
    *,
    build: Build | None = None,
    bundle: Opened | None = None,
    agree: Callable[[], None] | None = None,
) -> Outcome:
    """Bring a host to its configured state; raises the errors of `carry_out`.

    If only kernel wheels are missing, `build` is called with the arguments for each, and the deploy is retried. With
    an open `bundle`, the host fetches nothing itself. `agree` is as in `change_each`.
    """
    agree = agree or Consent([name], "deploy", options)
    try:
        return _deploy(name, options, bundle, agree)
    except RefusedError as error:
        wheels = [each.build for each in error.refusals]
        if build is None or options.dry_run or not (wheels and all(wheels)):
            raise
        build(wheels)
    return _deploy(name, options, bundle, agree)


def _deploy(name: str, options: Options, bundle: Opened | None, agree: Callable[[], None]) -> Outcome:
    if bundle:
        _accept(bundle, name, _glance(name, options.ask_sudo))
    target = find_target(name)
    inputs = gather(target)
    if bundle:
        _same_nodes(bundle, name, requesters(target, inputs.nodes))
        _tell_idle_proofs(bundle, name, inputs.proofs)

    watched = options.watch and not options.dry_run and options.trial != "only"
    jobs: list[Job] | None = None

    def make(agent: Agent, target: Target, facts: Facts) -> Plan:
        nonlocal jobs  # of the previous release: its history ends with it
        if watched and jobs is None:
            jobs = watch.finished(agent) or []
        return plan.make(target, facts, inputs, options)

    def breaks(agent: Agent, target: Target, facts: Facts) -> Preview | None:
        return preview(agent, target, facts, inputs)

    change = Change(action="deploy", plan=make, inputs=inputs, offline=bundle is not None, preview=breaks)
    outcome = carry_out(change, target, options, agree)
    if watched and outcome.base not in ("", outcome.release):
        _watch(target, outcome, jobs or [], options)
    return outcome


def _watch(target: Target, outcome: Outcome, jobs: Sequence[Job], options: Options) -> None:
    """Watch a deployed release; raises GateError after a return to the previous one, because jobs got worse."""
    if not (why := watch.watch(target, outcome, jobs, options)):
        return
    console.say(f"{target.name}: {why}; returning to release {outcome.base}")
    what = f"users' jobs got worse with release {outcome.release}: {why}"
    try:
        rollback(target.name, outcome.base, replace(options, ask=False, trial="no"))
    except HearthError as error:
        again = f"inv rollback --host {target.name} --to {outcome.base}"
        raise GateError("worse", what, cause=f"the rollback failed: {error.what}", hint=again) from error
    keep = f"inv jobs --host {target.name}; deploy without --watch to keep the release"
    raise GateError("worse", what, cause=f"release {outcome.base} is in service again", hint=keep)


def rollback(name: str, to: str, options: Options) -> list[Outcome]:
    """Return to a kept release, by default the previous one, with the same cut-over and health gate."""
    chosen = ""

    def back(_: Agent, target: Target, facts: Facts) -> Plan:
        nonlocal chosen  # only once: afterwards the previous release is another one
        chosen = chosen or _kept(target, facts, to)
        return plan.back(target, facts, chosen, options)

    return change_each(hosts.select(name, ""), Change(action="rollback", plan=back), options)


def _kept(target: Target, facts: Facts, to: str) -> str:
    """The release to return to; raises UsageError."""
    others = [each for each in facts.proven if each != facts.current]
    if not others:
        raise UsageError(
            "unknown-name", f"{target.name} has no other release", hint=f"inv releases --host {target.name}"
        )
    if to and to not in others:
        raise UsageError("unknown-name", f"{target.name} has no release {to!r} to return to", hint=suggest(to, others))
    return to or others[0]


# --- bundles ---------------------------------------------------------------------------------------------------------


def _glance(name: str, ask_sudo: bool) -> Facts:
    """A host's facts from its entry in hosts.toml only, since profiles, modes and recipes come from the bundle."""
    (name,) = hosts.select(name, "")
    unknown = Profile(summary="", pythons=(), start_seconds=0)
    target = hosts.Target(name, hosts.hosts().hosts[name], "", unknown, {})
    with connection.connect(target, ask_sudo) as agent:
        return look(agent, target)


def _accept(opened: Opened, name: str, facts: Facts) -> None:
    """Refuse a bundle before any use if the host does not list its signer, or if it is for another machine."""
    if facts.signers is not None:
        who = opened.seal.signer(facts.signers, f"/etc/hearth/allowed_signers on {name}")
        console.say(f"{name} accepts bundles signed by {who}")
    if opened.bundle.platform != facts.platform:
        raise BundleError(
            "bundle",
            f"the bundle is for {opened.bundle.platform}, and {name} is {facts.platform}",
            hint=f"create one for it: inv bundle --host {name}",
        )


def _same_nodes(opened: Opened, name: str, requesters: Sequence[str]) -> None:
    """Refuse a bundle whose nodes differ from the host's."""
    if set(opened.bundle.requesters) != set(requesters):
        theirs, ours = (", ".join(each) or "none" for each in (opened.bundle.requesters, requesters))
        raise BundleError(
            "bundle",
            f"the bundle has other nodes ({theirs}) than {name} ({ours})",
            hint=f"change `nodes` of {name}, or create a bundle for it: inv bundle --host {name}",
        )


def _tell_idle_proofs(opened: Opened, name: str, proofs: Sequence[Proof]) -> None:
    """Name the proofs of a bundle that do not run, because this client's hosts.toml does not ask for them."""
    if idle := sorted({*opened.bundle.proofs} - {each.name for each in proofs}):
        console.say(f"{name} does not run proofs of the bundle, which its `prove` does not name: {', '.join(idle)}")


@transaction.reading()
def make_bundle(
    name: str, output: Path | None, platform: str, python: str, key: Path | None = None, *, ask_sudo: bool
) -> tuple[Path, Opened]:
    """Write one file with everything that a host needs. Asks the host for a missing `platform` or `python`.

    `key` signs it. Raises RefusedError if a kernel wheel or the locked list for that platform and Python is missing,
    and BundleError if the key cannot sign.
    """
    target = find_target(name)
    python = image_base.base().python if target.host.runtime == "podman" else python
    if unfit := unfit_stack(target):
        raise refused("no bundle was written", unfit)
    inputs = gather(target)
    if not (platform and python):
        with connection.connect(target, ask_sudo) as agent:
            found = look(agent, target)
        platform = platform or found.platform
        python = python or next(
            (each for each in target.profile.pythons if each in found.pythons and (platform, each) in inputs.locks), ""
        )
    wheels = unseen(target, inputs, platform, python, "no bundle was written")
    place = output or Path(f"{name}-{inputs.application.version}-{platform}-py{python}.bundle.tar")
    with workspace.current().reading():
        return place, bundles.write(target, inputs, platform, python, wheels, place, key)
