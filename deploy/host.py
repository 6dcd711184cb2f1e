"""Hosts and profiles: where ComfyUI runs, and how (`config/hosts.toml`, `config/profiles/`)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from core.config import load
from core.errors import ConfigError, SecretError, UnknownNameError, near
from core.files import CHECKOUT, checkout
from core.stack import Stack, find_stack

LOCAL = "local"


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A flag's or variable's value with the reason for it.

    `torch` limits it to versions of torch (PEP 440); `off` takes away what a profile sets.
    """

    why: str
    value: str = ""
    torch: str = ""
    off: bool = False


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Flags, environment and limits for a kind of machine.

    `arch` is the compute capability that `kernels` are built for; `cuda` makes the health gate ask for a CUDA
    device; `start_seconds` is how long the gate waits for an answer. `nodes` are sets and names of `nodes.toml`.
    """

    summary: str
    stack: str
    pythons: tuple[str, ...]
    start_seconds: int
    arch: str = ""
    cuda: bool = False
    kernels: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    flags: dict[str, Setting] = {}
    env: dict[str, Setting] = {}
    device_policy: Literal["closed", "auto"] = "closed"
    memory_max: str = ""


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one host has otherwise than its profile."""

    stack: str | None = None
    pythons: tuple[str, ...] | None = None
    start_seconds: int | None = None
    arch: str | None = None
    cuda: bool | None = None
    kernels: tuple[str, ...] | None = None
    nodes: tuple[str, ...] | None = None
    flags: dict[str, Setting] = {}
    env: dict[str, Setting] = {}
    device_policy: Literal["closed", "auto"] | None = None
    memory_max: str | None = None


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file system that a host needs at a place. Without `what`, others mount it (fstab), and Hearth waits for it.

    `what` is a device or an NFS export (`nas:/models`), `type` and `options` are mount's.
    """

    what: str = ""
    type: str = ""
    options: str = ""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One machine. `scope` "system" needs root and systemd; "user" neither.

    `mounts` (by mount point) must be mounted for ComfyUI to run. `folders` says what of models, input, output and
    user lies elsewhere than in `data/`; `model_roots` are folders with more models, laid out as `models` is.
    `members` may write the data and read the log, and do what `members_may` says; `listen` and `port` are ComfyUI's.
    At `metrics_port` of its loopback the host tells Prometheus how it is.
    """

    address: str = ""
    user: str = ""
    ssh_port: int | None = None
    profile: str = ""
    scope: Literal["system", "user"] = "system"
    prefix: str = ""
    service: str = "comfyui"
    run_as: str = "comfyui"
    listen: str = "127.0.0.1"
    port: int = 8188
    metrics_port: int | None = None
    mounts: dict[str, Mount] = {}
    folders: dict[Literal["models", "input", "output", "user"], str] = {}
    model_roots: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    members_may: tuple[Literal["restart"], ...] = ()
    keep: int = 3
    override: Override = Override()


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`config/hosts.toml`: hosts by name, and groups of them."""

    hosts: dict[str, Host] = {}
    groups: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Target:
    """A host with its profile, merged. `origin` says of each value where it comes from."""

    name: str
    host: Host
    profile_name: str
    profile: Profile
    origin: dict[str, str]

    @property
    def stack(self) -> Stack:
        """The stack that runs there."""
        return find_stack(self.profile.stack)

    @property
    def prefix(self) -> str:
        """Where everything lies on the host; `~` is its login's home."""
        return self.host.prefix or ("/opt/comfyui" if self.host.scope == "system" else "~/.local/share/hearth/comfyui")

    @property
    def flags(self) -> dict[str, str]:
        """ComfyUI's flags with their values, in a fixed order."""
        return _chosen(self.profile.flags, self.stack.torch)

    @property
    def env(self) -> dict[str, str]:
        """The environment that the profile sets, as far as it is for this torch."""
        return _chosen(self.profile.env, self.stack.torch)

    @property
    def site(self) -> dict[str, Any]:
        """What the agent must know of the place."""
        return {
            "prefix": self.prefix,
            "service": self.host.service,
            "scope": self.host.scope,
            "user": self.host.run_as if self.host.scope == "system" else "",
            "address": self.host.listen,
            "port": self.host.port,
            "mounts": {path: mount_unit(path) for path in self.host.mounts},
            "folders": dict(self.host.folders),
        }

    @property
    def exporter_unit(self) -> str:
        """The unit that exports metrics."""
        return f"{self.host.service}-exporter.service"

    @property
    def rights(self) -> str:
        """The sudoers file that lets members read the log, and do what they may; empty without members.

        Whole command lines, without wildcards and without a pager: nobody gets more by them.
        """
        if self.host.scope != "system" or not self.host.members:
            return ""
        unit = f"{self.host.service}.service"
        words = [f"journalctl --no-pager --unit {unit}{more}" for more in ("", " --lines 1000", " --follow")]
        words += [f"systemctl {verb} {unit}" for verb in self.host.members_may]
        listed = ", \\\n    ".join(f"/usr/bin/{each}" for each in words)
        return f"# Written by Hearth; a deploy replaces it.\n%{self.host.run_as} ALL=(root) NOPASSWD: {listed}\n"

    def mount_text(self, path: str) -> str:
        """The systemd unit that mounts one of the host's file systems."""
        mount = self.host.mounts[path]
        lines = [f"What={mount.what}", f"Where={path}", f"Type={mount.type}"]
        lines += [f"Options={mount.options}"] if mount.options else []
        body = "\n".join(lines).replace("%", "%%")
        return (
            "# Written by Hearth; a deploy replaces it.\n"
            f"[Unit]\nDescription={path}, for ComfyUI\n\n[Mount]\n{body}\n\n[Install]\nWantedBy=multi-user.target\n"
        )


def mount_unit(path: str) -> str:
    """The name of systemd's unit for a mount point (systemd.unit(5), "String Escaping")."""
    plain = re.sub(r"[^\w/:.]|^\.", lambda found: f"\\x{ord(found[0]):02x}", path.strip("/"), flags=re.ASCII)
    return f"{plain.replace('/', '-') or '-'}.mount"


def _chosen(settings: dict[str, Setting], torch: str) -> dict[str, str]:
    return {
        name: each.value
        for name, each in sorted(settings.items())
        if not each.off and torch in SpecifierSet(each.torch)
    }


def hosts_file() -> Path:
    """Where hosts are listed: $HEARTH_HOSTS, else `config/hosts.toml`."""
    return Path(os.environ.get("HEARTH_HOSTS") or CHECKOUT / "config/hosts.toml")


def hosts() -> Hosts:
    """All hosts and groups; `local` is always among them. Raises ConfigError, SecretError or UnknownNameError."""
    path = hosts_file()
    if path.exists():
        _refuse_secrets(path)
        listed = load(path, Hosts)
    else:
        listed = Hosts()
    for group, names in listed.groups.items():
        for name in names:
            if name not in listed.hosts:
                raise UnknownNameError(f"{path}: group {group} names {name!r}", hint=near(name, listed.hosts))
    for name, host in listed.hosts.items():
        if not host.address and name != LOCAL:
            raise ConfigError(f"{path}: host {name} has no address", hint='address = "name-or-ip"')
        _check(path, name, host)
        if not host.profile and name != LOCAL:  # this machine's GPU says nothing about that one's
            raise ConfigError(f"{path}: host {name} has no profile", hint=f"profile = one of {', '.join(profiles())}")
    local = listed.hosts.get(LOCAL) or Host(scope="user")
    return msgspec.structs.replace(listed, hosts={**listed.hosts, LOCAL: local})


def _check(path: Path, name: str, host: Host) -> None:
    prefix = host.prefix
    if host.scope == "system" and prefix and (not prefix.startswith("/") or re.match(r"/(home|root)\b", prefix)):
        raise ConfigError(
            f"{path}: host {name}: prefix {prefix} cannot be a system service's",
            cause="it must be absolute, and the unit hides home folders from the service",
            hint='use /opt/comfyui, or scope = "user"',
        )
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", host.service) or not re.fullmatch(r"[a-z_][a-z0-9_-]*", host.run_as):
        raise ConfigError(f"{path}: host {name}: service and run_as are plain lower-case names")
    if not 0 < host.port < 65536 or host.keep < 1:
        raise ConfigError(f"{path}: host {name}: port is 1 to 65535, keep at least 1")
    if host.metrics_port is not None and (not 0 < host.metrics_port < 65536 or host.metrics_port == host.port):
        raise ConfigError(f"{path}: host {name}: metrics_port is 1 to 65535, and another than ComfyUI's {host.port}")
    for each in (*host.mounts, *host.folders.values(), *host.model_roots):
        if not re.fullmatch(r"(/[\w.@:+-]+)+", each, flags=re.ASCII) or {".", ".."} & set(each.split("/")):
            raise ConfigError(
                f"{path}: host {name}: {each!r} is no plain absolute path",
                hint="such as /mnt/models: letters, digits and . _ @ : + - between slashes, none at the end",
            )
        if host.scope == "system" and re.match(r"/(home|root)\b", each):
            raise ConfigError(
                f"{path}: host {name}: {each} lies in a home folder, which the unit hides from the service",
                hint='another place (a bind mount will do), or scope = "user"',
            )
    for each, mount in host.mounts.items():
        if mount.what and (not mount.type or host.scope != "system"):
            raise ConfigError(
                f"{path}: host {name}: mount {each} cannot be made",
                cause="`what` needs a `type`, and root",
                hint='type = "nfs4"; without root leave `what` out, and let fstab mount it',
            )
        if "\n" in mount.what + mount.type + mount.options:
            raise ConfigError(f"{path}: host {name}: mount {each}: what, type and options are one line each")


_SECRET = re.compile(r"passw|secret|token|api_?key|credential|become_pass", re.IGNORECASE)


def _refuse_secrets(path: Path) -> None:
    """Refuse keys that name a secret, wherever they are; raises SecretError."""
    import tomllib

    def walk(value: object, place: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if _SECRET.search(key):
                    raise SecretError(
                        f"{path}: {place}{key} looks like a secret",
                        cause="this file is copied, backed up and shown; secrets do not belong in it",
                        hint="for sudo use --ask-sudo; give ComfyUI its own with: systemctl edit comfyui",
                    )
                walk(inner, f"{place}{key}.")

    try:
        walk(tomllib.loads(path.read_text()), "")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return  # load() says it better


def profiles() -> dict[str, Profile]:
    """The profiles of `config/profiles/`, by name."""
    found: dict[str, Profile] = {}
    for path in sorted((checkout() / "config/profiles").glob("*.toml")):
        _refuse_secrets(path)
        found[path.stem] = profile = load(path, Profile)
        for name, setting in (profile.flags | profile.env).items():
            try:
                SpecifierSet(setting.torch)
            except InvalidSpecifier as error:
                raise ConfigError(f"{path}: {name}: torch = {setting.torch!r} is no version range") from error
    return found


def select(host: str, group: str) -> list[str]:
    """The names of the hosts meant by --host or --group; raises UnknownNameError."""
    known = hosts()
    if group:
        if group not in known.groups:
            raise UnknownNameError(
                f"there is no group {group!r}", hint=near(group, known.groups) if known.groups else ""
            )
        return list(known.groups[group])
    name = host or LOCAL
    if name not in known.hosts:
        raise UnknownNameError(
            f"there is no host {name!r} in {hosts_file()}",
            hint=near(name, known.hosts) + "; config/hosts.example.toml shows how to add one",
        )
    return [name]


def target(name: str, fallback: str = "cpu") -> Target:
    """The host merged with its profile; `fallback` is the profile of a host that names none (`local`)."""
    host = hosts().hosts[name]
    known = profiles()
    chosen = host.profile or fallback
    if chosen not in known:
        raise UnknownNameError(f"host {name}: there is no profile {chosen!r}", hint=near(chosen, known))
    profile = known[chosen]
    origin: dict[str, str] = {}
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(Profile):
        base, over = getattr(profile, field.name), getattr(host.override, field.name, None)
        if isinstance(base, dict):
            values[field.name] = {**base, **(over or {})}
            for key in values[field.name]:
                origin[f"{field.name}.{key}"] = f"host {name}" if key in (over or {}) else f"profile {chosen}"
        else:
            values[field.name] = base if over is None else over
            origin[field.name] = f"profile {chosen}" if over is None else f"host {name}"
    return Target(name, host, chosen, Profile(**values), origin)
