"""An installation on a host, as every request of the client describes it."""

from __future__ import annotations

from dataclasses import field

from agent.schema.record import Record


class Site(Record):
    """Paths, service, user and address of an installation. Recorded in `state/site.json` when a plan is accepted."""

    prefix: str  # its folder; `~` is the login's home
    service: str  # the name of its unit, without .service
    scope: str  # "system" (root, systemd) or "user"
    user: str  # the service's user; empty: the login
    address: str  # where ComfyUI listens, separated by commas
    port: int
    exporter: str = ""  # the exporter's user; empty: none
    trial: int = 0  # the port of trials, if a gateway's firewall guards it; 0: any
    mounts: dict[str, str] = field(default_factory=dict)  # mount points and their systemd units
    folders: dict[str, str] = field(default_factory=dict)  # paths of folders outside the data, by name
    public: bool = False  # all local users may read the data
