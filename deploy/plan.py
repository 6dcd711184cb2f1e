"""Plans: ordered steps that bring a host to its configured state, or refusals that say why they would fail.

Pure: the same facts and inputs give the same plan; no clock, no file, no network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agent.schema import change as schema
from agent.schema.manifest import ReleaseManifest
from core import console
from deploy import exporter, proofs, refusals, release_refusals
from deploy import release as releases
from deploy.refusals import LANDLOCK_TCP
from deploy.selection import choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.schema.change import Proof, Step
    from deploy.facts import Facts, Process
    from deploy.host import Target
    from deploy.inputs import Inputs
    from deploy.refusals import Refusal
    from deploy.selection import Selection


@dataclass(frozen=True)
class Plan:
    """The changes from `base`, a host's current release, to `release`; no steps if there is nothing to do."""

    base: str
    release: str
    steps: tuple[Step, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        facts: Facts,
        steps: Sequence[Step],
        refusals: Sequence[Refusal],
        notes: Sequence[str] = (),
        *,
        release: str | None = None,
    ) -> Plan:
        """A plan for a host that by default keeps its release. With refusals it has no steps."""
        after = facts.current if release is None else release
        return cls(facts.current, after, () if refusals else tuple(steps), tuple(refusals), tuple(notes))


@dataclass(frozen=True)
class Options:
    """How to make a change.

    `drain` is the number of seconds to wait for jobs; with `force` they are then interrupted. A `dry_run` changes
    nothing. `ask_sudo` asks for the sudo password, `ask` for confirmation before changing a remote host. `trial` is
    whether to try a release next to the active one before the cut-over: "yes", "no", or "only". `watch` is the number
    of seconds to compare users' jobs after a deploy.
    """

    drain: float = 60
    force: bool = False
    dry_run: bool = False
    ask_sudo: bool = False
    ask: bool = False
    trial: str = "yes"
    watch: float = 0


def make(target: Target, facts: Facts, inputs: Inputs, options: Options) -> Plan:
    """The plan for a deploy."""
    selection, found = choose(target, facts, inputs)
    lacking, notes = _system(facts, inputs)
    found += release_refusals.recipes(inputs) + refusals.undeployable(target, facts) + lacking
    if selection is None:
        return Plan.of(facts, (), found, release="")
    wanted = releases.manifest(selection, facts.prefix)
    if not _holds(facts, selection.env_part):
        found += release_refusals.room(target, facts, inputs)
    steps = _steps(target, facts, selection, wanted, options, inputs.proofs)
    for name in inputs.nodes.keys() - selection.nodes.keys():
        what = f"node {name} is not available for {selection.lock.name}: {selection.lock.unavailable[name]}"
        if inputs.nodes[name].required:
            found.append(release_refusals.unavailable_node(what))
        else:
            notes.append(f"left out: {what}")
    if any(isinstance(step, schema.CutOver) for step in steps):
        notes += proofs.rows(inputs.proofs)
    return Plan.of(
        facts, steps, found, (*_notes(target, facts), *_database(facts, wanted.id), *notes), release=wanted.id
    )


def back(target: Target, facts: Facts, to: str, options: Options) -> Plan:
    """The plan that returns to a kept release. It has served before, so it runs no proofs, which may be newer."""
    found = refusals.undeployable(target, facts) + release_refusals.broken_release(target, facts, to)
    wanted, service = facts.release(to), facts.service
    steps = [_release_step(wanted, "its unit or links were changed")] if wanted and to in facts.altered else []
    if steps or facts.current != to or not (service.linked and service.active and service.enabled):
        steps.append(_cut_over(facts, to, "requested", options))
    return Plan.of(facts, steps, found, _database(facts, to), release=to)


def _database(facts: Facts, to: str) -> tuple[str, ...]:
    """What happens to ComfyUI's database on the way back to a release."""
    if not (at := facts.databases.get(to)) or facts.current == to:
        return ()
    return (f"a newer ComfyUI has migrated the database: {to} gets the copy from {at}; the newer one is kept",)


def _system(facts: Facts, inputs: Inputs) -> tuple[list[Refusal], list[str]]:
    """Debian packages that nodes need and the host lacks: refusals for required nodes, notes for others."""
    found: list[Refusal] = []
    notes: list[str] = []
    for name, node in inputs.nodes.items():
        if lacking := [each for each in node.system if facts.packages.get(each) is False]:
            what = f"node {name} needs {', '.join(lacking)}, missing on the host"
            remedy = f"on the host: apt-get install {' '.join(lacking)}"
            if node.required:
                found.append(release_refusals.no_package(what, remedy))
            else:
                notes.append(f"{what}; {remedy}")
    return found, notes


def _holds(facts: Facts, part: str) -> bool:
    return facts.parts.get(part) == ""


def _steps(
    target: Target,
    facts: Facts,
    selection: Selection,
    wanted: ReleaseManifest,
    options: Options,
    proofs: Sequence[Proof],
) -> list[Step]:
    """The steps, in order; none if the host is as wanted."""
    host = target.host
    steps = [*_accounts(target, facts), *_mounts(target, facts), *_folders(target, facts)]
    steps += _part_steps(facts, selection, wanted)
    if facts.release(wanted.id) is None:
        steps.append(_release_step(wanted, "to allow a rollback"))
    elif facts.release(wanted.id) != wanted or wanted.id in facts.altered:
        steps.append(_release_step(wanted, "its manifest, unit or links were changed"))
    replaced = any(step.kind in ("base", "app", "env", "node", "release") for step in steps) or not facts.service.linked
    if facts.current != wanted.id or replaced:
        same = facts.current == wanted.id
        why = "the running release was modified on disk" if same else "it is not the configured release"
        steps.append(_cut_over(facts, wanted.id, why, options, proofs))
        if options.trial == "only":
            return steps
    elif options.trial == "only":
        return [_cut_over(facts, wanted.id, "to run its proofs", options, proofs)] if proofs else []
    elif not (facts.service.active and facts.service.enabled):
        missing = [name for name in ("active", "enabled") if not getattr(facts.service, name)]
        title = f"start {host.service}"
        steps.append(schema.Serve(title, f"it is not {', not '.join(missing)}", f"stop {host.service}"))
    if changed := exporter.change(target, facts, selection.agent_python):
        steps.append(changed)
    made = any(step.kind in ("base", "app", "env", "node", "exporter", "release", "cut-over") for step in steps)
    steps += _prune(facts, wanted.id, host.keep, made)
    return steps


def _accounts(target: Target, facts: Facts) -> list[Step]:
    """The steps for the users that units run as, for lingering, and for members."""
    steps: list[Step] = []
    users = [] if facts.user else [target.host.run_as]
    users += [] if facts.exporter_user else [target.site.exporter]
    if users:
        steps.append(account(users, "units run without privileges"))
    if not facts.lingers:
        title = f"let {facts.login}'s systemd run without a login (loginctl enable-linger)"
        why, undo = "without it ComfyUI ends with your session and does not start at boot", "loginctl disable-linger"
        steps.append(schema.Linger(title, why, undo))
    return steps + _people(target, facts)


def _folders(target: Target, facts: Facts) -> list[Step]:
    """The step that creates folders, or corrects their modes and groups."""
    missing = [path for path, error in facts.places.items() if error]
    if not facts.data:
        title = f"create the folders of {facts.prefix}"
        return [schema.Folders(title, "some of its folders are missing", f"rm -r {facts.prefix}")]
    if not missing and facts.shared:
        return []
    right = "let everybody read" if target.host.public else "give only the members access to"
    title = f"create {', '.join(missing)}" if missing else f"{right} {facts.prefix}/data"
    why = "missing" if missing else "its mode or group differs"
    return [schema.Folders(title, why, "nothing: no file is changed")]


def account(users: Sequence[str], why: str) -> Step:
    """The step that creates system users."""
    title = f"create the system user{'s' * (len(users) > 1)} {' and '.join(users)}"
    return schema.Account(title, why, "; ".join(f"userdel {user}" for user in users))


def _cut_over(facts: Facts, to: str, why: str, options: Options, proofs: Sequence[Proof] = ()) -> Step:
    """The step that puts a release in service, or only tries it."""
    before = facts.current or "nothing"
    if options.trial == "only":
        title, undo = f"try {to} beside {before}, which stays in service", "nothing: it leaves no files"
    else:
        title, undo = f"cut over from {before} to {to}", f"rolls back to {before} automatically if unhealthy"
    return schema.CutOver(title, why, undo, options.drain, options.force, to, options.trial, tuple(proofs))


def _people(target: Target, facts: Facts) -> list[Step]:
    """The steps for the service's group: its members, and their sudo rights."""
    host = target.host
    steps: list[Step] = []
    if host.scope != "system":
        return steps
    group = f"{host.run_as}-members"
    there = facts.members if facts.user else ()  # created by the account's step
    if there is None or sorted(host.members) != sorted(there):
        title = f"members of group {group}: {', '.join(host.members) or 'none'}"
        why, undo = "they can write to the data", f"gpasswd --members '{','.join(there or ())}' {group}"
        steps.append(schema.Members(title, why, undo, host.members))
    rights = target.rights
    if facts.rights is not None and facts.rights != rights:
        may = " and ".join(["read its log", *(f"{each} it" for each in host.members_may)])
        title = f"let members of {group} {may} (sudo)" if rights else "remove the members' sudo rules"
        steps.append(schema.Rights(title, "as configured", "delete the file in /etc/sudoers.d", rights))
    return steps


def _mounts(target: Target, facts: Facts) -> list[Step]:
    """The steps for file systems that Hearth mounts: one unit each, started now and at boot."""
    steps: list[Step] = []
    for path, wanted in target.host.mounts.items():
        there, text = facts.mounts[path], target.mount_text(path)
        if wanted.what and not (there.mounted and there.unit == text):
            title = f"mount {wanted.what} at {path} ({wanted.type}{f', {wanted.options}' * bool(wanted.options)})"
            why = (
                "it is not mounted" if not there.mounted else "its unit is another" if there.unit else "it has no unit"
            )
            undo = f"systemctl disable --now '{target.site.mounts[path]}'"
            steps.append(schema.Mount(title, why, undo, path, wanted.what, text))
    return steps


def _release_step(wanted: ReleaseManifest, why: str) -> Step:
    title = f"write release {wanted.id}: ComfyUI {wanted.version}, torch {wanted.torch}"
    return schema.Release(f"{title}, Python {wanted.python}", why, "pruned later", wanted)


PRUNED = "pruned when no release uses it"


def _part_steps(facts: Facts, selection: Selection, wanted: ReleaseManifest) -> list[Step]:
    steps: list[Step] = []

    def why(part: str) -> str:
        error = facts.parts.get(part, "")
        return f"{part} is damaged: {error}" if error else "the host lacks it"

    if (part := selection.base_part) and not _holds(facts, part):
        title = f"make {part}: the root file system of the container, Python {selection.python}"
        steps.append(schema.Base(title, why(part), PRUNED, part, selection.part_python))
    if not _holds(facts, part := selection.app_part):
        title, writable = f"make {part}: ComfyUI {selection.application.version}", tuple(selection.application.writable)
        steps.append(schema.App(title, why(part), PRUNED, part, selection.part_python, writable, "comfyui"))
    if not _holds(facts, part := selection.env_part):
        if selection.uv not in facts.tools:
            steps.append(schema.Tool(f"send uv ({selection.uv[:12]})", "it installs the environment", "pruned later"))
        steps.append(_env_step(selection, why(part), repair=bool(facts.parts.get(part))))
    steps += [
        _node_step(selection, name, part, why(part), wanted)
        for name, part in selection.node_parts.items()
        if not _holds(facts, part)
    ]
    return steps


def _env_step(selection: Selection, why: str, *, repair: bool) -> Step:
    kernels = ", ".join(f"{wheel.kernel} {wheel.version}" for wheel in selection.wheels)
    label = f"the environment {selection.lock.name}{f' with {kernels}' if kernels else ''}"
    return schema.Env(
        title=f"make {selection.env_part}: {label}",
        why=why,
        undo=PRUNED,
        part=selection.env_part,
        python=selection.part_python,
        repair=repair,
        requirements=selection.requirements,
        kernels=tuple(wheel.file for wheel in selection.wheels),
        version=selection.python,
        requesters=tuple(selection.requesters),
        inside=selection.interpreter if selection.base_part else "",
    )


def _node_step(selection: Selection, name: str, part: str, why: str, wanted: ReleaseManifest) -> Step:
    node = selection.nodes[name]
    step = schema.Node(
        title=f"make {part}: node {name} {node.commit[:9]}",
        why=why,
        undo=PRUNED,
        part=part,
        python=selection.part_python,
        writable=tuple(node.writable),
        keeps=f"nodes/{name}",
        node=name,
    )
    if not node.install:
        return step
    files, service = wanted.files, selection.target.host.service
    return replace(  # runs with the service's rights
        step,
        install=selection.env_part,
        network=bool(node.install_network),
        confined=wanted.confined,
        environment=wanted.environment,
        unit=files.get(f"{service}.container") or files.get(f"{service}.service", ""),
    )


def _prune(facts: Facts, wanted: str, keep: int, changes: bool) -> list[Step]:
    """The step that keeps the wanted release, the previous one, and the most recently active ones, up to `keep`."""
    others = [name for name in facts.proven if name not in (wanted, facts.current)]
    kept = [wanted, *([facts.current] if facts.current != wanted and facts.current else [])]
    kept += others[: max(0, keep - len(kept))]
    gone = [each.id for each in facts.releases if each.id not in kept]
    named = {part for each in facts.releases if each.id in kept for part in each.parts.values()}
    unnamed = [] if changes else [part for part in facts.parts if part not in named]
    if not (changes or gone or unnamed):
        return []
    title = f"prune: keep {', '.join(kept)}"
    return [schema.Prune(title, "old releases take disk space", "deploy it again", tuple(kept))]


def others(processes: Sequence[Process]) -> str:
    """Other processes that compute on a GPU, directly or through MPS, in words; empty if there are none."""
    found = {each.pid: each for each in processes if each.kind != "graphics" and not each.comfyui}
    return ", ".join(
        f"{each.name or 'a process'} (pid {each.pid}{f', {each.user}' * bool(each.user)}"
        f"{f', {console.size(each.bytes)}' if each.bytes else ''})"
        for each in found.values()
    )


def allocator_without_effect(target: Target) -> str:
    """A variable for torch's own allocator that is set although ComfyUI uses CUDA's; empty if there is none."""
    if not target.profile.cuda or "--disable-cuda-malloc" in target.flags:
        return ""
    named = (name for name, value in target.env.items() if name.endswith("ALLOC_CONF") and "backend:" not in value)
    return next(named, "")


_LACKS = {
    2: "ComfyUI cannot move files from one folder to another (Linux 5.19)",
    3: "only the seccomp filter keeps custom nodes from truncating files that they must not write (Linux 6.2)",
    LANDLOCK_TCP: "custom nodes can connect to every TCP port, and listen on any (Linux 6.7)",
    5: "custom nodes can send any ioctl to a device that they can open (Linux 6.10)",
    6: "custom nodes can signal other processes of {login} and connect to their abstract sockets (Linux 6.12)",
}
"""Operations that Landlock restricts only from this version on, and the first kernel with it (landlock(7))."""


def unconfined(target: Target, facts: Facts) -> list[str]:
    """The remaining capabilities of custom nodes on a host without root, one sentence each."""
    if target.host.scope != "user" or target.host.runtime == "podman":
        return []
    if not (facts.landlock and target.host.confined):
        why = "this kernel has no Landlock" if target.host.confined else "the host is not `confined`"
        return [f"{why}: custom nodes can read and write everything that {facts.login} can"]
    lacks = (text.format(login=facts.login) for version, text in _LACKS.items() if facts.landlock < version)
    return [f"this kernel has version {facts.landlock} of Landlock: {text}" for text in lacks]


def _notes(target: Target, facts: Facts) -> list[str]:
    found = [
        f"ComfyUI restarts whenever a Python file in {each} changes, even during a job" for each in target.host.develop
    ]
    found += [target.stack.notice] if target.stack.deprecated else []
    if target.profile.metadata == "none":
        found.append(f"outputs contain no workflow: metadata = none ({target.origin['metadata']})")
    for number, gpu in enumerate(facts.gpus if target.profile.cuda else ()):
        if who := others(gpu.processes):
            found.append(f"other processes use GPU {number}; their memory is not available to ComfyUI: {who}")
    if idle := allocator_without_effect(target):
        found.append(
            f"{idle} has no effect: ComfyUI selects cudaMallocAsync; mode native-allocator selects torch's allocator"
        )
    if facts.manager == "process" and facts.lingers:
        found.append("this login has no systemd: Hearth's own supervisor runs ComfyUI and does not start it at boot")
        if target.profile.memory_max not in ("", "infinity"):
            found.append("ComfyUI's memory is not limited: `memory_max` needs systemd")
    if facts.unused:
        names = ", ".join(facts.unused)
        found.append(
            f"not loaded, because it is in {facts.prefix}/data/custom_nodes: {names} (run inv nodes.add, or delete it)"
        )
    found += unconfined(target, facts)
    if facts.rights is None and target.rights:
        found.append("the host has no sudo: members cannot read the log or restart ComfyUI")
    return found
