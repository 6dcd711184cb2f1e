"""Refusals for a release's requirements: GPU, driver, Python, flags, wheels, nodes, packages, space, intact parts."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from packaging.version import Version

from agent.schema.manifest import ReleaseManifest
from core import console
from core.stack import stacks
from deploy import release as releases
from deploy.refusals import Refusal, older
from lock import application as applications
from lock import requirements
from lock.requirements import MANAGER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from core.manifest import Manifest
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.inputs import Inputs
    from lock.advisory import Advisory
    from lock.application import Flag
    from lock.image_base import Base
    from lock.requirements import LockedList

RESERVE_BYTES, RESERVE_FILES = 2_000_000_000, 10_000
"""Free space to keep on a host after a deploy, for outputs, logs and the database."""

UNFIT_BEHIND_GATEWAY = {
    "--enable-cors-header": "it replaces ComfyUI's check of a request's origin, for every site",
    "--multi-user": "every client chooses its user itself, which isolates nobody; the gateway removes that header",
    **dict.fromkeys(releases.TLS_FLAGS, "the gateway serves TLS, and speaks HTTP with ComfyUI"),
}
"""Flags that are refused behind a gateway, and why (ComfyUI's server.py and app/user_manager.py)."""

NEEDS_ROOM = 1.2
"""A new environment's peak size relative to its final size: downloads exist next to the hard-linked packages."""


def recipes(inputs: Inputs) -> list[Refusal]:
    """The recipe of a kernel cannot be read: the wheelhouse's wheels cannot be compared with its version."""
    return [Refusal("recipe", each.what, each.hint or "correct the recipe") for each in inputs.recipe_errors]


def gpu(target: Target, facts: Facts) -> list[Refusal]:
    """The GPU or its driver does not fit the profile."""
    stack, profile = target.stack, target.profile
    found: list[Refusal] = []
    if not facts.gpus:
        what = f"profile {target.profile_name} needs an NVIDIA GPU, and nvidia-smi shows none"
        return [Refusal("no-gpu", what, "install the driver, or choose profile cpu")]
    if facts.driver and older(facts.driver, stack.driver):
        what = f"the driver is {facts.driver}, but CUDA {stack.cuda} needs {stack.driver}"
        fits = [each for each in stacks().values() if not older(facts.driver, each.driver)]
        fitting = [each.name for each in fits if facts.platform in each.platforms and each.runs(target.comfyui)]
        remedy = f', or set stack = "{fitting[-1]}" in the host\'s override' if fitting else ""
        found.append(Refusal("old-driver", what, f"update the driver{remedy}"))
    have = sorted({gpu.capability for gpu in facts.gpus})
    if profile.kernels and profile.arch not in have:
        what = f"the GPU is {', '.join(have)}, but profile {target.profile_name} is for {profile.arch}"
        remedy = f'set arch = "{have[0]}" in the host\'s override, or choose another profile'
        found.append(Refusal("other-gpu", what, remedy))
    return found


def unfit_stack(target: Target) -> list[Refusal]:
    """ComfyUI cannot run on the stack, or this version of it cannot."""
    stack = target.stack
    if stack.builds_only:
        what = f"stack {stack.name} is only for builds: {stack.builds_only}"
        return [Refusal("builds-only", what, "choose another `stack`")]
    if stack.runs(target.comfyui):
        return []
    what = f"stack {stack.name} runs ComfyUI {stack.comfyui}, and {target.name} gets {target.comfyui}"
    known = [each for each in applications.versions() if stack.runs(each)]
    newest = f'comfyui = "{max(known, key=Version)}", the newest known version that it runs' if known else ""
    return [Refusal("unfit-stack", what, f"{newest or 'add an older version'}; or choose another `stack`")]


def uncovered(target: Target, inputs: Inputs, lock: LockedList) -> list[Refusal]:
    """The locked list lacks packages that ComfyUI requires: it belongs to another tree."""
    app, requesters = inputs.application, releases.requesters(target, inputs.nodes)
    wanted = [*inputs.required, *([app.manager] if MANAGER in requesters and app.manager else [])]
    lacking = requirements.uncovered(lock, wanted, requesters)
    if not lacking:
        return []
    each = ", ".join(f"{text} (it has {version or 'none'})" for text, version in lacking.items())
    what = f"ComfyUI {app.version} requires packages that {applications.label(app)}{lock.name} does not have: {each}"
    return [Refusal("uncovered", what, "inv lock resolves them; if torch is among them, choose another `stack`")]


def no_torch(target: Target, facts: Facts) -> list[Refusal]:
    """No torch that runs ComfyUI exists for the host's platform."""
    stack = target.stack
    if found := unfit_stack(target):
        return found
    if facts.platform in stack.platforms:
        return []
    what = f"the machine is {facts.machine}, for which torch {stack.torch} has no build"
    return [Refusal("other-machine", what, f"stack {stack.name} has {', '.join(stack.platforms)}")]


def no_python(listed: Sequence[str], facts: Facts) -> Refusal:
    """The host has no Python that both the profile and the locks support."""
    packages = " or ".join(f"apt-get install python{each}" for each in listed[:2])
    what = f"no Python {' or '.join(listed)} (found: {', '.join(facts.pythons) or 'none'})"
    return Refusal("no-python", what, f"on the host: {packages}")


def flags(target: Target, known: Mapping[str, Flag]) -> list[Refusal]:
    """Flags that this ComfyUI does not accept, or that a release sets itself."""
    origin = {name: target.flag_origin(name) for name in target.flags}
    found = [
        Refusal(
            "own-flag",
            f"{flag} ({origin[flag]}) is reserved: a release sets it itself",
            "omit it; use `folders`, `model_roots`, `listen` and `port` of the host",
        )
        for flag in sorted(releases.OWN_FLAGS & target.flags.keys())
    ]
    wrong = applications.wrong(target.flags, known, origin)
    found += [Refusal("wrong-flag", what, remedy) for what, remedy in wrong]
    for flag, why in UNFIT_BEHIND_GATEWAY.items():
        if target.gateways and flag in target.flags:
            what = f"{flag} ({origin[flag]}) does not fit gateway {', '.join(target.gateways)}: {why}"
            found.append(
                Refusal("unfit-flag", what, f'turn it off: override.flags."{flag}" = {{ off = true, why = "…" }}')
            )
    alone = [flag for flag in releases.TLS_FLAGS if flag in target.flags]
    if len(alone) == 1:  # ComfyUI would serve http
        (other,) = set(releases.TLS_FLAGS) - set(alone)
        found.append(Refusal("half-tls", f"{alone[0]} also needs {other}", "set both, or neither"))
    if releases.manager(target) and (target.host.scope, target.host.runtime) == ("user", "native"):
        what = "ComfyUI-Manager could change its own security level: a system service or a container prevents that"
        remedy = 'set scope = "system" or runtime = "podman" for this host, or omit --enable-manager'
        found.append(Refusal("manager-unprotected", what, remedy))
    return found


def no_wheel(what: str, words: tuple[str, ...]) -> Refusal:
    """A kernel wheel is missing; `words` are the arguments of `inv build-kernels` that build it."""
    remedy = f"inv build-kernels {shlex.join(words)}   (or run the same command again with --build)"
    return Refusal("no-wheel", f"the wheelhouse has no {what}", remedy, words)


def no_lock(platform: str, python: str, inputs: Inputs) -> Refusal:
    """No locked list of packages exists for a bundle's platform and Python."""
    known = ", ".join(sorted(f"{each} with Python {version}" for each, version in inputs.locks))
    what = f"there is no list of packages for {platform}, Python {python or '(no suitable one on the host)'}"
    return Refusal("no-lock", what, f"--platform and --python: {known}")


def known_bad(name: str, listed: Advisory) -> Refusal:
    """A configured node is known to be bad in every version."""
    remedy = f"remove it from the host's `nodes`, then run inv nodes.remove {shlex.quote(name)}"
    return Refusal("known-bad-node", f"{name}: {listed.what} ({listed.source})", remedy)


def old_libraries(wheel: Manifest, facts: Facts | Base) -> list[Refusal]:
    """The host's C or C++ library is too old for a wheel. A version that the host does not report is not refused."""
    libraries = (
        ("old-glibc", "glibc", wheel.glibc, facts.glibc),
        ("old-libstdcxx", "GLIBCXX", wheel.glibcxx, facts.glibcxx),
        ("old-libstdcxx", "CXXABI", wheel.cxxabi, facts.cxxabi),
    )
    remedy = "build it on an older system, or on the host: inv build-kernels --host"
    return [
        Refusal(kind, f"{wheel.file} needs {name} {needed}, the host has {there}", remedy)
        for kind, name, needed, there in libraries
        if older(there, needed)
    ]


def no_package(what: str, remedy: str) -> Refusal:
    """A required node needs a Debian package that the host lacks."""
    return Refusal("no-package", what, remedy)


def unavailable_node(what: str) -> Refusal:
    """The locked list for the host's platform and Python lacks a required node."""
    return Refusal(
        "unavailable-node", what, "remove it from the host's `nodes`, or replace the package with [override]"
    )


def room(target: Target, facts: Facts, inputs: Inputs) -> list[Refusal]:
    """A new environment does not fit on the disk. Both sizes were measured."""
    found: list[Refusal] = []
    need = int((target.stack.size + inputs.application.size) * NEEDS_ROOM) + RESERVE_BYTES
    if facts.disk_free < need:
        what = f"{console.size(facts.disk_free)} free at {facts.prefix}, {console.size(need)} needed"
        found.append(Refusal("no-room", what, "free some space there, or set another `prefix`"))
    inodes = target.stack.files + inputs.application.files + RESERVE_FILES
    if facts.inodes_free is not None and facts.inodes_free < inodes:
        what = f"{facts.inodes_free} inodes free at {facts.prefix}, {inodes} needed"
        found.append(Refusal("no-inodes", what, "delete files there, or set another `prefix`"))
    return found


def broken_release(target: Target, facts: Facts, to: str) -> list[Refusal]:
    """A kept release cannot be put in service again."""
    found: list[Refusal] = []
    remedy = "choose another release, or deploy again"
    host, manifest = target.host, facts.release(to) or ReleaseManifest()
    damaged = [part for part in manifest.parts.values() if facts.parts.get(part) != ""]
    if damaged:
        what = f"release {to} cannot run: {', '.join(damaged)} is missing or damaged"
        found.append(Refusal("damaged-release", what, remedy))
    listed = manifest.files or {f"{host.service}.service": ""}
    unit = listed.get(f"{host.service}.container", listed.get(f"{host.service}.service"))
    if unit is None or (host.scope == "system" and unit and f"\nUser={host.run_as}\n" not in unit):
        what = f"release {to} was made for another service or user than {host.service} and {host.run_as}"
        found.append(Refusal("other-release", what, remedy))
    return found
