"""Refusals for containers: what a host lacks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.refusals import Refusal, older
from lock import image_base

if TYPE_CHECKING:
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.inputs import Inputs

QUADLET, PODMAN, DROP_INS = "4.4", "4.8", "5.0"
"""The first Podman with Quadlet, the first with all that the unit needs, and the first with drop-in files."""


def no_base() -> Refusal:
    """The bundle was made for a host without a container."""
    remedy = 'create it again with runtime = "podman" for this host: inv bundle; or set runtime = "native"'
    return Refusal("no-base", "the bundle has no root file system for containers", remedy)


def lacking(target: Target, facts: Facts) -> list[Refusal]:
    """What the host lacks for a container."""
    engine, native = facts.engine, 'or set runtime = "native" for this host'
    if engine is None or not engine.version:
        return [Refusal("no-engine", "the host has no Podman", f"on the host: apt-get install podman, {native}")]
    found = []
    if older(engine.version, PODMAN) or not engine.quadlet:
        what = (
            f"Podman {engine.version} is too old: containers as units (Quadlet) need {QUADLET}, and this one {PODMAN}"
        )
        if not older(engine.version, PODMAN):
            what = f"Podman {engine.version} is installed without Quadlet, its systemd generator"
        found.append(Refusal("old-engine", what, f"install a newer Podman (Debian 13 has 5.4), {native}"))
    if engine.controllers is None:
        what = "the host has no unified control group hierarchy (cgroup v2), which Podman needs"
        found.append(Refusal("no-cgroups", what, f"boot with systemd.unified_cgroup_hierarchy=1, {native}"))
    elif limited := [each for each in limits(target) if each not in engine.controllers]:
        what = f"limits would be ignored: {target.host.scope} units cannot limit {' and '.join(limited)} on this host"
        fix = "on the host: systemctl edit user@.service, [Service] Delegate=cpu memory pids"
        off = '; or set memory_max = "infinity" in the host\'s override'
        found.append(Refusal("no-limits", what, (fix if target.host.scope == "user" else native[3:]) + off))
    if target.profile.cuda and "nvidia.com/gpu=all" not in engine.devices:
        what = "the engine knows no device nvidia.com/gpu=all (CDI), so a container has no GPU"
        make = "on the host: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml (NVIDIA's container toolkit)"
        found.append(Refusal("no-cdi", what, make))
    if target.host.scope == "user" and not engine.subids:
        what = f"{facts.login} has no subordinate user or group ids, which a container without root needs"
        add = f"on the host: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {facts.login}"
        found.append(Refusal("no-subids", what, f"{add}; then podman system migrate"))
    if facts.manager == "process" and facts.lingers:
        what = "Quadlet needs systemd, which this login does not have"
        found.append(Refusal("no-systemd", what, native[3:]))
    if target.host.scope == "user" and target.profile.network != "open":
        what = f"network = {target.profile.network} has no effect on a container without root"
        found.append(Refusal("network-unenforced", what, 'set scope = "system" for this host, or network = "open"'))
    if older(facts.glibc, glibc := image_base.base().glibc):
        what = f"the Python of containers needs glibc {glibc} to make environments, the host has {facts.glibc}"
        found.append(Refusal("old-glibc", what, native[3:]))
    return found


def no_drop_ins(target: Target, facts: Facts) -> list[Refusal]:
    """Podman is too old for drop-in files of containers, by which MPS reaches one."""
    engine = facts.engine
    if target.host.runtime == "native" or engine is None or not older(engine.version, DROP_INS):
        return []
    what = f"Podman {engine.version} ignores drop-in files of containers, by which MPS reaches one"
    return [Refusal("old-engine", what, f'install Podman {DROP_INS} or newer, or set runtime = "native" for this host')]


def limits(target: Target) -> list[str]:
    """The controllers that the configured limits need."""
    memory = ["memory"] if target.profile.memory_max not in ("", "infinity") else []
    return memory + (["cpu"] if target.profile.cpu_max else [])


def image(target: Target, inputs: Inputs) -> list[Refusal]:
    """What a host has, but an image cannot have."""
    found = []
    for name, node in inputs.nodes.items():
        remedy = f"leave {name} out of `nodes`, or deploy to a host: inv deploy"
        if node.install:
            found.append(Refusal("image-install", f"node {name} runs its install.py, which needs its host", remedy))
        if node.system and node.required:
            found.append(Refusal("no-package", f"node {name} needs {', '.join(node.system)}, not in the base", remedy))
    if unfit := [path for path in target.host.model_roots if ":" in path]:
        what = f"no engine can mount {unfit[0]}, because a colon ends the path"
        found.append(Refusal("image-mount", what, "mount it elsewhere, or use --profile"))
    if target.host.develop:
        what = "nodes under development change while ComfyUI runs, and an image does not"
        found.append(Refusal("image-develop", what, "leave `develop` out, or use --profile"))
    return found
