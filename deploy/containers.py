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
    cache = workspace.current().cache / "layers"
    layout = Layout(cache / "base", cache)
    with files.locked(cache / "lock", lambda: None):
        for group in _groups(cuda=cuda):
            layer = layout.layer(*debian(platform, group))
            packed = scratch / f"{group}.tar.gz"
            with (
                layout.path(layer).open("rb") as source,
                packed.open("wb") as raw,
                gzip.GzipFile("", "wb", 6, raw, mtime=0) as output,
            ):
                shutil.copyfileobj(source, output)
            yield packed


def unit(
    selection: Selection,
    command: Sequence[str],
    environment: Mapping[str, str],
    prefix: str,
    release: str,
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
        "volumes": "\n".join(f"Volume={each}" for each in _volumes(target, prefix, release)),
        "devices": "AddDevice=nvidia.com/gpu=all" if profile.cuda else "",
        "health": _health(target, tls=tls),
        "restart": profile.restart,
        "limits": units.limits(profile),
        "network": units.network(profile) if system else "",
    }
    return units.filled("podman.container", values)


def _volumes(target: Target, prefix: str, release: str) -> list[str]:
    """What the container sees of the host, at the same paths. SELinux: only written folders get a container's label."""
    host = target.host
    read = [f"{prefix}/parts", f"{prefix}/releases/{release}", *host.model_roots]
    read += [value for value in target.flags.values() if value.startswith("/")]  # e.g. a certificate
    read += ["/etc/passwd", "/etc/group"] if host.scope == "system" else []
    found = [f"{path}:{path}:ro" for path in read]
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
