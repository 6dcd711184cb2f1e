"""Containers on a host: their root file system, and Quadlet's unit."""

from __future__ import annotations

import gzip
import hashlib
import ipaddress
import json
import shutil
from typing import TYPE_CHECKING

from core import files, workspace
from deploy import units
from deploy.image_layout import Layout
from deploy.image_parts import debian
from lock import image_base

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from core.stack import Platform
    from deploy.host import Target
    from deploy.selection import Selection


def _groups(*, cuda: bool) -> tuple[str, ...]:
    return ("base", "compiler") if cuda else ("base",)


def base_part(platform: Platform, *, cuda: bool) -> str:
    """The name of the part with the root file system."""
    keys = [debian(platform, group)[0] for group in _groups(cuda=cuda)]
    return f"base-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]}"


def archives(platform: Platform, scratch: Path, *, cuda: bool) -> Iterator[Path]:
    """The root file system's archives, in the order of unpacking; the packages are downloaded if necessary.

    Raises LockError or SourceError.
    """
    for layer, _ in layers(platform, cuda=cuda):
        packed = scratch / f"{layer.name}.tar.gz"
        with (
            layer.open("rb") as source,
            packed.open("wb") as raw,
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as output,
        ):
            shutil.copyfileobj(source, output)
        yield packed


INSIDE = "/run/hearth"
"""Where a container has its secrets, and the agent that passes them to ComfyUI."""


def confinement(selection: Selection, made: Sequence[str]) -> list[str]:
    """The command prefix that passes secrets to ComfyUI and makes folders, in the container; empty without both."""
    if not (selection.secrets or made):
        return []
    spec = {"secrets": list(selection.secrets), "folder": f"{INSIDE}/secrets", "make": list(made)}
    return [selection.interpreter, "-I", "-S", f"{INSIDE}/agent", "confine", json.dumps(spec), "--"]


def layers(platform: Platform, *, cuda: bool) -> list[tuple[Path, Path]]:
    """The layers of the root file system in the cache, each with its record; written if necessary.

    Raises LockError or SourceError.
    """
    cache = workspace.current().cache / "layers"
    layout = Layout(cache / "base", cache)
    with files.locked(cache / "lock", lambda: None):
        found = [debian(platform, group) for group in _groups(cuda=cuda)]
        return [(layout.path(layout.layer(key, entries)), layout.record(key)) for key, entries in found]


def unit(
    selection: Selection,
    command: Sequence[str],
    environment: Mapping[str, str],
    prefix: str,
    release: str,
    developed: Mapping[str, str],
    *,
    tls: bool,
) -> str:
    """The `.container` file of a release (podman-systemd.unit(5)); `tls` is whether ComfyUI speaks it."""
    target = selection.target
    host, profile = target.host, target.profile
    system = host.scope == "system"
    storage = f"{host.service}-storage.service"
    values = {
        "service": host.service,
        "release": release,
        "version": selection.application.version,
        "edit": "systemctl edit" if system else "systemctl --user edit",
        "after": f"After=network.target\nRequiresMountsFor={prefix}/data" if system else "",
        "storage": f"BindsTo={storage}\nAfter={storage}" if host.mounts else "",
        "root": f"{prefix}/parts/{selection.base_part}",
        "command": units.command_line(command),
        "environment": units.variables(environment),
        # Podman finds the user's ids in the host's own files, which are mounted.
        "user": f"User={host.run_as}\nPodmanArgs=--umask 0077" if system else "UserNS=keep-id",
        "volumes": "\n".join(f"Volume={each}" for each in _volumes(selection, command, prefix, release, developed)),
        "devices": "AddDevice=nvidia.com/gpu=all" if profile.cuda else "",
        "health": _health(target, tls=tls),
        "restart": profile.restart,
        "limits": units.limits(profile),
        "network": units.network(profile) if system else "",
        "prepare": "\n".join(_prepare(selection, prefix)),
    }
    return units.filled("podman.container", values)


def _prepare(selection: Selection, prefix: str) -> list[str]:
    """The unit lines that prepare what the container sees of the unit's folder in /run, which ends with the unit.

    Secrets: systemd decrypts them for root, and ComfyUI's user gets a copy. Nodes under development: Podman does not
    start without a mounted folder, and a missing node must not keep ComfyUI from starting.
    """
    host, lines = selection.target.host, units.credentials(selection, prefix)
    scripts = [[_SECRETS, "sh", host.run_as]] if lines else []
    scripts += [[_NODE, "sh", *each] for each in host.developed.items()]
    lines += [f"ExecStartPre={units.command_line(['/bin/sh', '-euc', *each])}" for each in scripts]
    return ["RuntimeDirectory=%N", "RuntimeDirectoryMode=0711", *lines] if lines else []


_SECRETS = """\
install -d -m 0711 "$RUNTIME_DIRECTORY/secrets"; install -m 0400 -o "$1" -t "$RUNTIME_DIRECTORY/secrets" \
"$CREDENTIALS_DIRECTORY"/*"""
_NODE = """\
mkdir -p "$RUNTIME_DIRECTORY/nodes"; if test -d "$2"; then ln -sT "$2" "$RUNTIME_DIRECTORY/nodes/$1"; \
else mkdir "$RUNTIME_DIRECTORY/nodes/$1"; fi"""


def _volumes(
    selection: Selection, command: Sequence[str], prefix: str, release: str, developed: Mapping[str, str]
) -> list[str]:
    """What the container sees of the host, at the same paths. SELinux: only written folders get a container's label."""
    target = selection.target
    host = target.host
    read = [f"{prefix}/parts", f"{prefix}/releases/{release}", *host.model_roots]
    read += [value for value in target.flags.values() if value.startswith("/")]  # e.g. a certificate
    read += ["/etc/passwd", "/etc/group"] if host.scope == "system" else []
    found = [f"{path}:{path}:ro" for path in read]
    found += [f"%t/%N/nodes/{name}:{at}:ro" for name, at in developed.items()]
    if selection.secrets and host.scope == "system":
        found.append(f"%t/%N/secrets:{INSIDE}/secrets:ro,z")
    elif selection.secrets:
        found += [f"{prefix}/secrets/{name}:{INSIDE}/secrets/{name}:ro,z" for name in selection.secrets]
    if f"{INSIDE}/agent" in command:
        found.append(f"{prefix}/releases/{release}/agent:{INSIDE}/agent:ro")
    return found + [f"{path}:{path}:rw,z" for path in (f"{prefix}/data", *host.folders.values())]


def _health(target: Target, *, tls: bool) -> str:
    """The command that fails unless ComfyUI answers, as JSON."""
    listed = target.host.listen.split(",")
    at = next((each for each in listed if ipaddress.ip_address(each).is_loopback), listed[0])
    if (address := ipaddress.ip_address(at)).is_unspecified:
        at = "127.0.0.1" if address.version == 4 else "::1"
    scheme = "https" if tls else "http"
    url = f"{scheme}://{f'[{at}]' if ':' in at else at}:{target.host.port}/system_stats"
    context = ",context=__import__('ssl')._create_unverified_context()" if tls else ""
    code = f"import urllib.request as r;r.urlopen('{url}',timeout=8{context}).read()"
    return json.dumps([f"/usr/bin/python{image_base.base().python}", "-I", "-S", "-c", code])
