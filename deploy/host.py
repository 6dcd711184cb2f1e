"""Hosts: where ComfyUI runs (`config/hosts.toml`), merged with their profiles and modes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from agent.schema.site import Site
from core.config import convert, table
from core.errors import ConfigError, UsageError, suggest
from core.files import CHECKOUT
from core.stack import Stack, find_stack
from deploy.gateways import Gateway, check_gateways, gateways_of, trial_of
from deploy.host_rules import EXPORTER, SYSTEM_PREFIX, check_host, duration
from deploy.profile import Mode, Override, Profile, Prove, Setting, merged, modes, profiles
from deploy.secrets import refuse_secrets
from lock import application as applications

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCAL = "local"

NO_METADATA = "--disable-metadata"
"""The flag of `metadata = "none"`."""


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file system that must be mounted at this path. Without `what`, Hearth waits until others (fstab) mount it."""

    what: str = ""
    """A device or an NFS export (`nas:/models`), for Hearth to mount."""
    type: str = ""
    """The type of file system, as for mount(8)."""
    options: str = ""
    """Options, as for mount(8)."""


_DOCKER = {"docker": "Docker runs an image: inv image --host HOST, then its run.sh or compose.yaml"}
"""Hints for other values of `runtime`."""


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
    comfyui: str = "pinned"
    """The ComfyUI that runs there: "pinned" (`recipes/comfyui/app.toml`), the channel "stable" or "latest", or a known
    version such as "0.30.0"."""
    scope: Literal["system", "user"] = "system"
    """Scope "system" needs root and systemd, "user" needs neither."""
    runtime: Annotated[Literal["native", "podman"], msgspec.Meta(extra=_DOCKER)] = "native"
    """What runs ComfyUI: systemd itself ("native"), or a container of Podman, rootless with scope "user"."""
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
    prove: tuple[Prove, ...] = ()
    """Workflows that a release must run, besides those of the profile."""
    override: Override = Override()
    """Values that differ from the profile and modes."""

    @property
    def developed(self) -> dict[str, str]:
        """The folders of nodes under development, by the node's name."""
        return {path.rpartition("/")[2]: path for path in self.develop}

    @property
    def free_seconds(self) -> int:
        """How often an idle ComfyUI frees its memory, in seconds; 0: never."""
        return duration(self.free_memory) if self.free_memory else 0


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`config/hosts.toml`: hosts by name, groups of them, and gateways in front of them."""

    hosts: dict[str, Host] = {}
    groups: dict[str, tuple[str, ...]] = {}
    gateways: dict[str, Gateway] = {}


@dataclass(frozen=True)
class Target:
    """A host merged with its profile and modes. `origin` names the file or table of each value.

    `gateways` are the names of the gateways in front of it. `trial` is the only port of its trials; 0: any.
    """

    name: str
    host: Host
    profile_name: str
    profile: Profile
    origin: dict[str, str]
    gateways: tuple[str, ...] = ()
    trial: int = 0

    @cached_property
    def comfyui(self) -> str:
        """The version of ComfyUI to deploy; raises ConfigError for an unknown one."""
        return applications.version(self.host.comfyui)

    @property
    def stack(self) -> Stack:
        """The stack that runs there."""
        return find_stack(self.profile.stack)

    @property
    def prefix(self) -> str:
        """The folder of the installation on the host; `~` is the login's home."""
        return self.host.prefix or (SYSTEM_PREFIX if self.host.scope == "system" else "~/.local/share/hearth/comfyui")

    @property
    def flags(self) -> dict[str, str]:
        """ComfyUI's flags with their values, in a fixed order."""
        return self.flags_for(self.comfyui)

    def flags_for(self, comfyui: str) -> dict[str, str]:
        """The flags of a version of ComfyUI."""
        own = {NO_METADATA: ""} if self.profile.metadata == "none" else {}
        return dict(sorted((self._active(self.profile.flags, comfyui) | own).items()))

    def flag_origin(self, name: str) -> str:
        """The file or table that a flag comes from; empty if it is not set."""
        by_setting = name == NO_METADATA and self.profile.metadata == "none"
        return self.origin.get("metadata" if by_setting else f"flags.{name}", "")

    @property
    def env(self) -> dict[str, str]:
        """ComfyUI's environment variables for these versions."""
        return self._active(self.profile.env, self.comfyui)

    def _active(self, settings: dict[str, Setting], comfyui: str) -> dict[str, str]:
        torch = self.stack.torch
        return {name: each.value for name, each in sorted(settings.items()) if each.active(torch, comfyui)}

    @property
    def site(self) -> Site:
        """The installation, as the agent needs it."""
        return Site(
            prefix=self.prefix,
            service=self.host.service,
            scope=self.host.scope,
            user=self.host.run_as if self.host.scope == "system" else "",
            exporter=EXPORTER if self.host.scope == "system" and self.host.metrics_port else "",
            address=self.host.listen,
            port=self.host.port,
            trial=self.trial,
            mounts={path: mount_unit(path) for path in self.host.mounts},
            folders=dict[str, str](self.host.folders.items()),
            public=self.host.public,
        )

    @property
    def exporter_unit(self) -> str:
        """The unit that exports metrics."""
        return f"{self.host.service}-exporter.service"

    @property
    def rights(self) -> str:
        """The sudoers file that lets members read the log and run what `members_may` lists; empty without members.

        Complete command lines, without wildcards and without a pager, grant nothing else.
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
    """The file that lists hosts: $HEARTH_HOSTS, else `config/hosts.toml`."""
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
    for each in (*listed.hosts, *listed.groups, *listed.gateways):  # printed within commands to copy
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", each):
            raise ConfigError(
                "config",
                f"{path}: {each!r} is not a name for a host, group or gateway",
                hint="use letters, digits and . _ -",
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
    known = msgspec.structs.replace(listed, hosts={**listed.hosts, LOCAL: local})
    check_gateways(str(path), known)
    return known


def select(host: str, group: str) -> list[str]:
    """The names of the hosts meant by --host or --group; raises UsageError."""
    known = hosts()
    if group:
        if group not in known.groups:
            none = f"add [groups] to {hosts_file()}; config/hosts.example.toml shows how"
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
    listed = hosts()
    found = of(name, listed.hosts[name], fallback)
    return replace(found, gateways=tuple(gateways_of(name, listed)), trial=trial_of(name, listed))


def of(name: str, host: Host, fallback: str = "cpu") -> Target:
    """A host that need not be in hosts.toml, as `target` returns it."""
    known = profiles()
    chosen = host.profile or fallback
    if chosen not in known:
        raise UsageError("unknown-name", f"host {name}: there is no profile {chosen!r}", hint=suggest(chosen, known))
    base = known[chosen]
    unified = base.unified if host.override.unified is None else host.override.unified
    layers = [] if base.stack else [("config/stacks.toml", Override(stack=find_stack().name))]
    layers += [(f"mode {each}", mode.on(unified=unified)) for each, mode in _modes_of(name, host).items()]
    layers.append((f"host {name}", host.override))
    profile, origin = merged(f"profile {chosen}", base, layers)
    if host.prove:
        profile = msgspec.structs.replace(profile, prove=(*profile.prove, *host.prove))
        origin["prove"] += f", host {name}"
    return Target(name, host, chosen, profile, origin)


def _modes_of(name: str, host: Host) -> dict[str, Mode]:
    """A host's modes, in its order; raises UsageError, or ConfigError if they exclude each other."""
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
        unfit = f", which {', '.join(found)} does not allow" if found else ""
        raise ConfigError(
            "config",
            f"host {name}: `develop` names nodes under development{unfit}",
            cause="ComfyUI restarts whenever they change, even during a job",
            hint='modes = ["development"], or leave `develop` out',
        )
    return found


def summary(found: Target) -> dict[str, Any]:
    """A host merged with its profile, for JSON."""
    return {
        "name": found.name,
        "address": found.host.address,
        "profile": found.profile_name,
        "comfyui": found.comfyui,
        "modes": found.host.modes,
        "site": found.site,
        "flags": found.flags,
        "env": found.env,
        "origin": found.origin,
        "values": msgspec.to_builtins(found.profile),
    }


def rows(found: Target) -> Iterator[str]:
    """A host, then each of its settings with the file or table that it comes from."""
    where = found.host.address or "this machine"
    yield f"{found.name}: {where}, {found.prefix}, {found.host.listen}:{found.host.port}, {found.host.scope}"
    yield f"  {'comfyui = ' + found.comfyui:44} {found.host.comfyui}"
    for key, origin in found.origin.items():
        kind, _, name = key.partition(".")
        value = getattr(found.profile, kind)
        setting = value[name] if name else value
        if isinstance(setting, Setting):
            unfit = not (setting.off or name in found.flags or name in found.env)
            text = f"{name}{f' {setting.value}' if setting.value else ''}{' (off)' if setting.off else ''}"
            text += f" (only {setting.versions})" if unfit else ""
            yield f"  {text:44} {origin}: {setting.why}"
        elif setting not in ("", (), {}):
            text = ", ".join(map(str, setting)) if isinstance(setting, tuple) else str(setting)
            yield f"  {kind + ' = ' + text:44} {origin}"
