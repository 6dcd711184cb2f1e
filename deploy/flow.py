"""Flows: look at a host, plan, show, send what it lacks, have it applied, look again."""

from __future__ import annotations

import functools
import gzip
import io
import ipaddress
import secrets
import shlex
import socket
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema import change as schema
from agent.schema.survey import Survey
from core import console, files, foreign, lockfile, manifest, source
from core.arch import local_gpu
from core.errors import (
    BundleError,
    ConnectError,
    ConvergeError,
    GroupError,
    HashMismatchError,
    HearthError,
    HostOfflineError,
    LockStaleError,
    RefusedError,
    SudoError,
    TreeError,
    UnknownNameError,
    UsageError,
    near,
)
from core.stack import Platform
from deploy import adopt as adoption
from deploy import bundle as bundles
from deploy import connection, plan
from deploy import exporter as exporters
from deploy import host as hosts
from deploy import release as releases
from deploy.facts import Facts
from lock import advisory, nodes, requirements
from lock import application as applications

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from agent.schema.change import Step, Tree
    from deploy.adopt import Proposal
    from deploy.bundle import Opened
    from deploy.connection import Agent
    from deploy.host import Target
    from deploy.plan import Options, Plan, Shelf
    from lock.nodes import Node


@dataclass(frozen=True)
class Outcome:
    """How a flow ended on one host: `changed` says whether it did, or on a dry run would do, anything.

    `notes` are what its steps said; `state` is how the host is now, in words, where that is not its release being in
    service.
    """

    host: str
    release: str
    base: str
    changed: bool
    steps: tuple[str, ...] = ()
    address: str = ""
    notes: tuple[str, ...] = ()
    state: str = ""


DESTRUCTIVE = ("remove", "nuke", "adopt", "undo adopt")
"""What takes a service or files away: never without a yes, also on this machine and where there is no terminal."""


class Consent:
    """The yes to a change, asked for once for all hosts of a command.

    Without a terminal only what is `DESTRUCTIVE` needs --yes: scripts deploy, and an unhealthy release is taken back.
    """

    def __init__(self, names: Sequence[str], action: str, options: Options) -> None:
        known = hosts.hosts().hosts
        self._question = f"{action} {', '.join(names)}?"
        self._destroys = action in DESTRUCTIVE
        asks = options.ask and not options.dry_run and (self._destroys or any(known[each].address for each in names))
        self._given = None if asks else True
        self._hint = "run it again and answer y, or add --yes"

    def __call__(self) -> None:
        """Raises RefusedError without a yes."""
        if self._given is None:
            answer = console.agreed(self._question)
            self._given = not self._destroys if answer is None else answer
            if answer is None:
                self._hint = "add --yes: there is no terminal to ask at; --dry-run shows what it does"
        if not self._given:
            raise RefusedError(f"nothing was changed: nobody agreed to {self._question[:-1]}", hint=self._hint)


def find_target(name: str) -> Target:
    """A host (empty: this machine) merged with its profile; raises UnknownNameError.

    `local` without a profile gets its GPU's, where the wheels for that are there.
    """
    (name,) = hosts.select(name, "")
    known = hosts.hosts().hosts[name]
    return hosts.target(name, known.profile or _fitting_profile())


def _fitting_profile() -> str:
    gpu = local_gpu()
    if gpu is None:
        return "cpu"
    built = {(wheel.kernel, wheel.arch) for wheel in manifest.found(files.wheelhouse())}
    for name, profile in hosts.profiles().items():
        if profile.arch == str(gpu) and all((kernel, profile.arch) in built for kernel in profile.kernels):
            return name
    return "cuda"


def look(agent: Agent, target: Target, packages: Sequence[str] = ()) -> Facts:
    """What the host is now, and whether it has these Debian packages; one round trip."""
    return msgspec.convert(agent.call("facts", **questions(target, packages)), Facts)


def questions(target: Target, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the agent must be told to find out what a host is now."""
    host = target.host
    places = {path: "read" if name == "models" else "write" for name, path in host.folders.items()}
    return {
        "pythons": list(target.profile.pythons),
        "mounts": msgspec.to_builtins(host.mounts),
        "places": {**dict.fromkeys(host.model_roots, "read"), **places, **dict.fromkeys(host.develop, "bind")},
        "packages": list(packages),
        "metrics_port": host.metrics_port,
    }


def shelf(target: Target) -> Shelf:
    """What this client can give to a host of that profile."""
    app = applications.application()
    tree = source.fetch(app)
    flags = applications.flags(foreign.text(tree / "comfy/cli_args.py"))
    model_folders = applications.model_folders(foreign.text(tree / "folder_paths.py"))
    stack = target.profile.stack
    (uv,) = (line.split()[0].replace("==", "-") for line in lockfile.requirements("uv"))
    locks = {
        (lock.platform, lock.python): lock
        for each, platform, python in requirements.combinations()
        if each.name == stack and (lock := requirements.find(stack, platform.value, python))
    }
    known = nodes.catalogue()
    chosen = nodes.choose(known, target.profile.nodes)
    _refuse_malware(target, chosen)
    if chosen and (stale := [lock.name for lock in locks.values() if not lock.fits(known)]):
        raise LockStaleError(
            f"nodes were changed, and not resolved yet: {', '.join(stale)}", hint="inv lock, then the same command"
        )
    wanted = exporters.exporter() if target.host.metrics_port else exporters.Exporter()
    return plan.Shelf(app, flags, locks, manifest.found(files.wheelhouse()), uv, chosen, model_folders, wanted)


def _refuse_malware(target: Target, chosen: Mapping[str, Node]) -> None:
    """Refuse nodes of which every version is known to be bad. What depends on the version is told by `inv audit`."""
    listed = advisory.advisories()
    bad = {name: each for name, node in chosen.items() for each in advisory.of(node.url, listed) if each.outright}
    if bad:
        raise RefusedError(
            f"{target.name} would get nodes that are known to be bad; nothing was changed",
            cause="\n         ".join(f"{name}: {each.what} ({each.source})" for name, each in bad.items()),
            hint=f"take it off the host's `nodes`, then inv nodes.remove {shlex.quote(next(iter(bad)))}",
        )


def deploy_each(
    names: Sequence[str],
    options: Options,
    *,
    build: Callable[[Sequence[Sequence[str]]], None] | None,
    bundle: str,
    keep_going: bool,
) -> list[Outcome]:
    """Deploy to hosts, as `deploy` and `on_each` say. `bundle` names a file (empty: none)."""
    if build and bundle:
        raise UsageError("--build and --bundle exclude each other", hint="a bundle holds the wheels that it needs")
    with bundles.opened(Path(bundle)) if bundle else nullcontext() as opened:
        agree = Consent(names, "deploy", options)
        one = functools.partial(deploy, options=options, build=build, bundle=opened, agree=agree)
        return on_each(names, one, agree, ask_sudo=options.ask_sudo, keep_going=keep_going)


def deploy(
    name: str,
    options: Options,
    *,
    build: Callable[[Sequence[Sequence[str]]], None] | None = None,
    bundle: Opened | None = None,
    agree: Callable[[], None] | None = None,
) -> Outcome:
    """Make a host what its configuration says. Raises RefusedError with every reason when that would not work.

    When all that is missing are kernel wheels, `build` is given the words that build each, and it is tried again.
    `bundle` is the one that is open: the host is then not asked to fetch anything. `agree` is as in `change`.
    """
    agree = agree or Consent([name], "deploy", options)
    try:
        return _deploy(name, options, bundle, agree)
    except RefusedError as error:
        if build is None or options.dry_run or not error.builds:
            raise
        build(error.builds)
    return _deploy(name, options, bundle, agree)


def _deploy(name: str, options: Options, bundle: Opened | None, agree: Callable[[], None]) -> Outcome:
    if bundle:
        _accept(bundle, name, _glance(name, options.ask_sudo))
    target = find_target(name)
    stock = shelf(target)
    if bundle:
        _same_nodes(bundle, name, releases.asking(target, stock.nodes))
    packages = sorted({each for node in stock.nodes.values() for each in node.system})
    with connection.connect(target, options.ask_sudo) as agent:
        facts = look(agent, target, packages)
        planned = plan.make(target, facts, stock, options)
        _refuse(planned, f"{name} cannot be deployed to")
        titles = tuple(step.title for step in planned.steps)
        address = web_address(target)
        outcome = Outcome(name, planned.release, planned.base, bool(titles), titles, address)
        show(planned)
        if not planned.steps or options.dry_run:
            return outcome
        agree()
        try:
            _apply(agent, facts, planned, stock, "deploy", offline=bundle is not None)
        except HostOfflineError:
            if bundle:
                raise
            console.say(f"{name} has no way to the package index: sending the packages from here")
            facts = look(agent, target, packages)
            planned = plan.make(target, facts, stock, options)  # what is done already stays done
            _apply(agent, facts, planned, stock, "deploy", offline=True)
        if options.trial == "only":
            return replace(outcome, state=tried(planned))
        _converged(name, plan.make(target, look(agent, target, packages), stock, options))
        return outcome


def _glance(name: str, ask_sudo: bool) -> Facts:
    """What a host is, asked by its entry in hosts.toml alone: a bundle that is open has profiles, modes and recipes."""
    (name,) = hosts.select(name, "")
    unknown = hosts.Profile(summary="", stack="", pythons=(), start_seconds=0)
    target = hosts.Target(name, hosts.hosts().hosts[name], "", unknown, {}, comfyui="")
    with connection.connect(target, ask_sudo) as agent:
        return look(agent, target)


def _accept(opened: Opened, name: str, facts: Facts) -> None:
    """Refuse one whose signer the host does not list, or that is for another machine. Nothing of it is used yet."""
    if facts.signers is not None:
        who = opened.seal.signer(facts.signers, f"/etc/hearth/allowed_signers on {name}")
        console.say(f"{name} takes what {who} signs")
    if opened.bundle.platform != facts.platform:
        raise BundleError(
            f"the bundle is for {opened.bundle.platform}, and {name} is {facts.platform}",
            hint=f"make one for it: inv bundle --host {name}",
        )


def _same_nodes(opened: Opened, name: str, asking: Sequence[str]) -> None:
    """Refuse a bundle that has other nodes than the host."""
    if set(opened.bundle.asking) != set(asking):
        theirs, ours = (", ".join(each) or "none" for each in (opened.bundle.asking, asking))
        raise BundleError(
            f"the bundle has other nodes ({theirs}) than {name} ({ours})",
            hint=f"change `nodes` of {name}, or make a bundle for it: inv bundle --host {name}",
        )


def tried(planned: Plan) -> str:
    """What a host is after a trial that went well."""
    return f"release {planned.release} passed its trial; {planned.base or 'nothing'} stays in service"


def web_address(target: Target) -> str:
    """Where a browser finds ComfyUI: as it listens, and where that is everywhere, as the host is reached."""
    listed = target.host.listen.split(",")
    at = next((each for each in listed if not ipaddress.ip_address(each).is_loopback), listed[0])
    if (only := ipaddress.ip_address(at)).is_unspecified:
        at = target.host.address.rpartition("@")[2] or ("127.0.0.1" if only.version == 4 else "::1")
    scheme = "https" if all(flag in target.flags for flag in releases.TLS_FLAGS) else "http"
    return f"{scheme}://{f'[{at}]' if ':' in at else at}:{target.host.port}"


def make_bundle(
    name: str, output: Path | None, platform: str, python: str, key: Path | None = None, *, ask_sudo: bool
) -> tuple[Path, Opened]:
    """Write one file with all that a host needs; where platform or Python is not told, the host is asked for them.

    It is signed with `key`, where one is given. Raises RefusedError when a kernel wheel is missing or there is no list
    for that platform and Python, SignatureError when the key cannot sign.
    """
    target = find_target(name)
    stock = shelf(target)
    if not (platform and python):
        with connection.connect(target, ask_sudo) as agent:
            found = look(agent, target)
        platform = platform or found.platform
        python = python or next(
            (each for each in target.profile.pythons if each in found.pythons and (platform, each) in stock.locks), ""
        )
    if (platform, python) not in stock.locks:
        known = ", ".join(sorted(f"{each} with Python {version}" for each, version in stock.locks))
        what = f"there is no list of packages for {platform}, Python {python or '(none that fits is there)'}"
        raise RefusedError(what, hint=f"--platform and --python: {known}")
    wheels = [plan.find_wheel(stock, kernel, target, platform, python) for kernel in target.profile.kernels]
    missing = [wheel for wheel in wheels if isinstance(wheel, plan.Refusal)]
    if missing:
        lines = "\n         "
        hint = lines.join(f"inv build-kernels {shlex.join(each.build)}" for each in missing)
        raise RefusedError("kernel wheels are missing", cause=lines.join(each.what for each in missing), hint=hint)
    place = output or Path(f"{name}-{stock.application.version}-{platform}-py{python}.bundle.tar")
    built = [wheel for wheel in wheels if not isinstance(wheel, plan.Refusal)]
    return place, bundles.write(target, stock, platform, python, built, place, key)


def change(
    names: Sequence[str],
    action: str,
    make: Callable[[Agent, Target, Facts], Plan],
    options: Options,
    *,
    state: str = "",
    consent: Callable[[], None] | None = None,
    converges: bool = False,
) -> list[Outcome]:
    """Look at hosts, have `make` plan from what each is, show that, and unless it is a dry run have it applied.

    For plans that send nothing; `make` may ask the agent what it needs beside the facts. `action` is what the host's
    history calls it, `state` how the host is afterwards. `consent` asks in place of the plain question, and raises
    without consent. When it `converges`, the plan must be empty afterwards; raises ConvergeError.
    """

    agree = consent or Consent(names, action, options)

    def one(name: str) -> Outcome:
        target = find_target(name)
        with connection.connect(target, options.ask_sudo) as agent:
            facts = look(agent, target)
            planned = make(agent, target, facts)
            outcome = _carry_out(agent, target, facts, planned, action, options, agree, state)
            if converges and outcome.changed and not options.dry_run:
                _converged(name, make(agent, target, look(agent, target)))
            return outcome

    return on_each(names, one, agree, ask_sudo=options.ask_sudo, keep_going=False)


def _converged(name: str, left: Plan) -> None:
    if left.steps or left.refusals:
        remains = [step.title for step in left.steps] + [each.what for each in left.refusals]
        raise ConvergeError(
            f"{name} is changed, and still not as wanted",
            cause="\n         ".join(remains),
            hint="run the same command again; when that does not help, this is a fault of Hearth's",
        )


def rollback(name: str, to: str, options: Options) -> list[Outcome]:
    """Return to a kept release, by default the one that served last: the same cut-over with the same gate."""

    def back(_: Agent, target: Target, facts: Facts) -> Plan:
        others = [each for each in facts.proven if each != facts.current]
        if not others:
            raise UnknownNameError(f"{target.name} keeps no other release", hint=f"inv releases --host {target.name}")
        if to and to not in others:
            raise UnknownNameError(f"{target.name} keeps no release {to!r} to go back to", hint=near(to, others))
        return plan.back(target, facts, to or others[0], options)

    results = change(hosts.select(name, ""), "rollback", back, options)
    if options.trial == "only" and not options.dry_run:
        return [
            replace(each, state=f"release {each.release} passed its trial; nothing was cut over") for each in results
        ]
    return results


def _propose(agent: Agent, target: Target, facts: Facts, path: str, by: str) -> Proposal:
    raw = agent.call("survey", path=path)
    found = adoption.only(msgspec.convert(adoption.without_secrets(raw), Survey), target.name)
    text = foreign.text(source.fetch(applications.application()) / "comfy/cli_args.py")
    return adoption.propose(target, facts, found, nodes.catalogue(), applications.flags(text), by)


def adopt(
    name: str,
    path: str,
    by: str,
    options: Options,
    *,
    apply: bool,
    undo: bool,
) -> tuple[Proposal | None, Outcome | None]:
    """Propose what becomes of the ComfyUI that is on a host already; nothing is changed, and there is no outcome.

    `apply` takes it over: it is out of service then, and a deploy finds its folders in place. `undo` puts back all that
    this changed, and starts what ran before; there is no proposal then.
    """
    if by not in ("rename", "reference") or (apply and undo):
        raise UsageError("say --by rename or --by reference, and one of --apply and --undo")
    if undo:

        def back(_: Agent, target: Target, facts: Facts) -> Plan:
            return adoption.undo(target, facts, options)

        (outcome,) = change(hosts.select(name, ""), "undo adopt", back, options)
        return None, outcome
    target = find_target(name)
    with connection.connect(target, options.ask_sudo) as agent:
        facts = look(agent, target)
        proposal = _propose(agent, target, facts, path, by)
        if not apply:
            return proposal, None
        planned = adoption.make(target, facts, proposal, options)
        agree = Consent([target.name], "adopt", options)
        return proposal, _carry_out(agent, target, facts, planned, "adopt", options, agree)


def _carry_out(
    agent: Agent,
    target: Target,
    facts: Facts,
    planned: Plan,
    action: str,
    options: Options,
    agree: Callable[[], None],
    state: str = "",
) -> Outcome:
    """Show a plan that sends nothing; unless it is a dry run, have it applied."""
    _refuse(planned, f"{action} is refused for {target.name}")
    titles = tuple(step.title for step in planned.steps)
    if titles:
        show(planned)
    notes: tuple[str, ...] = ()
    if titles and not options.dry_run:
        agree()
        notes = _apply(agent, facts, planned, None, action, offline=False)
    return Outcome(target.name, planned.release, planned.base, bool(titles), titles, notes=notes, state=state)


def facts(name: str, *, ask_sudo: bool = False) -> Facts:
    """What a host is now."""
    target = find_target(name)
    with connection.connect(target, ask_sudo) as agent:
        return look(agent, target)


def reach(names: Sequence[str], *, ask_sudo: bool = False) -> None:
    """Reach all hosts at once and say what each is; raises GroupError when there are some that cannot be reached."""

    def one(name: str) -> HearthError | None:
        try:
            found = facts(name, ask_sudo=ask_sudo)
        except HearthError as error:
            console.say(f"{name}: {error}")
            return error
        console.say(console.line(f"{name}: reached, {found.os}, {found.machine}, release {found.current or 'none'}"))
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        failed = [error for error in pool.map(one, names) if error]
    if failed:
        raise GroupError(f"{len(failed)} of {len(names)} hosts cannot be reached", hint="each one's reason is above")


def history(name: str, *, ask_sudo: bool = False) -> list[dict[str, Any]]:
    """How every run on a host ended, oldest first."""
    target = find_target(name)
    with connection.connect(target, ask_sudo) as agent:
        return msgspec.convert(agent.call("history"), list[dict[str, Any]])


def on_each(
    names: Sequence[str],
    one: Callable[[str], Outcome],
    agree: Callable[[], None],
    *,
    ask_sudo: bool,
    keep_going: bool,
) -> list[Outcome]:
    """Do `one` for every host: the first alone (the canary), then the others at once.

    All questions come before the others begin: each host's sudo password first of all, then `agree`, which `one` calls
    when the canary's plan is shown. One host's error is raised as it is. Of several hosts, all results are told first,
    then GroupError is raised;
    without `keep_going` nothing is begun after a failure of the canary.
    """
    if len(names) == 1:
        return [one(names[0])]
    known = hosts.hosts().hosts
    for name in names if ask_sudo else ():
        with suppress(SudoError):  # its own host reports it
            connection.sudo_password(name, known[name])
    results: list[Outcome] = []
    failed: dict[str, HearthError] = {}

    def attempt(name: str) -> None:
        with console.speaking(name):
            try:
                results.append(one(name))
            except HearthError as error:
                failed[name] = error
                console.say(f"error: {error}")

    attempt(names[0])
    rest = list(names[1:]) if keep_going or not failed else []
    if rest:
        agree()
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(attempt, rest))
    if failed:
        skipped = [name for name in names[1:] if name not in rest]
        raise GroupError(
            f"{len(failed)} of {len(names)} hosts failed",
            cause="\n         ".join(
                [f"{each.host}: {each.state or f'release {each.release} is in service'}" for each in results]
                + [f"{name}: {error.what}" for name, error in failed.items()]
                + [f"{name}: not begun, the canary failed" for name in skipped]
            ),
            hint="each host's own error is above; the same command goes on with those that are left",
        )
    return results


def attach(name: str, *, ask_sudo: bool = False) -> None:
    """Watch what is under way on a host, or see how its last run ended; raises the error that it ended with."""
    target = find_target(name)
    with connection.connect(target, ask_sudo) as agent:
        facts = look(agent, target)
        run = (facts.busy or facts.last).get("run")
        if not run:
            console.say(f"nothing was ever changed on {target.name}")
            return
        if not facts.busy:
            console.say(f"nothing is under way on {target.name}; its last run:")
        _follow(agent, run)


def show(planned: Plan) -> None:
    """Say what is going to be changed, and why."""
    if not planned.steps:
        console.say(f"nothing to do: release {planned.release} is in service")
    for step in planned.steps:
        console.say(console.line(f"  + {step.title}  ({step.why})"))
    for note in planned.notes:
        console.say(console.line(f"  note: {note}"))


def _refuse(planned: Plan, what: str) -> None:
    if planned.refusals:
        wheels = tuple(each.build for each in planned.refusals if each.build)
        error = RefusedError(
            f"{what}; nothing was changed",
            cause="\n         ".join(each.what for each in planned.refusals),
            hint="\n         ".join(each.remedy for each in planned.refusals),
        )
        error.builds = wheels if len(wheels) == len(planned.refusals) else ()
        raise error


# --- applying ------------------------------------------------------------------------------------------------------


def _apply(
    agent: Agent, facts: Facts, planned: Plan, stock: Shelf | None, action: str, *, offline: bool
) -> tuple[str, ...]:
    """Send what the steps need, submit them, follow them to their end; what they said."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as scratch:
        blobs: dict[str, Path] = {}
        steps: list[dict[str, Any]] = []
        if stock is not None:  # all at once, not each when it is packed
            lacking = [step.node for step in planned.steps if isinstance(step, schema.Node)]
            nodes.fetch({name: stock.nodes[name] for name in lacking})
        for step in planned.steps:
            if stock is not None:
                step = _pack(step, agent, facts, stock, Path(scratch), blobs, offline=offline)
            steps.append(schema.packed(step))
        _send(agent, facts, blobs)
        run = secrets.token_hex(6)
        body = {
            "run": run,
            "who": f"{getuser()}@{socket.gethostname()}",
            "action": action,
            "release": planned.release,
            "base": planned.base,
            "steps": steps,
        }
        agent.call("submit", plan=body)
    return _follow(agent, run)


def _pack(
    step: Step, agent: Agent, facts: Facts, stock: Shelf, scratch: Path, blobs: dict[str, Path], *, offline: bool
) -> Step:
    """A step with all that the agent needs for it; files to send go into `blobs` by their SHA-256."""

    def blob(path: Path) -> str:
        digest = files.sha256(path)
        blobs[digest] = path
        return digest

    platform = Platform.parse(facts.platform)
    if isinstance(step, schema.Tool):
        return replace(step, name=stock.uv, blob=blob(lockfile.install("uv", platform, "3.11") / "bin/uv"))
    if isinstance(step, schema.App):
        return _pack_tree(step, "app", source.intact(stock.application), agent, facts, scratch, blob)
    if isinstance(step, schema.Exporter):
        return _pack_tree(step, "exporter", exporters.tree(platform), agent, facts, scratch, blob)
    if isinstance(step, schema.Node):
        tree = source.intact(stock.nodes[step.node].pinned(step.node))
        return _pack_tree(step, f"custom_nodes/{step.node}", tree, agent, facts, scratch, blob)
    if isinstance(step, schema.Env):
        kernels = [wheel for wheel in stock.wheels if wheel.file in step.kernels]
        blobs |= {wheel.sha256: manifest.whole(wheel) for wheel in kernels}
        wheels = [schema.WheelFile(wheel.file, wheel.sha256) for wheel in kernels]
        if offline:
            lock = stock.locks[facts.platform, step.version]
            folder = requirements.download(lock, step.asking, platform)
            wheels += [schema.WheelFile(path.name, blob(path)) for path in sorted(folder.glob("*.whl"))]
            if damaged := [each.file for each in wheels[len(kernels) :] if each.sha256 not in lock.text]:
                what = f"{folder / damaged[0]} was damaged: its hash is not the locked one"
                raise HashMismatchError(what, hint=f"rm -r {shlex.quote(str(folder))}, then run the same command again")
        return replace(step, tool=stock.uv, wheels=tuple(wheels), offline=offline)
    return step


def _pack_tree(
    step: Tree, kind: str, tree: Path, agent: Agent, facts: Facts, scratch: Path, blob: Callable[[Path], str]
) -> Step:
    """The step with an archive of the files that no release there has for the same `kind`, and where the others lie."""
    wanted = {
        name: files.sha256(path) + ("x" if path.stat().st_mode & 0o100 else "") for name, path in files.tree(tree)
    }
    if "PART.json" in wanted:  # the agent's own record of a part
        raise TreeError(f"{tree.name} has a file PART.json, which a host would take for its own")
    used = {each["parts"].get(kind) for each in facts.releases}
    there = sorted(name for name, fault in facts.parts.items() if name in used and not fault)
    held: dict[str, str] = {}
    for part, listed in agent.call("contents", parts=there).items() if there else ():
        held |= {digest: f"{part}/{name}" for name, digest in listed.items()}
    reuse = {name: held[digest] for name, digest in wanted.items() if digest in held}
    archive = scratch / f"{tree.name}.tar.gz"
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for name in sorted(wanted.keys() - reuse.keys()):
            content = (tree / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mode = 0o755 if wanted[name].endswith("x") else 0o644
            tar.addfile(info, io.BytesIO(content))
    return replace(step, files=wanted, reuse=reuse, blob=blob(archive))


def _send(agent: Agent, facts: Facts, blobs: dict[str, Path]) -> None:
    """Send what the host does not hold yet, each file from where an interrupted run left it."""
    missing = {digest: path for digest, path in blobs.items() if digest not in facts.incoming}
    offsets = {digest: facts.incoming.get(f"{digest}.part", 0) for digest in missing}
    total = sum(path.stat().st_size - offsets[digest] for digest, path in missing.items())
    if not missing:
        return
    console.say(f"sending {len(missing)} files, {console.size(total)}")
    with console.Progress("sending", total, len(missing)) as progress:
        for digest, path in missing.items():
            agent.send(path, digest, offsets[digest], progress.advance)
            progress.step(path.name, 0, 0)


def _follow(agent: Agent, run: str) -> tuple[str, ...]:
    """Show a run's events until its end, and return its notes; raises the error that it ended with."""
    notes: list[str] = []
    for event in agent.stream("follow", run=run):
        if event["event"] == "step":
            console.say(console.line(f"-> {event['title']}"))
        elif event["event"] == "note":
            notes.append(event["text"])
            console.say(console.line(f"   {event['text']}"))
        elif event["event"] == "end":
            if event["fault"]:
                raise connection.error_of(event["fault"])
            return tuple(notes)
    raise ConnectError(
        "how the change ended is not known: the agent stopped reporting before the run's end",
        hint="it may still be under way; see it by: inv attach, with the same --host",
    )
