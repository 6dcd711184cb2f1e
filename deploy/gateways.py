"""Gateways: how several people reach ComfyUI over the network (`[gateways]` in `config/hosts.toml`)."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Literal

import msgspec

from agent.schema.gateway import GatewayState
from core.errors import ConfigError, UsageError, suggest
from core.typed import convert
from deploy.host_rules import PLAIN_PATH, duration

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from deploy.connection import Agent
    from deploy.host import Host, Hosts

PERSON = re.compile(r"[a-z][a-z0-9._-]{0,31}")
"""The name of a person: written to HAProxy's configuration, to the audit log and to file names."""

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Person(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One person who uses a gateway. The gateway's host stores the password and the tokens (`inv gateway users`)."""

    role: Literal["user", "administrator"] = "user"
    """An administrator may also free memory, interrupt others' jobs, use ComfyUI-Manager, and read ComfyUI's log."""
    host: str = ""
    """The only host that this person uses; empty: the one with the fewest connections at the first request."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of a gateway."""

    requests: int = 1200
    """Requests of a person in a minute. ComfyUI's page loads with about 200."""
    prompts: int = 30
    """Prompts of a person in a minute."""
    connections: int = 100
    """Requests of a person at the same time. Each open page has one: its websocket."""
    upload: str = "100M"
    """The size of a request. ComfyUI's own limit (--max-upload-size) is 100M."""
    logins: int = 10
    """Failed logins from an address in five minutes; ten times as many for a person's name. Above that, only people
    who are already logged in are served."""


class Gateway(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An HAProxy with TLS, logins and limits in front of hosts."""

    host: str
    """The host that it runs on."""
    behind: tuple[str, ...] = ()
    """The hosts or groups behind it; empty: the host that it runs on."""
    listen: str = "0.0.0.0"  # noqa: S104  a gateway exists to be reached
    """The addresses that it listens on, separated by commas."""
    port: int = 443
    """Its port."""
    names: tuple[str, ...]
    """The names and addresses by which people reach it. Requests for any other `Host` are refused, and the gateway's
    own certificate is valid for these."""
    certificate: str = ""
    """A PEM file on the host with a certificate, its chain and its key; empty: one of the gateway's own CA."""
    users: dict[str, Person] = {}
    """The people who may use it, by name."""
    limits: Limits = Limits()
    """Limits for each person, and for attempts to log in."""
    hold: str = "2m"
    """How long requests wait for a host that does not answer, such as during an update."""


def upload_bytes(limits: Limits) -> int:
    """The maximum size of a request, in bytes."""
    number, unit = limits.upload[:-1], limits.upload[-1]
    return int(number) * _SIZES[unit]


def look(agent: Agent, gateway: Gateway) -> GatewayState:
    """What its host reports of a gateway."""
    asked = {"port": gateway.port, "names": gateway.names, "certificate": gateway.certificate}
    return convert(agent.call("gateway", **asked), GatewayState)


def members(gateway: Gateway, known: Hosts) -> list[str]:
    """The names of the hosts behind a gateway, in order."""
    named = gateway.behind or (gateway.host,)
    return list(dict.fromkeys(host for each in named for host in known.groups.get(each, (each,))))


def endpoint(gateway: Gateway, host: Host, known: Hosts) -> str:
    """The address at which the gateway reaches the ComfyUI of a host behind it; empty if it cannot.

    On its own machine it uses loopback, which nobody on the network can reach.
    """
    own = on_its_machine(gateway, host, known)
    listed = [ipaddress.ip_address(each) for each in host.listen.split(",")]
    return str(next((each for each in listed if each.is_loopback == own and not each.is_unspecified), ""))


def on_its_machine(gateway: Gateway, host: Host, known: Hosts) -> bool:
    """Whether a host is the gateway's own or another entry for the same machine, such as one for each person."""
    own = known.hosts[gateway.host]
    return (host.address, host.ssh_port) == (own.address, own.ssh_port)


TRIAL = 20_000
"""How far the port of a trial is from ComfyUI's, on a gateway's machine."""


def trial_port(port: int) -> int:
    """The port on which a release is tried before it gets ComfyUI's `port`. The firewall must know it in advance."""
    return port + TRIAL if port + TRIAL < 1 << 16 else port - TRIAL


def trial_of(name: str, known: Hosts) -> int:
    """The only port of a host's trials; 0 if it is not on the machine of a gateway in front of it: any port."""
    host = known.hosts[name]
    own = any(on_its_machine(each, host, known) for each in gateways_of(name, known).values())
    return trial_port(host.port) if own else 0


def check_gateways(path: str, known: Hosts) -> None:
    """Check all gateways of a hosts file; raises ConfigError or UsageError."""
    places: dict[str, str] = {}
    for name, gateway in known.gateways.items():
        place = f"{path}: gateway {name}"
        _check_hosts(place, gateway, known)
        _check_trials(place, gateway, known)
        _check_values(place, gateway, known.hosts[gateway.host])
        _check_people(place, gateway, members(gateway, known))
        if other := places.get(gateway.host):
            raise ConfigError(
                "config",
                f"{place}: host {gateway.host} already runs gateway {other}",
                hint="let one gateway serve both: list its hosts in `behind`, and its names in `names`",
            )
        places[gateway.host] = name


def _check_hosts(place: str, gateway: Gateway, known: Hosts) -> None:
    """The gateway's host and those behind it, and whether it reaches them."""
    for each in (gateway.host, *gateway.behind):
        choices = {*known.hosts, *(known.groups if each is not gateway.host else ())}
        if each not in choices:
            raise UsageError("unknown-name", f"{place} names {each!r}", hint=suggest(each, choices))
    if known.hosts[gateway.host].scope != "system":
        raise ConfigError(
            "config",
            f'{place}: host {gateway.host} has scope = "user"',
            cause="the gateway has a user and a unit of its own, which need root",
            hint='run it on a host with scope = "system"; without root, use inv open',
        )
    for each in members(gateway, known):
        listen, own = known.hosts[each].listen, on_its_machine(gateway, known.hosts[each], known)
        if own and known.hosts[each].scope == "user" and not known.hosts[each].user:
            raise ConfigError(
                "config",
                f"{place}: host {each} does not name its login",
                cause='with scope "user" ComfyUI runs as that login, which the gateway\'s firewall must let through',
                hint=f'user = "LOGIN" for host {each}',
            )
        if own and not all(map(_is_loopback, listen.split(","))):
            raise ConfigError(
                "config",
                f"{place}: ComfyUI on {each} listens on {listen}",
                cause="everybody who reaches that address needs no login: ComfyUI has none",
                hint=f'listen = "127.0.0.1" for host {each}',
            )
        if not endpoint(gateway, known.hosts[each], known):
            raise ConfigError(
                "config",
                f"{place} does not reach ComfyUI on {each}",
                cause=f"it runs on {gateway.host}, and ComfyUI on {each} listens on {listen}",
                hint=f"set listen on {each} to the address of a network that only the gateway's host reaches",
            )


def _check_trials(place: str, gateway: Gateway, known: Hosts) -> None:
    """The ports of trials on the gateway's machine."""
    behind = [known.hosts[each] for each in members(gateway, known)]
    own = [host for host in behind if on_its_machine(gateway, host, known)]
    taken = {gateway.port, *(port for host in own for port in (host.port, host.metrics_port))}
    for port in sorted({trial_port(host.port) for host in own} & taken):
        raise ConfigError(
            "config",
            f"{place}: port {port} is used twice on the machine of {gateway.host}",
            cause=f"a deploy tries a release there: ComfyUI's port and {TRIAL}",
            hint="change that `port` or `metrics_port`",
        )


def _check_values(place: str, gateway: Gateway, host: Host) -> None:
    """Addresses, ports, names and limits."""
    for each in gateway.listen.split(","):
        try:
            ipaddress.ip_address(each)
        except ValueError as error:
            what = f"{place}: listen = {gateway.listen!r}: {each!r} is not an IP address"
            raise ConfigError("config", what, hint='use one or more, such as "0.0.0.0" or "192.168.1.5,::1"') from error
    if gateway.port not in range(1, 65536) or gateway.port in (host.port, host.metrics_port):
        what = f"{place}: port must be from 1 to 65535, and not a port of ComfyUI or its metrics"
        raise ConfigError("config", what)
    if not gateway.names:
        raise ConfigError("config", f"{place} has no names", hint='names = ["spark.local", "192.168.1.5"]')
    for each in gateway.names:
        if not (_NAME.fullmatch(each) or _is_address(each)):
            hint = "use a lower-case name or an address, without a scheme and port"
            raise ConfigError("config", f"{place}: names: {each!r} is not the name of a host", hint=hint)
    if gateway.certificate and not PLAIN_PATH.fullmatch(gateway.certificate):
        what = f"{place}: certificate = {gateway.certificate!r} is not a plain absolute path"
        raise ConfigError("config", what, hint="use a path such as /etc/ssl/private/spark.pem")
    limits = gateway.limits
    if not re.fullmatch(r"[1-9][0-9]{0,5}[KMG]", limits.upload):
        raise ConfigError("config", f"{place}: upload = {limits.upload!r}", hint='use a size such as "100M"')
    for key in ("requests", "prompts", "connections", "logins"):
        if not 1 <= getattr(limits, key) <= 1_000_000:
            raise ConfigError("config", f"{place}: {key} = {getattr(limits, key)}", hint="use a number from 1")
    try:
        seconds = duration(gateway.hold)
    except UsageError as error:
        raise ConfigError("config", f"{place}: hold: {error.what}", hint=error.hint) from error
    if not 5 <= seconds <= 3600:
        raise ConfigError("config", f"{place}: hold = {gateway.hold!r}", hint="use a duration from 5s to 1h")


def _check_people(place: str, gateway: Gateway, behind: Collection[str]) -> None:
    """The names of people, and their hosts."""
    for name, person in gateway.users.items():
        if not PERSON.fullmatch(name):
            hint = "use a lower-case letter, then letters, digits and . _ -"
            raise ConfigError("config", f"{place}: users: {name!r} is not a user name", hint=hint)
        if person.host and person.host not in behind:
            what = f"{place}: user {name}: host {person.host!r} is not behind the gateway"
            raise ConfigError("config", what, hint=suggest(person.host, behind))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _is_loopback(text: str) -> bool:
    return ipaddress.ip_address(text).is_loopback


def gateways_of(name: str, known: Hosts) -> Mapping[str, Gateway]:
    """The gateways that a host is behind, by name."""
    return {each: found for each, found in known.gateways.items() if name in members(found, known)}


def run_by(name: str, known: Hosts) -> tuple[str, Gateway] | None:
    """The gateway that runs on a host, with its name."""
    return next(((each, found) for each, found in known.gateways.items() if found.host == name), None)
