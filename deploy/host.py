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
from core.errors import ConfigError, UnknownNameError, near
from core.files import CHECKOUT
from core.stack import Stack, find_stack
from deploy.host_rules import EXPORTER, SYSTEM_PREFIX, check_host, check_settings
from deploy.secrets import refuse_secrets
from lock import application as applications

if TYPE_CHECKING:
    from collections.abc import Sequence

LOCAL = "local"


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A flag's or variable's value with the reason for it.

    `torch` and `comfyui` limit it to versions of those (PEP 440); `off` takes away what a profile or mode sets.
    """

    why: str
    value: str = ""
    torch: str = ""
    comfyui: str = ""
    off: bool = False

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
    """Flags, environment and limits for a kind of machine.

    `arch` is the compute capability that `kernels` are built for; `cuda` makes the health gate ask for a CUDA
    device; `unified` says that CPU and GPU share their memory; `start_seconds` is how long the gate waits for it.
    `nodes` are sets and names of `nodes.toml`; `restart` is when systemd starts ComfyUI again, as its Restart= says it.
    `network` says whom ComfyUI may reach: anybody but link-local and metadata addresses, no private network either
    ("lan-deny"), or nobody but its own machine ("offline").
    """

    summary: str
    stack: str
    pythons: tuple[str, ...]
    start_seconds: int
    arch: str = ""
    cuda: bool = False
    unified: bool = False
    kernels: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    flags: dict[str, Setting] = {}
    env: dict[str, Setting] = {}
    device_policy: Literal["closed", "auto"] = "closed"
    memory_max: str = "90%"
    network: Network = "open"
    restart: Literal["on-failure", "always"] = "on-failure"


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a mode or one host has otherwise than the profile."""

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
    """What a machine is used for, whatever machine it is. Put over the profile, in the order that the host names them.

    `excludes` are modes that a host cannot have as well; `develop` lets it name nodes under development.
    `on_unified` is what is said instead where CPU and GPU share their memory; `why` has the reason for each value that
    is neither flag nor variable.
    """

    summary: str
    excludes: tuple[str, ...] = ()
    develop: bool = False
    on_unified: Override | None = None
    why: dict[str, str] = {}

    def on(self, *, unified: bool) -> Override:
        """What it says for such a machine."""
        return self.on_unified if self.on_unified and unified else self


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file system that a host needs at a place. Without `what`, others mount it (fstab), and Hearth waits for it.

    `what` is a device or an NFS export (`nas:/models`), `type` and `options` are mount's.
    """

    what: str = ""
    type: str = ""
    options: str = ""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One machine. `scope` "system" needs root and systemd; "user" neither, and is the default of the host `local`.

    `mounts` (by mount point) must be mounted for ComfyUI to run. `folders` says what of models, input, output and
    user lies elsewhere than in `data/`; `model_roots` are folders with more models, laid out as `models` is.
    Everybody on the machine may read the data if it is `public`. `secrets` are names of variables that ComfyUI gets,
    and nobody else: `inv secret set` keeps their values on the host.
    `members` may write the data and read the log, and do what `members_may` says; `listen` and `port` are ComfyUI's.
    At `metrics_port` of its loopback the host tells Prometheus how it is.
    In scope "user" ComfyUI is `confined` by Landlock and seccomp, and may `connect` to these ports: the kernel limits
    ports alone there.
    `modes` are of `config/modes`; `develop` are folders there, each a custom node under development; `free_memory` is
    how often ComfyUI gives its memory back when it has no job (`4h`).
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
    modes: tuple[str, ...] = ()
    develop: tuple[str, ...] = ()
    free_memory: str = ""
    public: bool = False
    secrets: tuple[str, ...] = ()
    confined: bool = True
    connect: tuple[int, ...] = (80, 443)
    keep: int = 3
    override: Override = Override()

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
    """All hosts and groups; `local` is always among them. Raises ConfigError, SecretError or UnknownNameError."""
    path = hosts_file()
    if path.exists():
        refuse_secrets(path)
        raw = table(path)
        # As without an entry: the login's own ComfyUI, which needs no root.
        if isinstance(entries := raw.get("hosts"), dict) and isinstance(entry := entries.get(LOCAL), dict):
            entry.setdefault("scope", "user")
        listed = convert(path, raw, Hosts)
    else:
        listed = Hosts()
    for each in (*listed.hosts, *listed.groups):  # printed within commands to copy
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", each):
            raise ConfigError(f"{path}: {each!r} is no name for a host or group", hint="letters, digits and . _ -")
    for group, names in listed.groups.items():
        for name in names:
            if name not in listed.hosts:
                raise UnknownNameError(f"{path}: group {group} names {name!r}", hint=near(name, listed.hosts))
    for name, host in listed.hosts.items():
        if not host.address and name != LOCAL:
            raise ConfigError(f"{path}: host {name} has no address", hint='address = "name-or-ip"')
        check_host(f"{path}: host {name}", host)
        if not host.profile and name != LOCAL:  # this machine's GPU says nothing about that one's
            raise ConfigError(f"{path}: host {name} has no profile", hint=f"profile = one of {', '.join(profiles())}")
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
            raise ConfigError(f"{path}: no reason for {', '.join(sorted(unexplained))}", hint="say it below [why]")
    return found


def plain(said: Override) -> dict[str, Any]:
    """What is said beside flags and variables."""
    names = [field.name for field in msgspec.structs.fields(Override) if field.name not in ("flags", "env")]
    return {name: value for name in names if (value := getattr(said, name)) is not None}


def select(host: str, group: str) -> list[str]:
    """The names of the hosts meant by --host or --group; raises UnknownNameError."""
    known = hosts()
    if group:
        if group not in known.groups:
            none = f"there are none: [groups] in {hosts_file()}, as config/hosts.example.toml has it"
            hint = near(group, known.groups) if known.groups else none
            raise UnknownNameError(f"there is no group {group!r}", hint=hint)
        return list(known.groups[group])
    name = host or LOCAL
    if name not in known.hosts:
        raise UnknownNameError(
            f"there is no host {name!r} in {hosts_file()}",
            hint=near(name, known.hosts) + "; config/hosts.example.toml shows how to add one",
        )
    return [name]


def target(name: str, fallback: str = "cpu") -> Target:
    """The host merged with its profile and modes; `fallback` is the profile of a host that names none (`local`).

    Raises UnknownNameError, or ConfigError for modes that exclude each other.
    """
    host = hosts().hosts[name]
    known = profiles()
    chosen = host.profile or fallback
    if chosen not in known:
        raise UnknownNameError(f"host {name}: there is no profile {chosen!r}", hint=near(chosen, known))
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
    """A host's modes, in its order; raises UnknownNameError, or ConfigError where they cannot be had together."""
    known = modes()
    for each in host.modes:
        if each not in known:
            raise UnknownNameError(f"host {name}: there is no mode {each!r}", hint=near(each, known))
    found = {each: known[each] for each in host.modes}
    for one, mode in found.items():
        if other := next((each for each in mode.excludes if each in found), ""):
            raise ConfigError(f"host {name}: modes {one} and {other} exclude each other", hint="keep one of them")
    if host.develop and not any(mode.develop for mode in found.values()):
        unfit = f", and {', '.join(found)} is not for that" if found else ""
        raise ConfigError(
            f"host {name}: `develop` names nodes under development{unfit}",
            cause="ComfyUI starts anew whenever they change, in the middle of a job",
            hint='modes = ["development"], or leave `develop` out',
        )
    return found
