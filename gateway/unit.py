"""The systemd unit of a gateway, from `recipes/gateway/haproxy.service`."""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING

from core import workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.gateways import Gateway

USER = "hearth-gateway"
"""The user of a machine's gateway: no other program runs as it, so a port can be opened for it alone."""


def unit(
    name: str,
    gateway: Gateway,
    service: str,
    folder: str,
    secrets: str,
    guarded: Sequence[str] = (),
    programs: str = "/usr/sbin",
) -> str:
    """The unit of a gateway beside ComfyUI's `service`.

    `folder` has the releases of its configuration and the link `current`; `secrets` what belongs to its user alone;
    `guarded` are the services of the ComfyUIs on its machine that only it may reach; `programs` has HAProxy and nft.
    """
    recipes = workspace.current().checkout / "recipes"
    values = {
        "name": name,
        "unit": f"{service}-gateway",
        "port": str(gateway.port),
        "haproxy": f"{programs}/haproxy",
        "nft": f"{programs}/nft",
        "services": " ".join(f"{each}.service" for each in guarded),
        "folder": folder,
        "secrets": secrets,
        "user": USER,
        "hardening": (recipes / "comfyui/units/hardening.conf").read_text().strip(),
    }
    return Template((recipes / "gateway/haproxy.service").read_text()).substitute(values)
