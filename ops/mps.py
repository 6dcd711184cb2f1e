"""NVIDIA's Multi-Process Service (MPS) for ComfyUI: on, off, limited, and what it does now."""

from __future__ import annotations

import re
from dataclasses import replace
from string import Template
from typing import TYPE_CHECKING

import msgspec

from core import console, files
from core.errors import UsageError
from deploy import flow
from deploy import host as hosts
from deploy import release as releases
from deploy.plan import Plan, Refusal
from ops import fleet, lifecycle, tuning
from ops.status import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.flow import Outcome
    from deploy.host import Target
    from deploy.plan import Options
    from ops.tuning import Change, State

ACTIONS = ("on", "off", "status", "limit")

PERCENT, MEMORY = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
"""In the daemon's environment: the default of every server that it starts, so also of those after a boot."""


class Client(msgspec.Struct, frozen=True):
    """A process that computes through a server."""

    pid: int
    name: str | None
    user: str | None


class Server(msgspec.Struct, frozen=True):
    """An MPS server with its clients."""

    pid: int
    state: str
    clients: tuple[Client, ...]


class Mps(msgspec.Struct, frozen=True):
    """What `agent/mps.py` tells."""

    on: bool = False
    control: str = ""
    state: str = ""
    restarts: int = 0
    limits: dict[str, str] = {}
    percent: str = ""
    servers: tuple[Server, ...] = ()
    fault: str = ""
    service_pid: int = 0
    service_knows: bool = False


def limits(percent: str, memory: str) -> dict[str, str]:
    """The limits as --percent and --memory say them; raises UsageError."""
    if percent and not (percent.isdecimal() and 1 <= int(percent) <= 100):
        raise UsageError(
            f"--percent {percent} makes no sense", hint="1 to 100 percent of a GPU's threads for a process"
        )
    if memory and not re.fullmatch(r"\d+=\d+[MG](,\d+=\d+[MG])*", memory):
        raise UsageError(f"--memory {memory} makes no sense", hint="GPU=SIZE, such as --memory 0=8G or 0=8G,1=500M")
    return {name: value for name, value in ((PERCENT, percent), (MEMORY, memory)) if value}


def changes(target: Target, control: str, limited: Mapping[str, str]) -> list[Change]:
    """What turning MPS on changes: the daemon's unit, and where ComfyUI finds it."""
    service = target.host.service
    text = (files.CHECKOUT / "recipes/system/mps.service").read_text()
    values = {
        "service": service,
        "user": target.host.run_as,
        "control": control,
        "limits": "\n".join(f"Environment={name}={value}" for name, value in limited.items()),
        **releases.devices(target.profile),
    }
    unit = f"{service}-mps.service"
    # PartOf: a CUDA context does not outlive its server. When the daemon dies, ComfyUI is started again with it.
    drop_in = (
        f"# Written by Hearth: inv mps off takes it away.\n"
        f"[Unit]\nWants={unit}\nAfter={unit}\nPartOf={unit}\n"
        f"[Service]\nEnvironment=CUDA_MPS_PIPE_DIRECTORY=/run/{service}-mps\nReadWritePaths=-/run/{service}-mps\n"
    )
    return [
        tuning.file(f"/etc/systemd/system/{unit}", Template(text).substitute(values)),
        {"kind": "unit", "place": unit},
        tuning.file(f"/etc/systemd/system/{service}.service.d/hearth-mps.conf", drop_in),
    ]


# --- plans: pure ---------------------------------------------------------------------------------------------------


def turn_on(target: Target, facts: Facts, mps: Mps, state: State, limited: Mapping[str, str], options: Options) -> Plan:
    """The plan that has ComfyUI compute through MPS, with these limits."""
    refusals = unable(target, facts, mps)
    count = len(facts.gpus)
    if wrong := [each for each in re.findall(r"(\d+)=", limited.get(MEMORY, "")) if int(each) >= count]:
        refusals.append(Refusal(f"there is no GPU {wrong[0]}, there are {count}", f"inv gpu --host {target.name}"))
    if all(each.now == each.wanted for each in state.seen["mps"]):
        return tuning.finished(facts, [], refusals)
    told = ", ".join(f"{name}={value}" for name, value in limited.items()) or "no limits"
    step = tuning.setting_step(
        "mps",
        changes(target, mps.control, limited),
        f"have {target.host.service} compute through MPS ({told})",
        "asked for" if not mps.on else f"it is {mps.state or 'off'}, or its limits are others",
        "inv mps off",
        options if facts.service.active else None,
    )
    notes = [
        f"MPS is not verified on {gpu.name}: inv mps status --host {target.name} says what it does"
        for gpu in facts.gpus
        if gpu.unified
    ]
    return tuning.finished(facts, [step], refusals, notes)


def limit(target: Target, facts: Facts, mps: Mps, state: State, limited: Mapping[str, str], options: Options) -> Plan:
    """The plan that limits what a process may take through MPS; raises nothing, refuses where it is off."""
    if not mps.on:
        refusal = Refusal("MPS is off", f"inv mps on --host {target.name}, with the same limits")
        return tuning.finished(facts, [], [refusal])
    return turn_on(target, facts, mps, state, limited, options)


def turn_off(target: Target, facts: Facts, mps: Mps, options: Options, *, force: bool) -> Plan:
    """The plan that takes MPS away again."""
    if not mps.on:
        return tuning.finished(facts, [], [])
    title = f"stop MPS, remove its unit, and have {target.host.service} compute without it"
    step = tuning.undo_step("mps", title, force=force, options=options if facts.service.active else None)
    return tuning.finished(facts, [step], tuning.able(target, facts))


def unable(target: Target, facts: Facts, mps: Mps) -> list[Refusal]:
    """Why MPS cannot be on there."""
    found = tuning.able(target, facts)
    at = f"--host {target.name}"
    if not facts.current:
        found.append(Refusal("nothing is deployed", f"inv deploy {at}"))
    if not facts.gpus:
        found.append(Refusal("the driver shows no NVIDIA GPU", f"inv doctor {at}"))
    elif not target.profile.cuda:
        found.append(Refusal(f"profile {target.host.profile} computes on the CPU", "choose a profile with a GPU"))
    if not mps.control:
        what = "there is no nvidia-cuda-mps-control"
        found.append(Refusal(what, "there: apt-get install nvidia-cuda-mps (Ubuntu: nvidia-compute-utils-VERSION)"))
    return found


def problems(mps: Mps, at: str, *, cuda: bool) -> list[Problem]:
    """What is not well; `cuda` says whether ComfyUI computes on a GPU now."""
    if not mps.on:
        if mps.service_knows:
            return [Problem("ComfyUI looks for an MPS that is off", f"inv restart {at}")]
        return []
    if not mps.state.startswith("active"):
        return [
            Problem(f"MPS is on, and its daemon does not run: {mps.state}", f"inv mps on {at}; or inv mps off {at}")
        ]
    if mps.fault:
        return [Problem(f"MPS is on, and {mps.fault}", f"inv mps off {at}, then inv mps on {at}")]
    found = [
        Problem(f"MPS server {each.pid} is in state {each.state}", f"inv restart {at}")
        for each in mps.servers
        if each.state.upper().startswith("FAULT")
    ]
    clients = {client.pid for each in mps.servers for client in each.clients}
    if mps.service_pid and not mps.service_knows:
        found.append(Problem("ComfyUI was started before MPS, and computes without it", f"inv restart {at}"))
    elif mps.service_pid and cuda and mps.service_pid not in clients:
        found.append(Problem("ComfyUI computes on the GPU, and is no client of its MPS", f"inv restart {at}"))
    if mps.restarts:
        found.append(Problem(f"the MPS daemon was started again {mps.restarts} times, and ComfyUI with it",
                             "on the host: journalctl --unit '*-mps'"))  # fmt: skip
    return found


# --- carried out ---------------------------------------------------------------------------------------------------


def run(
    action: str,
    where: tuple[str, str],
    percent: str,
    memory: str,
    options: Options,
    *,
    dry_run: bool,
    ask_sudo: bool,
    ask: bool,
    as_json: bool,
) -> int:
    """What `inv mps` does; raises UsageError."""
    if action not in ACTIONS:
        raise UsageError(f"inv mps {action} makes no sense", hint=f"one of {', '.join(ACTIONS)}")
    limited = limits(percent, memory)
    if limited and action not in ("on", "limit"):
        raise UsageError("--percent and --memory go with on and limit", hint="inv mps limit --percent 50")
    if not limited and action == "limit":
        raise UsageError("limit to what?", hint="--percent 50, --memory 0=8G, or both; --percent 100 lifts all")
    if action == "status":
        return show(look(where, ask_sudo=ask_sudo), as_json=as_json)
    results = change(action, where, limited, options, dry_run=dry_run, ask_sudo=ask_sudo, ask=ask)
    return lifecycle.show(results, as_json=as_json, dry_run=dry_run)


def change(
    action: str,
    where: tuple[str, str],
    limited: Mapping[str, str],
    options: Options,
    *,
    dry_run: bool,
    ask_sudo: bool,
    ask: bool,
) -> list[Outcome]:
    """Turn MPS on or off, or limit it, on a host or a group."""

    def one(name: str) -> Outcome:
        asked: list[tuple[Mps, State, Mapping[str, str]]] = []

        def ask_first(agent: Agent, target: Target) -> None:
            mps = msgspec.convert(agent.call("mps"), Mps)
            kept = limited if limited or action == "limit" else mps.limits
            wanted = {"changes": {"mps": changes(target, mps.control, kept)}}
            asked[:] = [(mps, msgspec.convert(agent.call("settings", **wanted), tuning.State), kept)]

        def make(target: Target, facts: Facts) -> Plan:
            mps, state, kept = asked[0]
            if action == "off":
                return turn_off(target, facts, mps, options, force=options.force)
            return (limit if action == "limit" else turn_on)(target, facts, mps, state, kept, options)

        found = flow.change(
            name, f"mps {action}", make, dry_run=dry_run, ask_sudo=ask_sudo, ask=ask, converges=True,
            ask_first=ask_first,
        )  # fmt: skip
        return replace(found, state=f"MPS is {'off' if action == 'off' else 'on'}")

    return flow.on_each(hosts.select(*where), one, keep_going=False)


# --- shown ---------------------------------------------------------------------------------------------------------


def look(where: tuple[str, str], *, ask_sudo: bool = False) -> list[fleet.Answer[Mps]]:
    """How MPS is on hosts."""
    return fleet.ask_each(
        hosts.select(*where), lambda agent, _: msgspec.convert(agent.call("mps"), Mps), ask_sudo=ask_sudo, seconds=30
    )


def show(answers: Sequence[fleet.Answer[Mps]], *, as_json: bool) -> int:
    """Print how MPS is on hosts; 1 when it is on somewhere and not well, or a host did not answer."""
    told = [
        (each, problems(each.value, f"--host {each.host}", cuda=False) if each.value is not None else [])
        for each in answers
    ]
    if as_json:
        console.data_json(
            [
                {"host": each.host, "error": each.error.what, "hint": each.error.hint}
                if each.error
                else {"host": each.host, **msgspec.to_builtins(each.value), "problems": msgspec.to_builtins(found)}
                for each, found in told
            ]
        )
    else:
        for line in [line for each, found in told for line in lines(each, found)]:
            console.data(line)
    return int(any(found or each.error for each, found in told))


def lines(answer: fleet.Answer[Mps], found: Sequence[Problem]) -> list[str]:
    """A host's MPS in words."""
    if answer.value is None:
        assert answer.error is not None
        return [f"{answer.host}: {answer.error.what}; next: {answer.error.hint}"]
    mps = answer.value
    trouble = [f"{answer.host}: {each.what}; next: {each.remedy}" for each in found]
    if not mps.on:
        why = "" if mps.control else ", and there is no nvidia-cuda-mps-control"
        return [f"{answer.host}: MPS is off{why}", *trouble]
    told = [f"threads {mps.percent} %"] if mps.percent else []
    told += [f"memory {value}" for name, value in mps.limits.items() if name == MEMORY]
    result = [f"{answer.host}: MPS is on, {mps.state}{''.join(f', {each}' for each in told)}"]
    for server in mps.servers:
        result.append(f"  server {server.pid}: {server.state}")
        for client in server.clients:
            own = " (ComfyUI)" if client.pid == mps.service_pid else ""
            result.append(f"    client {client.pid}: {client.name or '?'}, {client.user or '?'}{own}")
    if not mps.servers and not trouble:
        result.append("  no server: the first process that computes starts one")
    return [*result, *trouble]
