"""Deploying and operating gateways. The plan is a pure function of the hosts file and what the host reports."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from getpass import getuser
from socket import gethostname
from typing import TYPE_CHECKING, Any, TypeVar

from agent.schema import change as schema
from agent.schema.gateway import Certificate, Certified, Person, PersonChanged, Server
from agent.schema.installed import InstalledGateway
from agent.schema.requests import GatewaySecret
from core import console
from core.errors import UsageError, suggest
from core.typed import convert
from deploy import connection, refusals
from deploy import host as hosts
from deploy.change import Change, change_each
from deploy.gateways import PERSON, look, members, on_its_machine, trial_port
from deploy.host_rules import EXPORTER
from deploy.look import find_target
from deploy.plan import Plan
from gateway.haproxy import Places, configuration
from gateway.refusals import no_release, unservable, unserved
from gateway.unit import USER, unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agent.schema.gateway import GatewayState
    from deploy.change import Outcome
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.gateways import Gateway
    from deploy.host import Target
    from deploy.plan import Options


T = TypeVar("T")


def find(name: str) -> tuple[str, Gateway]:
    """A gateway by its name (empty: the only one); raises UsageError."""
    known = hosts.hosts().gateways
    if not known:
        hint = f"add [gateways.NAME] to {hosts.hosts_file()}; config/hosts.example.toml shows how"
        raise UsageError("unknown-name", "there is no gateway", hint=hint)
    if not name and len(known) == 1:
        name = next(iter(known))
    if name not in known:
        what = f"there is no gateway {name!r}" if name else "there are several gateways"
        raise UsageError("unknown-name", what, hint=f"--gateway: {suggest(name, known)}")
    return name, known[name]


def address(gateway: Gateway) -> str:
    """The address that people type."""
    name = f"[{gateway.names[0]}]" if ":" in gateway.names[0] else gateway.names[0]
    return f"https://{name}{f':{gateway.port}' * (gateway.port != 443)}"


def wanted(name: str, gateway: Gateway, prefix: str, service: str) -> InstalledGateway:
    """A gateway as configured."""
    folder, known = f"{prefix}/gateway", hosts.hosts()
    secrets = f"{folder}/secrets"
    places = Places(secrets, f"/run/{service}-gateway", f"{secrets}/certificate.pem", f"{secrets}/hosts.map")
    behind = [known.hosts[each] for each in members(gateway, known)]
    own = [each for each in behind if on_its_machine(gateway, each, known)]
    return InstalledGateway(
        unit=unit(name, gateway, service, folder, places.secrets, [each.service for each in own]),
        configuration=configuration(name, gateway, known, places),
        access={
            str(port): (USER, EXPORTER, each.run_as if each.scope == "system" else each.user)
            for each in own
            for port in (each.port, trial_port(each.port))
        },
    )


def plan(name: str, gateway: Gateway, target: Target, facts: Facts, found: GatewayState) -> Plan:
    """The plan that puts a gateway in service as configured."""
    right = wanted(name, gateway, facts.prefix, target.host.service)
    given, there = found.given, vars(found.installed)
    why = [f"its {key} is another" for key, value in vars(right).items() if there[key] != value]
    if not gateway.certificate and found.certificate.names != tuple(sorted(gateway.names)):
        why.append("its certificate is for other names")
    elif not gateway.certificate and found.certificate.renew:
        why.append("its certificate ends soon")
    elif given and not given.same:
        why.append("its certificate is another")
    why += [f"{each.name} gets no people" for each in found.servers if each.state in ("DRAIN", "MAINT")]
    if not found.guarded:
        why.append("its firewall is not in force")
    if not found.installed.unit:
        why = ["there is none"]
    elif not found.active:
        why.append("it is not running")
    notes = [
        f"{person} has neither a password nor a token: inv gateway users add {person}"
        for person in sorted(gateway.users)
        if person not in found.people
    ]
    listen = ipaddress.ip_address(gateway.listen.partition(",")[0])
    local = ("127.0.0.1" if listen.version == 4 else "::1") if listen.is_unspecified else str(listen)
    step = schema.Gateway(
        f"serve {address(gateway)} by HAProxy",
        ", ".join(why),
        "returns to the previous one automatically if HAProxy does not serve",
        right,
        local,
        gateway.port,
        gateway.names,
        gateway.certificate,
    )
    if given and given.renew:
        notes.append(f"{gateway.certificate} ends soon: {given.until}")
    against = unservable(target, facts, found) + unserved(gateway, found)
    return Plan.of(facts, [step] if why else [], against, notes)


def deploy(name: str, options: Options) -> list[Outcome]:
    """Put a gateway in service; raises RefusedError and the errors of the host."""
    name, gateway = find(name)

    def planner(agent: Agent, target: Target, facts: Facts) -> Plan:
        return plan(name, gateway, target, facts, look(agent, gateway))

    state = f"gateway {name} serves {address(gateway)}"
    return change_each([gateway.host], Change(action=f"gateway {name}", plan=planner, state=state), options)


def rollback(name: str, options: Options) -> list[Outcome]:
    """Put the previous release of a gateway in service again; raises RefusedError and the errors of the host."""
    name, gateway = find(name)
    before: schema.Gateway | None = None

    def planner(agent: Agent, target: Target, facts: Facts) -> Plan:
        found = look(agent, gateway)
        nonlocal before
        before = before or found.previous
        against = unservable(target, facts, found)
        if not before:
            return Plan.of(facts, [], [*against, no_release(name)])
        step = replace(before, title="serve the previous release", why="requested")
        return Plan.of(facts, [] if found.installed == step.gateway else [step], against)

    state = f"gateway {name} serves the previous release; change config/hosts.toml too, or the next deploy replaces it"
    return change_each([gateway.host], Change(action=f"gateway {name} rollback", plan=planner, state=state), options)


def remove(name: str, options: Options) -> list[Outcome]:
    """Remove a gateway with its people and certificate; raises RefusedError and the errors of the host."""
    name, gateway = find(name)

    def planner(agent: Agent, target: Target, facts: Facts) -> Plan:
        why = "its people, their passwords and its certificate, too"
        step = schema.Delete(f"remove gateway {name}", why, "inv gateway deploy", ("gateway",))
        found = look(agent, gateway)
        return Plan.of(facts, [step] if found.kept else [], refusals.unsettable(target, facts))

    state = f"gateway {name} is removed; delete it from config/hosts.toml"
    return change_each([gateway.host], Change(action="remove gateway", plan=planner, state=state), options)


class Member(Person):
    """A person of a gateway, and what that person has to log in with."""

    role: str = ""  # empty: not in hosts.toml


@dataclass(frozen=True)
class Status:
    """A gateway on its host. `state` is "in service", "not running" or "not deployed"."""

    name: str
    host: str
    address: str
    state: str
    hosts: tuple[Server, ...]
    guarded: bool
    certificate: Certificate
    people: dict[str, Member]


def status(name: str, *, ask_sudo: bool) -> Status:
    """What the host reports of a gateway, without its texts."""
    name, gateway = find(name)
    with connection.connect(find_target(gateway.host), ask_sudo) as agent:
        found = look(agent, gateway)
    return Status(
        name=name,
        host=gateway.host,
        address=address(gateway),
        state="in service" if found.active else "not running" if found.installed.unit else "not deployed",
        hosts=found.servers,
        guarded=found.guarded,
        certificate=found.certificate,
        people={
            each: Member(**vars(kept), role=gateway.users[each].role if each in gateway.users else "")
            for each, kept in (dict.fromkeys(gateway.users, Person()) | found.people).items()
        },
    )


def rows(found: Status) -> list[str]:
    """A gateway's status: a line, then tables of hosts and people."""
    until = f"{found.certificate.until or 'none'}{', expired' * found.certificate.expired}"
    if names := found.certificate.uncovered:
        until += f", not for {', '.join(names)}"
    people = [
        (name, each.role or "not in hosts.toml: no access", "yes" if each.password else "no", str(each.tokens))
        for name, each in sorted(found.people.items())
    ]
    lines = [f"{found.name}: {found.state} at {found.address} on {found.host}, certificate until {until}"]
    if found.state == "in service" and not found.guarded:
        lines.append("its firewall is not in force: every login on the host reaches ComfyUI; fix: inv gateway deploy")
    behind = [(each.name, each.state, str(each.requests)) for each in found.hosts]
    return [
        *lines,
        *console.table(("host", "state", "requests"), behind),
        *console.table(("person", "role", "password", "tokens"), people),
    ]


def authority(name: str, *, ask_sudo: bool) -> str:
    """The certificate of a gateway's own authority, which is made if needed."""
    _, gateway = find(name)
    return _ask(gateway, Certified, "certificate", ask_sudo=ask_sudo, names=gateway.names).authority


def change_person(name: str, action: str, person: str, *, ask_sudo: bool, value: str = "") -> PersonChanged:
    """Change how a person logs in, by an `action` of `GatewaySecret`. Raises UsageError."""
    name, gateway = find(name)
    if not PERSON.fullmatch(person):
        hint = "use a lower-case letter, then letters, digits and . _ -"
        raise UsageError("usage", f"{person!r} is not a user name", hint=hint)
    found = _ask(gateway, PersonChanged, action, ask_sudo=ask_sudo, person=person, value=value)
    if action != "remove" and person not in gateway.users:
        console.say(f"{person} has no access yet: add [gateways.{name}.users.{person}], then inv gateway deploy")
    return found


def _ask(gateway: Gateway, kind: type[T], action: str, *, ask_sudo: bool, **values: Any) -> T:
    """Let a gateway's host change its people or certificate; return the answer."""
    asked = GatewaySecret(action, f"{getuser()}@{gethostname()}", **values)
    with connection.connect(find_target(gateway.host), ask_sudo) as agent:
        return convert(agent.call("gateway-secrets", **vars(asked)), kind)


def audit(name: str, lines: str, since: str, *, ask_sudo: bool) -> list[dict[str, Any]]:
    """The last lines of a gateway's audit log; raises UsageError."""
    _, gateway = find(name)
    if not lines.isdecimal() or not 1 <= int(lines) <= 100_000:
        raise UsageError("usage", f"--lines {lines} is not a number of lines", hint="give a number from 1 to 100000")
    with connection.connect(find_target(gateway.host), ask_sudo) as agent:
        return list(agent.call("gateway-audit", lines=int(lines), since=since))


def audit_rows(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the audit log."""
    keys = ("at", "user", "from", "method", "path", "status", "job", "host")
    return console.table(keys, [[str(each.get(key, "")) for key in keys] for each in found])
