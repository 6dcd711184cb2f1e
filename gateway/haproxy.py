"""HAProxy's configuration for a gateway, from `recipes/gateway/haproxy.cfg`: a pure function of the hosts file.

It contains no secrets: passwords are hashed in `users.cfg`, tokens in `tokens.map`, and the key is in the certificate's
file, all in the `secrets` folder.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from string import Template
from typing import TYPE_CHECKING

from core import workspace
from deploy.gateways import endpoint, members, upload_bytes
from deploy.host_rules import duration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploy.gateways import Gateway
    from deploy.host import Host, Hosts

CHECK_SECONDS = 5
"""Seconds between health checks."""


@dataclass(frozen=True)
class Places:
    """Where HAProxy finds its files: a folder with secrets, one for sockets, the certificate, and each person's host.

    Only a gateway that is reloaded has the last one: its new process starts with empty tables.
    """

    secrets: str
    run: str
    certificate: str
    assigned: str = ""


def configuration(name: str, gateway: Gateway, known: Hosts, places: Places) -> str:
    """The configuration of a gateway."""
    behind = {each: known.hosts[each] for each in members(gateway, known)}
    limits = gateway.limits
    pinned: dict[str, list[str]] = {}
    for each, person in sorted(gateway.users.items()):
        if person.host:
            pinned.setdefault(person.host, []).append(each)
    administrators = [each for each, person in sorted(gateway.users.items()) if person.role == "administrator"]
    values = {
        "name": name,
        "run": places.run,
        "secrets": places.secrets,
        "binds": "\n".join(
            f"    bind {_joined(each, gateway.port)} ssl crt {places.certificate} alpn http/1.1"
            for each in gateway.listen.split(",")
        ),
        "names": " ".join(_names(gateway)),
        "upload": str(upload_bytes(limits)),
        "logins": str(limits.logins),
        "logins_by_name": str(10 * limits.logins),
        "people": _listed(sorted(gateway.users)),
        "administrators": _listed(administrators),
        "requests": str(limits.requests),
        "prompts": str(limits.prompts),
        "connections": str(limits.connections),
        "hold": str(duration(gateway.hold)),
        "routes": "\n".join(
            f"    use_backend only_{host} if {{ var(txn.user) -m str {_listed(people)} }}"
            for host, people in sorted(pinned.items())
        ),
        "backends": "\n\n".join(
            [
                _backend("comfyui", gateway, behind, known, places.assigned),
                *(_backend(f"only_{host}", gateway, {host: behind[host]}, known) for host in sorted(pinned)),
            ]
        ),
    }
    template = (workspace.current().checkout / "recipes/gateway/haproxy.cfg").read_text()
    return Template(template).substitute(values)


def _backend(title: str, gateway: Gateway, hosts: Mapping[str, Host], known: Hosts, assigned: str = "") -> str:
    """One group of hosts. Each person stays on one of them: queue, history and websocket are a host's own."""
    unlisted = f"!{{ var(txn.user),in_table({title}) }}"
    sticky = [
        "    balance leastconn",
        "    stick-table type string len 32 size 10k expire 8h peers tables",
        "    stick on var(txn.user)",
        # A new process answers before the old one has handed over its table. Without this, people would move then.
        *([f"    use-server %[var(txn.user),map_str({assigned},-)] if {unlisted}"] if assigned else []),
        "    option redispatch",  # the last attempt goes to another host
    ]
    fall = -(-duration(gateway.hold) // CHECK_SECONDS)
    return "\n".join(
        [
            f"backend {title}",
            *(sticky if len(hosts) > 1 else []),
            "    option httpchk",
            "    http-check send meth GET uri /system_stats hdr Host localhost",
            "    http-check expect rstatus ^200",
            # A host is down only after the time for which requests wait; its people are then moved. Transfers of a host
            # that is marked down go on.
            f"    default-server check inter {CHECK_SECONDS}s fastinter 2s downinter 2s fall {fall} rise 1",
            *(
                f"    server {each} {_joined(endpoint(gateway, host, known), host.port)}"
                for each, host in sorted(hosts.items())
            ),
        ]
    )


def _names(gateway: Gateway) -> list[str]:
    """The allowed names, as browsers write them into `Host`: IPv6 addresses in brackets, in the short form."""
    return sorted(f"[{ipaddress.ip_address(each)}]" if ":" in each else each for each in gateway.names)


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ipaddress.ip_address(address).version == 6 else f"{address}:{port}"


def _listed(people: list[str]) -> str:
    """Names as patterns; a name that nobody can have if there are none."""
    return " ".join(people) or "*"
