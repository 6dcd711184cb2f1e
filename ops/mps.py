"""NVIDIA's Multi-Process Service (MPS) for ComfyUI: on, off, limits and status."""

from __future__ import annotations

import re
from string import Template
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.live import Mps
from agent.schema.requests import DropIns
from core import files
from core.console import counted
from core.errors import UsageError
from core.flags import number
from core.typed import convert
from deploy import container_refusals, fleet, refusals
from deploy.change import Change, change_each
from deploy.plan import Plan
from deploy.units import devices
from ops import lifecycle, settings
from ops.status import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agent.schema.settings import State
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options

ACTIONS = ("on", "off", "status", "limit")

PERCENT, MEMORY = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
"""Set in the daemon's environment: the default of every server that it starts, also after a boot."""


def limits(percent: str, memory: str) -> dict[str, str]:
    """The limits of --percent and --memory; raises UsageError."""
    if percent:
        number("percent", percent, 1, 100, whole=True)
    if memory and not re.fullmatch(r"\d+=\d+[MG](,\d+=\d+[MG])*", memory):
        raise UsageError(
            "usage",
            f"--memory {memory} is not a list of limits",
            hint="use GPU=SIZE, such as --memory 0=8G or 0=8G,1=500M",
        )
    return {name: value for name, value in ((PERCENT, percent), (MEMORY, memory)) if value}


def setting(target: Target, control: str, limited: Mapping[str, str]) -> DropIns:
    """The drop-in files of MPS: the daemon's unit, and a drop-in that points ComfyUI to it."""
    service = target.host.service
    text = (files.CHECKOUT / "recipes/system/mps.service").read_text()
    values = {
        "service": service,
        "user": target.host.run_as,
        "control": control,
        "limits": "\n".join(f"Environment={name}={value}" for name, value in limited.items()),
        **devices(target.profile),
    }
    unit = f"{service}-mps.service"
    # PrivateUsers: the daemon inspects its clients' processes, and a separate user namespace would prevent that.
    # PartOf: a CUDA context ends with its server. If the daemon dies, ComfyUI restarts with it.
    drop_in = (
        f"# Written by Hearth: inv mps off removes it.\n"
        f"[Unit]\nWants={unit}\nAfter={unit}\nPartOf={unit}\n"
        f"[Service]\nEnvironment=CUDA_MPS_PIPE_DIRECTORY=/run/{service}-mps\nBindPaths=-/run/{service}-mps\n"
        "PrivateUsers=no\n"
        # If the daemon has given up, a container's mount fails; ComfyUI runs without MPS in an empty folder.
        f"ExecStartPre=-/bin/mkdir -p -m 0700 /run/{service}-mps\n"
    )
    # A client and its server exchange data in /dev/shm.
    container = (
        f"# Written by Hearth: inv mps off removes it.\n"
        f"[Container]\nEnvironment=CUDA_MPS_PIPE_DIRECTORY=/run/{service}-mps\n"
        f"Volume=/run/{service}-mps:/run/{service}-mps\nVolume=/dev/shm:/dev/shm\n"
    )
    name = "hearth-mps.conf"
    found = {unit: Template(text).substitute(values), f"{service}.service.d/{name}": drop_in}
    units = {f"/etc/systemd/system/{name}": text for name, text in found.items()}
    return DropIns({**units, f"/etc/containers/systemd/{service}.container.d/{name}": container})


# --- plans: pure ---------------------------------------------------------------------------------------------------


def turn_on(target: Target, facts: Facts, mps: Mps, state: State, limited: Mapping[str, str], options: Options) -> Plan:
    """The plan that runs ComfyUI's GPU work through MPS with these limits."""
    gpus = [int(each) for each in re.findall(r"(\d+)=", limited.get(MEMORY, ""))]
    found = refusals.no_mps(target, facts, mps.control, gpus) + container_refusals.no_drop_ins(target, facts)
    if settings.settled(state, "mps"):
        return Plan.of(facts, [], found)
    shown = ", ".join(f"{name}={value}" for name, value in limited.items()) or "no limits"
    step = settings.apply_step(
        "mps",
        setting(target, mps.control, limited),
        f"run {target.host.service} under MPS ({shown})",
        undo="inv mps off",
        why="requested" if not mps.on else f"it is {mps.state or 'off'}, or has other limits",
        stops=settings.stopped(facts, options),
    )
    notes = [
        f"MPS is not verified on {gpu.name}: inv mps status --host {target.name} shows whether it works"
        for gpu in facts.gpus
        if gpu.unified
    ]
    return Plan.of(facts, [step], found, notes)


def limit(target: Target, facts: Facts, mps: Mps, state: State, limited: Mapping[str, str], options: Options) -> Plan:
    """The plan that limits a process's GPU use through MPS; refused while MPS is off."""
    if not mps.on:
        return Plan.of(facts, [], [refusals.mps_off(target)])
    return turn_on(target, facts, mps, state, limited, options)


def turn_off(target: Target, facts: Facts, mps: Mps, options: Options) -> Plan:
    """The plan that removes MPS."""
    if not mps.on:
        return Plan.of(facts, [], [])
    title = f"stop MPS, remove its unit, and run {target.host.service} without it"
    step = settings.undo_step("mps", title, force=options.force, stops=settings.stopped(facts, options))
    return Plan.of(facts, [step], refusals.unsettable(target, facts))


def problems(mps: Mps, at: str, *, cuda: bool) -> list[Problem]:
    """The problems of MPS; `cuda` is true if ComfyUI uses a GPU now."""
    if not mps.on:
        if mps.service_knows:
            return [Problem("ComfyUI is configured for MPS, but MPS is off", f"inv restart {at}")]
        return []
    if not mps.state.startswith("active"):
        return [
            Problem(f"MPS is on, but its daemon is not running: {mps.state}", f"inv mps on {at}; or inv mps off {at}")
        ]
    if mps.error:
        return [Problem(f"MPS is on, but {mps.error}", f"inv mps off {at}, then inv mps on {at}")]
    found = [
        Problem(f"MPS server {each.pid} is in state {each.state}", f"inv restart {at}")
        for each in mps.servers
        if each.state.upper().startswith("FAULT")
    ]
    clients = {client.pid for each in mps.servers for client in each.clients}
    if mps.service_pid and not mps.service_knows:
        found.append(Problem("ComfyUI was started before MPS and runs without it", f"inv restart {at}"))
    elif mps.service_pid and cuda and mps.service_pid not in clients:
        found.append(Problem("ComfyUI uses the GPU, but not through MPS", f"inv restart {at}"))
    if mps.restarts:
        found.append(Problem(f"the MPS daemon was restarted {counted(mps.restarts, 'time')}, and ComfyUI with it",
                             "on the host: journalctl --unit '*-mps'"))  # fmt: skip
    return found


# --- carried out ---------------------------------------------------------------------------------------------------


def run(action: str, names: Sequence[str], percent: str, memory: str, options: Options, *, as_json: bool) -> int:
    """Run `inv mps`; raises UsageError."""
    if action not in ACTIONS:
        raise UsageError("usage", f"inv mps has no action {action!r}", hint=f"one of {', '.join(ACTIONS)}")
    limited = limits(percent, memory)
    if limited and action not in ("on", "limit"):
        raise UsageError("usage", "--percent and --memory require on or limit", hint="run inv mps limit --percent 50")
    if not limited and action == "limit":
        raise UsageError(
            "usage",
            "inv mps limit needs a limit",
            hint="give --percent 50, --memory 0=8G or both; --percent 100 removes the limit",
        )
    if action == "status":
        return show(look(names, ask_sudo=options.ask_sudo), as_json=as_json)

    def planner(agent: Agent, target: Target, facts: Facts) -> Plan:
        mps = convert(agent.call("mps"), Mps)
        if action == "off":
            return turn_off(target, facts, mps, options)
        kept = limited if limited or action == "limit" else mps.limits
        state = settings.look(agent, {"mps": setting(target, mps.control, kept)})
        return (limit if action == "limit" else turn_on)(target, facts, mps, state, kept, options)

    state = f"MPS is {'off' if action == 'off' else 'on'}"
    results = change_each(names, Change(action=f"mps {action}", plan=planner, state=state), options)
    return lifecycle.show(results, as_json=as_json, dry_run=options.dry_run)


# --- shown ---------------------------------------------------------------------------------------------------------


def look(names: Sequence[str], *, ask_sudo: bool = False) -> list[fleet.Answer[Mps]]:
    """The MPS status of hosts."""
    return fleet.ask_each(names, lambda agent, _: convert(agent.call("mps"), Mps), ask_sudo=ask_sudo, seconds=30)


def show(answers: Sequence[fleet.Answer[Mps]], *, as_json: bool) -> int:
    """Print the MPS status of hosts; returns 1 for a problem, or if a host did not answer."""

    def plain(name: str, mps: Mps) -> dict[str, Any]:
        return {**msgspec.to_builtins(mps), "problems": msgspec.to_builtins(_problems(name, mps))}

    fleet.show(answers, lines, plain, as_json=as_json)
    return int(any(each.value is None or _problems(each.host, each.value) for each in answers))


def _problems(name: str, mps: Mps) -> list[Problem]:
    return problems(mps, f"--host {name}", cuda=False)


def lines(name: str, mps: Mps) -> list[str]:
    """A host's MPS status in words."""
    trouble = [f"{name}: {each.what}; next: {each.remedy}" for each in _problems(name, mps)]
    if not mps.on:
        why = "" if mps.control else "; nvidia-cuda-mps-control is not installed"
        return [f"{name}: MPS is off{why}", *trouble]
    shown = [f"threads {mps.percent} %"] if mps.percent else []
    shown += [f"memory {mps.limits[MEMORY]}"] if MEMORY in mps.limits else []
    result = [f"{name}: MPS is on, {mps.state}{''.join(f', {each}' for each in shown)}"]
    for server in mps.servers:
        result.append(f"  server {server.pid}: {server.state}")
        for client in server.clients:
            own = " (ComfyUI)" if client.pid == mps.service_pid else ""
            result.append(f"    client {client.pid}: {client.name or '?'}, {client.user or '?'}{own}")
    if not mps.servers and not trouble:
        result.append("  no server: the first process that uses the GPU starts one")
    return [*result, *trouble]
