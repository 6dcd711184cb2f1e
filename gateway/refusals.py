"""Refusals for gateways: what their host lacks, and what keeps browsers from the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy import refusals
from deploy.refusals import Refusal

if TYPE_CHECKING:
    from agent.schema.gateway import GatewayState
    from deploy.facts import Facts
    from deploy.gateways import Gateway
    from deploy.host import Target


def unserved(gateway: Gateway, found: GatewayState) -> list[Refusal]:
    """Reasons for which browsers would not get the page."""
    against, given = [], found.given
    if holder := found.holder:
        what = f"port {gateway.port} is in use by {holder['command']} (pid {holder['pid']})"
        remedy = (
            f"stop that program, such as by systemctl disable --now {holder['unit'] or 'UNIT'}, or set another `port`"
        )
        against.append(Refusal("port-taken", what, remedy))
    if given and not given.until:
        what = f"{gateway.certificate} on the host is no certificate"
        against.append(
            Refusal("certificate", what, "put the certificate, its chain and its key into that file, as PEM")
        )
    elif given and given.expired:
        what = f"{gateway.certificate} expired: {given.until}"
        against.append(Refusal("certificate", what, "renew it"))
    elif given and given.uncovered:
        what = f"{gateway.certificate} is not for {', '.join(given.uncovered)}"
        against.append(Refusal("certificate", what, "get one for all `names`, or remove those names"))
    return against


def unservable(target: Target, facts: Facts, found: GatewayState) -> list[Refusal]:
    """Reasons why the host cannot run a gateway."""
    against = refusals.unsettable(target, facts)
    for path in found.missing:
        package = {"haproxy": "haproxy", "nft": "nftables"}[path.rpartition("/")[2]]
        remedy = f"on the host: apt-get install {package}{'; systemctl disable haproxy' * (package == 'haproxy')}"
        against.append(Refusal("no-program", f"{path} is not installed on the host", remedy))
    return against


def no_release(name: str) -> Refusal:
    """There is no previous release to return to."""
    what = f"gateway {name} has no previous release"
    return Refusal("no-release", what, "change config/hosts.toml, then inv gateway deploy")
