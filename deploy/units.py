"""Units: the text of a release's systemd units, from the templates in `recipes/comfyui/units`."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from string import Template
from typing import TYPE_CHECKING, Any

from core import workspace
from deploy.host import mount_unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploy.host import Target
    from deploy.profile import Profile
    from deploy.selection import Selection


def credentials(selection: Selection, prefix: str) -> list[str]:
    """The unit lines that pass secrets to the service (systemd.exec(5), Credentials), by storage type on the host."""
    if selection.target.host.scope == "user":
        return []
    kinds = {"encrypted": ("LoadCredentialEncrypted", ".cred"), "plain": ("LoadCredential", "")}
    lines = ((name, *kinds[how]) for name, how in selection.secrets.items())
    return [f"{key}={name}:{prefix}/secrets/{name}{end}" for name, key, end in lines]


def developed(target: Target, place: str) -> dict[str, str]:
    """The paths of nodes under development as the service sees them: a system unit mounts each into the release."""
    mounted = target.host.scope == "system"
    return {name: f"{place}/custom_nodes/{name}" if mounted else path for name, path in target.host.developed.items()}


def binds(target: Target, developed: Mapping[str, str]) -> list[str]:
    """The unit lines that mount nodes under development. A missing one must not keep ComfyUI from starting."""
    folders = target.host.developed
    return [f"BindReadOnlyPaths=-{folders[name]}:{at}" for name, at in developed.items() if at != folders[name]]


def confinement(selection: Selection, prefix: str, place: str) -> list[str]:
    """The command prefix that passes secrets to the command, and confines it unless a system unit does.

    It runs `agent/serve/confine.py`. Empty without secrets and confinement. For system services, systemd decrypts the
    secrets.
    """
    host = selection.target.host
    offline = selection.target.profile.network == "offline"
    options: dict[str, Any] = {"secrets": list(selection.secrets)}
    if host.scope == "user" and host.confined:
        named = [value for value in selection.target.flags.values() if value.startswith("/")]  # e.g. a certificate
        more = [*host.model_roots, *host.develop, *named]
        options |= {
            "folder": f"{prefix}/secrets",
            # The folders in data, not data itself: otherwise the service could replace one by a link that is opened at
            # the next start.
            "write": [f"{prefix}/data/*", *host.folders.values()],
            # models may be a user's link to a larger disk
            "read": [f"{prefix}/parts", place, f"{prefix}/data/models", *more],
            "bind": [host.port],
            "connect": [] if offline else [53, *host.connect, host.port],
            "udp": not offline,
        }
    elif not selection.secrets:
        return []
    elif host.scope == "user":
        options["folder"] = f"{prefix}/secrets"
    return [selection.agent_python, "-I", "-S", f"{place}/agent", "confine", json.dumps(options), "--"]


# Never reachable for a service: link-local neighbours, and the metadata addresses of clouds, which return credentials
# (AWS, Azure, Google and most others use 169.254.169.254; these are the others). systemd's link-local covers only
# fe80::/64 of IPv6.
_METADATA = "link-local fe80::/10 multicast 100.100.100.200 168.63.129.16 192.0.0.192 fd00:ec2::254 fd20:ce::254"

# Addresses that are not on the public Internet: IANA's registries of special-purpose addresses (RFC 6890; 2025-10),
# without loopback and the global ones. IPv4 in IPv6 (mapped, NAT64, 6to4, Teredo) would bypass the rest.
_LAN = (
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 "
    "198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 "
    "::/128 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001:db8::/32 2002::/16 "
    "3fff::/20 5f00::/16 fc00::/7 fec0::/10"
)

_NETWORK = {
    "open": f"IPAddressDeny={_METADATA}",
    "lan-deny": f"IPAddressDeny={_METADATA} {_LAN}",
    # Not "localhost", which is all of 127.0.0.0/8: systemd-resolved at 127.0.0.53 would forward queries.
    "offline": "IPAddressDeny=any\nIPAddressAllow=127.0.0.1 ::1",
}
"""The networks that a system service can reach, by the profile's `network` (systemd.resource-control(5))."""

# Name resolution: files, and sockets of resolvers.
_NAMES = """\
BindReadOnlyPaths=-/run/systemd/resolve -/run/resolvconf -/run/NetworkManager/resolv.conf -/run/nscd
BindReadOnlyPaths=-/run/netconfig -/run/connman/resolv.conf"""


def service(
    selection: Selection,
    command: Sequence[str],
    environment: Mapping[str, str],
    data: str,
    release: str,
    more: Sequence[str],
) -> str:
    """The systemd unit, from the template of the host's scope; `more` are additional lines."""
    target = selection.target
    host, profile = target.host, target.profile
    storage = f"{host.service}-storage.service"
    values = {
        "service": host.service,
        "release": release,
        "version": selection.application.version,
        "user": host.run_as,
        "python": selection.python,
        "data": data,
        "folders": " ".join(host.folders.values()),
        "storage": f"BindsTo={storage}\nAfter={storage}" if host.mounts else "",
        "network": network(profile),
        "names": "" if profile.network == "offline" else _NAMES,
        "command": command_line(command),
        "environment": variables(environment),
        "restart": profile.restart,
        "limits": limits(profile),
        **devices(profile),
        "more": "\n".join(more),
    }
    return filled(host.scope, values)


def variables(environment: Mapping[str, str]) -> str:
    """The unit lines that set environment variables."""
    return "\n".join(f'Environment="{name}={_quoted(value)}"' for name, value in environment.items())


def limits(profile: Profile) -> str:
    """The unit lines of the configured limits."""
    values = {"MemoryMax": profile.memory_max, "CPUQuota": profile.cpu_max}
    return "\n".join(f"{key}={value}" for key, value in values.items() if value)


def network(profile: Profile) -> str:
    """The unit lines that limit the network."""
    return _NETWORK[profile.network]


def companions(selection: Selection, prefix: str, release: str, developed: Mapping[str, str]) -> dict[str, str]:
    """The service's further units, by name suffix: mounts, nodes under development, timer."""
    target = selection.target
    host = target.host

    def command(verb: str) -> str:
        # Use the release's own agent: another client's submit replaces the one in state/. Do not use the environment's
        # Python: its packages would run as root.
        agent = f"{prefix}/releases/{release}/agent"
        return command_line([selection.agent_python, "-I", "-S", agent, verb, f"{prefix}/state/site.json"])

    values = {
        "service": host.service,
        "release": release,
        "binds": "\n".join(binds(target, developed)),
        "target": boot_target(host.scope),
        "interval": host.free_memory,
        "addresses": addresses(host.listen),
    }
    found: dict[str, str] = {}
    if host.mounts:  # ComfyUI's unit binds to it; active while all are mounted
        waits = {
            "mounts": " ".join(host.mounts),
            "mounted": " && ".join(f"mountpoint --quiet {path}" for path in host.mounts),
            "units": " ".join(map(mount_unit, host.mounts)),
            "outside": "+" if host.scope == "system" else "",
        }
        found["storage.service"] = filled("storage", {**values, **waits})
    if developed:
        found["reload.service"] = filled("reload", {**values, "command": command("watch")})
    if host.free_memory:
        found["free-memory.service"] = filled("free-memory", {**values, "command": command("free")})
        found["free-memory.timer"] = filled("free-memory.timer", values)
    if host.scope == "user":
        found = {name: without_system(text) for name, text in found.items()}
    return found


def without_system(unit: str) -> str:
    """A unit without the settings that only the system's systemd can apply."""
    return re.sub(r"\n# --- Only the system's.*?(?=\n\[|\Z)", "", unit, flags=re.S)


def devices(profile: Profile) -> dict[str, str]:
    """The unit settings for device access."""
    listed = [f"DeviceAllow={name} rw" for name in _DEVICES] if profile.cuda else []
    return {"device_policy": profile.device_policy, "devices": "\n".join(listed)}


def boot_target(scope: str) -> str:
    """The target that starts units at boot, or at login for user units."""
    return "multi-user.target" if scope == "system" else "default.target"


def addresses(listen: str) -> str:
    """The loopback and ComfyUI's listen addresses, in unit syntax."""
    found = ["localhost"]
    for each in listen.split(","):
        try:
            address = ipaddress.ip_address(each)
        except ValueError:
            continue
        if not address.is_loopback and not address.is_unspecified:
            found.append(each)
    return " ".join(found)


def command_line(argv: Sequence[str]) -> str:
    """Quote a command for a unit: systemd expands % everywhere and $ in commands."""
    return shlex.join(argv).replace("%", "%%").replace("$", "$$")


def filled(template: str, values: Mapping[str, str]) -> str:
    """Fill a template of `recipes/comfyui/units` with these values."""
    name = template if "." in template else f"{template}.service"
    folder = workspace.current().checkout / "recipes/comfyui/units"
    hardening = (folder / "hardening.conf").read_text().strip()
    return Template((folder / name).read_text()).substitute(values, hardening=hardening)


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


# The same devices are named nvidia from driver 550.40 on, and nvidia-frontend before.
_DEVICES = ("char-nvidia", "char-nvidia-frontend", "char-nvidia-uvm", "char-nvidia-modeset", "char-nvidia-caps")
