"""Read access to hosts: targets by name, facts, history and reachability."""

from __future__ import annotations

import ipaddress
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from agent.schema.facts import Ended, Questions, WantedMount
from core import console, workspace
from core.arch import local_gpus
from core.console import counted
from core.errors import GroupError, HearthError
from core.typed import convert
from deploy import connection
from deploy import host as hosts
from deploy.facts import Facts
from deploy.profile import profiles
from deploy.release import TLS_FLAGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.connection import Agent
    from deploy.host import Target


def find_target(name: str) -> Target:
    """Return a host (empty: this machine) merged with its profile; raises UsageError.

    `local` without a profile gets its GPU's profile if the wheelhouse has the wheels for it.
    """
    (name,) = hosts.select(name, "")
    known = hosts.hosts().hosts[name]
    return hosts.target(name, known.profile or _fitting_profile())


def _fitting_profile() -> str:
    gpus = {gpu.arch.capability for gpu in local_gpus()}
    if not gpus:
        return "cpu"
    wheels = workspace.current().wheelhouse.wheels()
    built = {(wheel.kernel, capability) for wheel in wheels for capability in wheel.capabilities}
    for name, profile in profiles().items():
        if profile.arch in gpus and all((kernel, profile.arch) in built for kernel in profile.kernel_profiles):
            return name
    return "cuda"


def look(agent: Agent, target: Target, packages: Sequence[str] = (), verified: float = 0) -> Facts:
    """The facts of a host, including these Debian packages; one round trip.

    Parts that were verified within the last `verified` seconds are not verified again.
    """
    asked = replace(questions(target, packages), verified=verified)
    return convert(agent.call("facts", **vars(asked)), Facts)


def questions(target: Target, packages: Sequence[str] = ()) -> Questions:
    """What the agent needs to collect facts and the doctor's data."""
    host = target.host
    places = {path: "read" if name == "models" else "write" for name, path in host.folders.items()}
    return Questions(
        pythons=target.profile.pythons,
        mounts={path: WantedMount(mount.what, mount.type) for path, mount in host.mounts.items()},
        places={**dict.fromkeys(host.model_roots, "read"), **places, **dict.fromkeys(host.develop, "bind")},
        packages=tuple(packages),
        metrics_port=host.metrics_port,
        engine=host.runtime == "podman",
        roots=host.model_roots,
    )


def web_address(target: Target) -> str:
    """ComfyUI's address for a browser; if it listens on all addresses, the host's own address."""
    listed = target.host.listen.split(",")
    at = next((each for each in listed if not ipaddress.ip_address(each).is_loopback), listed[0])
    if (only := ipaddress.ip_address(at)).is_unspecified:
        at = target.host.address.rpartition("@")[2] or ("127.0.0.1" if only.version == 4 else "::1")
    scheme = "https" if all(flag in target.flags for flag in TLS_FLAGS) else "http"
    return f"{scheme}://{f'[{at}]' if ':' in at else at}:{target.host.port}"


def facts(name: str, *, ask_sudo: bool = False) -> Facts:
    """The facts of a host."""
    target = find_target(name)
    with connection.connect(target, ask_sudo) as agent:
        return look(agent, target)


def history(name: str, *, ask_sudo: bool = False) -> list[Ended]:
    """The results of all runs on a host, oldest first."""
    target = find_target(name)
    with connection.connect(target, ask_sudo) as agent:
        return convert(agent.call("history"), list[Ended])


def reach(names: Sequence[str], *, ask_sudo: bool = False) -> None:
    """Contact all hosts in parallel and print a description of each; raises GroupError if any fail."""

    def one(name: str) -> HearthError | None:
        try:
            found = facts(name, ask_sudo=ask_sudo)
        except HearthError as error:
            console.say(f"{name}: {error}")
            return error
        console.say(console.line(f"{name}: reachable, {found.os}, {found.machine}, release {found.current or 'none'}"))
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        failed = [error for error in pool.map(one, names) if error]
    if failed:
        raise GroupError(
            "group", f"{len(failed)} of {counted(len(names), 'host')} cannot be reached", hint="read the reasons above"
        )
