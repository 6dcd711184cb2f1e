"""Hosts, profiles and modes: where ComfyUI runs, and how (`config/hosts.toml`, `profiles/`, `modes/`)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from packaging.specifiers import SpecifierSet

from core import workspace
from core.config import convert, load, table
from core.errors import ConfigError, UsageError, suggest
from core.files import CHECKOUT
from core.stack import Stack, find_stack
from deploy.host_rules import EXPORTER, SYSTEM_PREFIX, check_host, check_settings
from deploy.secrets import refuse_secrets
from lock import application as applications

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOCAL = "local"


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of a flag or environment variable, and the reason for it."""

    why: str
    """The reason."""
    value: str = ""
    """The value; empty for a flag without one."""
    torch: str = ""
    """The torch versions that it applies to, such as `>=2.8` (PEP 440); empty: all."""
    comfyui: str = ""
    """The ComfyUI versions that it applies to; empty: all."""
    off: bool = False
    """Remove what the profile or a mode sets."""

    def active(self, torch: str, comfyui: str) -> bool:
        """Whether it is for these versions, and not off."""
        return not self.off and torch in SpecifierSet(self.torch) and comfyui in SpecifierSet(self.comfyui)

    @property
    def versions(self) -> str:
        """What it is for, in words; empty when it is for all."""
        said = (("torch", self.torch), ("ComfyUI", self.comfyui))
        return ", ".join(f"{name} {wanted}" for name, wanted in said if wanted)


Network = Literal["open", "lan-deny", "offline"]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Flags, environment and limits for a kind of machine."""

    summary: str
    """One line for `inv profiles`."""
    stack: str
    """A stack of `config/stacks.toml`."""
    pythons: tuple[str, ...]
    """Python versions, in order of preference."""
    start_seconds: int
    """How long the health gate waits for ComfyUI to start."""
    arch: str = ""
    """The compute capability that the kernels are built for."""
    cuda: bool = False
    """The health gate requires a CUDA device."""
    unified: bool = False
    """CPU and GPU share their memory."""
    kernels: tuple[str, ...] = ()
    """Kernel wheels to install, by the names of their recipes."""
    nodes: tuple[str, ...] = ()
    """Sets and names of custom nodes in `recipes/comfyui/nodes.toml`."""
    flags: dict[str, Setting] = {}
    """ComfyUI's flags."""
    env: dict[str, Setting] = {}
    """ComfyUI's environment variables."""
    device_policy: Literal["closed", "auto"] = "closed"
    """The unit's `DevicePolicy=`."""
    memory_max: str = "90%"
    """The unit's `MemoryMax=`."""
    network: Network = "open"
    """Whom ComfyUI can reach: everyone except link-local and metadata addresses ("open"), no private network either
    ("lan-deny"), or only its own machine ("offline")."""
    restart: Literal["on-failure", "always"] = "on-failure"
    """The unit's `Restart=`."""


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Values that differ from the profile. Keys that are left out keep the profile's value."""

    stack: str | None = None
    pythons: tuple[str, ...] | None = None
    start_seconds: int | None = None
    arch: str | None = None
    cuda: bool | None = None
    unified: bool | None = None
    kernels: tuple[str, ...] | None = None
    nodes: tuple[str, ...] | None = None
    flags: dict[str, Setting] = {}
    env: dict[str, Setting] = {}
    device_policy: Literal["closed", "auto"] | None = None
    memory_max: str | None = None
    network: Network | None = None
    restart: Literal["on-failure", "always"] | None = None


class Mode(Override, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a machine is used for. A mode changes values of the profile; later modes take precedence."""

    summary: str
    """One line for `inv profiles`."""
    excludes: tuple[str, ...] = ()
    """Modes that cannot be combined with this one."""
    develop: bool = False
    """A host with this mode may list nodes under `develop`."""
    on_unified: Override | None = None
    """Values to use instead where CPU and GPU share their memory."""
    why: dict[str, str] = {}
    """The reason for each value that is neither a flag nor a variable."""

    def on(self, *, unified: bool) -> Override:
        """What it says for such a machine."""
        return self.on_unified if self.on_unified and unified else self


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file system that must be mounted at this path. Without `what`, Hearth waits until others (fstab) mount it."""

    what: str = ""
    """A device or an NFS export (`nas:/models`), for Hearth to mount."""
    type: str = ""
    """The type of file system, as for mount(8)."""
    options: str = ""
    """Options, as for mount(8)."""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One machine."""

    address: str = ""
    """Name or address, as ssh takes it."""
    user: str = ""
    """The login; empty: ssh's own configuration decides."""
    ssh_port: int | None = None
    """The port of sshd; left out: ssh's own configuration decides."""
    profile: str = ""
    """A profile of `config/profiles/`."""
    scope: Literal["system", "user"] = "system"
    """Scope "system" needs root and systemd, "user" needs neither."""
    prefix: str = ""
    """Where everything is installed; empty: `/opt/comfyui`, or `~/.local/share/hearth/comfyui` with scope "user"."""
    service: str = "comfyui"
    """The name of the unit."""
    run_as: str = "comfyui"
    """The service's user, with scope "system"."""
    listen: str = "127.0.0.1"
    """The addresses that ComfyUI listens on, separated by commas."""
    port: int = 8188
    """ComfyUI's port."""
    metrics_port: int | None = None
    """The port on the loopback address that serves metrics; left out: no metrics."""
    mounts: dict[str, Mount] = {}
    """File systems without which ComfyUI does not run, by mount point."""
    folders: dict[Literal["models", "input", "output", "user"], str] = {}
    """Folders that are not in `data/`."""
    model_roots: tuple[str, ...] = ()
    """Additional folders with models, with the layout of `models`."""
    members: tuple[str, ...] = ()
    """Logins on the host that may write the data and read the log."""
    members_may: tuple[Literal["restart"], ...] = ()
    """What else members may do."""
    modes: tuple[str, ...] = ()
    """Modes of `config/modes/`; later ones take precedence."""
    develop: tuple[str, ...] = ()
    """Folders on the host, each a custom node under development."""
    free_memory: str = ""
    """How often ComfyUI frees its memory while it has no job, such as `4h`; empty: never."""
    public: bool = False
    """Every login on the host may read the data."""
    secrets: tuple[str, ...] = ()
    """Names of variables that only ComfyUI gets; `inv secret set` stores their values on the host."""
    confined: bool = True
    """With scope "user", limit ComfyUI with Landlock and seccomp."""
    connect: tuple[int, ...] = (80, 443)
    """TCP ports that a confined ComfyUI may connect to; the kernel can filter only by port."""
    keep: int = 3
    """How many releases are kept."""
    override: Override = Override()
    """Values that differ from the profile and modes."""

    @property
    def developed(self) -> dict[str, str]:
        """The folders of nodes under development, by the node's name."""
        return {path.rpartition("/")[2]: path for path in self.develop}

    @property
    def free_seconds(self) -> int:
        """How often ComfyUI gives its memory back, in seconds; 0 for never."""
        return int(self.free_memory[:-1]) * _SECONDS[self.free_memory[-1]] if self.free_memory else 0


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`config/hosts.toml`: hosts by name, and groups of them."""

    hosts: dict[str, Host] = {}
    groups: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Target:
    """A host with its profile and modes, merged. `origin` says of each value where it comes from.

    `comfyui` is the version that is to run.
    """

    name: str
    host: Host
    profile_name: str
    profile: Profile
    origin: dict[str, str]
    comfyui: str = field(default_factory=applications.version)

    @property
    def stack(self) -> Stack:
        """The stack that runs there."""
        return find_stack(self.profile.stack)

    @property
    def prefix(self) -> str:
        """Where everything lies on the host; `~` is its login's home."""
        return self.host.prefix or (SYSTEM_PREFIX if self.host.scope == "system" else "~/.local/share/hearth/comfyui")

    @property
    def flags(self) -> dict[str, str]:
        """ComfyUI's flags with their values, in a fixed order."""
        return self._active(self.profile.flags)

    @property
    def env(self) -> dict[str, str]:
        """The environment that is set, as far as it is for these versions."""
        return self._active(self.profile.env)

    def _active(self, settings: dict[str, Setting]) -> dict[str, str]:
        torch = self.stack.torch
        return {name: each.value for name, each in sorted(settings.items()) if each.active(torch, self.comfyui)}

    @property
    def site(self) -> dict[str, Any]:
        """What the agent must know of the place."""
        return {
            "prefix": self.prefix,
            "service": self.host.service,
            "scope": self.host.scope,
            "user": self.host.run_as if self.host.scope == "system" else "",
            "exporter": EXPORTER if self.host.scope == "system" and self.host.metrics_port else "",
            "address": self.host.listen,
            "port": self.host.port,
            "mounts": {path: mount_unit(path) for path in self.host.mounts},
            "folders": dict(self.host.folders),
            "public": self.host.public,
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
        return (
            f"# Written by Hearth; a deploy replaces it.\n%{self.host.run_as}-members ALL=(root) NOPASSWD: {listed}\n"
        )

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


def hosts_file() -> Path:
    """Where hosts are listed: $HEARTH_HOSTS, else `config/hosts.toml`."""
    return Path(os.environ.get("HEARTH_HOSTS") or CHECKOUT / "config/hosts.toml")


def hosts() -> Hosts:
    """All hosts and groups; `local` is always among them. Raises ConfigError or UsageError."""
    path = hosts_file()
    if path.exists():
        refuse_secrets(path)
        raw = table(path)
        # As without an entry: the login's own ComfyUI, which needs no root.
        if isinstance(entries := raw.get("hosts"), dict) and isinstance(entry := entries.get(LOCAL), dict):
            raw = {**raw, "hosts": {**entries, LOCAL: {"scope": "user", **entry}}}
        listed = convert(path, raw, Hosts)
    else:
        listed = Hosts()
    for each in (*listed.hosts, *listed.groups):  # printed within commands to copy
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", each):
            raise ConfigError(
                "config", f"{path}: {each!r} is no name for a host or group", hint="letters, digits and . _ -"
            )
    for group, names in listed.groups.items():
        for name in names:
            if name not in listed.hosts:
                raise UsageError(
                    "unknown-name", f"{path}: group {group} names {name!r}", hint=suggest(name, listed.hosts)
                )
    for name, host in listed.hosts.items():
        if not host.address and name != LOCAL:
            raise ConfigError("config", f"{path}: host {name} has no address", hint='address = "name-or-ip"')
        check_host(f"{path}: host {name}", host)
        if not host.profile and name != LOCAL:  # this machine's GPU says nothing about that one's
            raise ConfigError(
                "config", f"{path}: host {name} has no profile", hint=f"profile = one of {', '.join(profiles())}"
            )
    local = listed.hosts.get(LOCAL) or Host(scope="user")
    return msgspec.structs.replace(listed, hosts={**listed.hosts, LOCAL: local})


def profiles() -> dict[str, Profile]:
    """The profiles of `config/profiles/`, by name."""
    found: dict[str, Profile] = {}
    for path in sorted((workspace.current().checkout / "config/profiles").glob("*.toml")):
        refuse_secrets(path)
        found[path.stem] = load(path, Profile)
        check_settings(str(path), found[path.stem])
    return found


def modes() -> dict[str, Mode]:
    """The modes of `config/modes/`, by name."""
    found: dict[str, Mode] = {}
    for path in sorted((workspace.current().checkout / "config/modes").glob("*.toml")):
        refuse_secrets(path)
        found[path.stem] = mode = load(path, Mode)
        check_settings(str(path), mode)
        check_settings(f"{path}: on_unified", mode.on(unified=True))
        unexplained = plain(mode).keys() - mode.why.keys()
        if unexplained:
            raise ConfigError(
                "config", f"{path}: no reason for {', '.join(sorted(unexplained))}", hint="say it below [why]"
            )
    return found


def plain(said: Override) -> dict[str, Any]:
    """What is said beside flags and variables."""
    names = [field.name for field in msgspec.structs.fields(Override) if field.name not in ("flags", "env")]
    return {name: value for name in names if (value := getattr(said, name)) is not None}


def select(host: str, group: str) -> list[str]:
    """The names of the hosts meant by --host or --group; raises UsageError."""
    known = hosts()
    if group:
        if group not in known.groups:
            none = f"there are none: [groups] in {hosts_file()}, as config/hosts.example.toml has it"
            hint = suggest(group, known.groups) if known.groups else none
            raise UsageError("unknown-name", f"there is no group {group!r}", hint=hint)
        return list(known.groups[group])
    name = host or LOCAL
    if name not in known.hosts:
        raise UsageError(
            "unknown-name",
            f"there is no host {name!r} in {hosts_file()}",
            hint=suggest(name, known.hosts) + "; config/hosts.example.toml shows how to add one",
        )
    return [name]


def target(name: str, fallback: str = "cpu") -> Target:
    """The host merged with its profile and modes; `fallback` is the profile of a host that names none (`local`).

    Raises UsageError, or ConfigError for modes that exclude each other.
    """
    host = hosts().hosts[name]
    known = profiles()
    chosen = host.profile or fallback
    if chosen not in known:
        raise UsageError("unknown-name", f"host {name}: there is no profile {chosen!r}", hint=suggest(chosen, known))
    base = known[chosen]
    unified = base.unified if host.override.unified is None else host.override.unified
    layers = [(f"mode {each}", mode.on(unified=unified)) for each, mode in _modes_of(name, host).items()]
    layers.append((f"host {name}", host.override))
    profile, origin = merged(f"profile {chosen}", base, layers)
    return Target(name, host, chosen, profile, origin)


def merged(base_origin: str, base: Profile, layers: Sequence[tuple[str, Override]]) -> tuple[Profile, dict[str, str]]:
    """A profile with what is put over it, each layer over those before; and where each value comes from."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in ((each.name, getattr(base, each.name)) for each in msgspec.structs.fields(Profile)):
        values[name] = dict(value) if isinstance(value, dict) else value
        origin |= {f"{name}.{key}": base_origin for key in value} if isinstance(value, dict) else {name: base_origin}
    for layer, said in layers:
        for kind in ("flags", "env"):
            settings: dict[str, Setting] = getattr(said, kind)
            values[kind] |= settings
            origin |= {f"{kind}.{key}": layer for key in settings}
        given = {name: getattr(said, name) for name in values if name not in ("flags", "env", "summary")}
        for name, value in given.items():
            if value is not None:
                values[name], origin[name] = value, layer
    return Profile(**values), origin


def _modes_of(name: str, host: Host) -> dict[str, Mode]:
    """A host's modes, in its order; raises UsageError, or ConfigError where they cannot be had together."""
    known = modes()
    for each in host.modes:
        if each not in known:
            raise UsageError("unknown-name", f"host {name}: there is no mode {each!r}", hint=suggest(each, known))
    found = {each: known[each] for each in host.modes}
    for one, mode in found.items():
        if other := next((each for each in mode.excludes if each in found), ""):
            raise ConfigError(
                "config", f"host {name}: modes {one} and {other} exclude each other", hint="keep one of them"
            )
    if host.develop and not any(mode.develop for mode in found.values()):
        unfit = f", and {', '.join(found)} is not for that" if found else ""
        raise ConfigError(
            "config",
            f"host {name}: `develop` names nodes under development{unfit}",
            cause="ComfyUI starts anew whenever they change, in the middle of a job",
            hint='modes = ["development"], or leave `develop` out',
        )
    return found


def summary(found: Target) -> dict[str, Any]:
    """A host merged with its profile, for JSON."""
    return {
        "name": found.name,
        "address": found.host.address,
        "profile": found.profile_name,
        "modes": found.host.modes,
        "site": found.site,
        "flags": found.flags,
        "env": found.env,
        "origin": found.origin,
        "values": msgspec.to_builtins(found.profile),
    }


def rows(found: Target) -> Iterator[str]:
    """A host, and below it every setting with the file or table that it comes from."""
    where = found.host.address or "this machine"
    yield f"{found.name}: {where}, {found.prefix}, {found.host.listen}:{found.host.port}, {found.host.scope}"
    for key, origin in found.origin.items():
        kind, _, name = key.partition(".")
        value = getattr(found.profile, kind)
        setting = value[name] if name else value
        if isinstance(setting, Setting):
            text = f"{name}{f' {setting.value}' if setting.value else ''}{' (off)' if setting.off else ''}"
            yield f"  {text:44} {origin}: {setting.why}"
        elif setting not in ("", (), {}):
            text = ", ".join(setting) if isinstance(setting, tuple) else str(setting)
            yield f"  {kind + ' = ' + text:44} {origin}"
