"""Rules for hosts, profiles and modes that types cannot express: values in units, paths and command lines."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from core.errors import ConfigError, UsageError
from deploy.secrets import names_secret

if TYPE_CHECKING:
    from deploy.host import Host
    from deploy.profile import Override, Profile

SYSTEM_PREFIX = "/opt/comfyui"
"""The default prefix on a host with root."""

EXPORTER = "hearth-exporter"
"""The user of a machine's exporters. Not a dynamic user: D-Bus rejects users unknown to NSS (systems without
libnss-systemd), and GPU access is granted by group membership.
"""

PLAIN_PATH = re.compile(r"(/[\w.@+-]+)+", re.ASCII)
"""No blanks, quotes, % or colons, which have special meanings in units and command lines."""

_PLAIN = {
    "address": (r"(?!-)[\w.:%@+-]*", "a name or address that ssh accepts"),
    "user": (r"((?!-)[\w.@\\+-]+\$?)?", "a login name"),
    "service": (
        r"(?!(systemd-.*|dbus.*|sshd?|cron|user|getty)$)[a-z][a-z0-9_-]{0,30}",
        "a plain lower-case name, and not the name of another service",
    ),
    "run_as": (
        rf"(?!(root|daemon|bin|sys|nobody|systemd-.*|{EXPORTER})$)[a-z_][a-z0-9_-]{{0,22}}",
        "a plain lower-case name, and neither root nor the user of another service",
    ),
    "free_memory": (r"([1-9][0-9]{0,5}[smhd])?", "a duration such as 30m, 4h or 1d"),
}
"""The allowed form of values that are written unquoted to units and command lines, except paths."""


SYSTEM = re.compile(r"/(etc|proc|sys|dev|run|boot|usr|s?bin|lib(32|64|x32)?|var/(run|lock|lib/systemd))(/|$)")
"""System folders, which never contain files of Hearth."""

_SHARED = ("/home", "/media", "/mnt", "/opt", "/root", "/srv", "/tmp", "/var", "/var/lib", "/var/log", "/var/tmp")  # noqa: S108


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> int:
    """The seconds of a duration such as `30m`; raises UsageError."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}[smhd]", text):
        raise UsageError("usage", f"{text!r} is not a duration", hint="use one such as 90s, 30m, 4h or 1d")
    return int(text[:-1]) * _SECONDS[text[-1]]


def _check_places(place: str, host: Host) -> None:
    """Refuse system folders, world-writable folders and Hearth's own folders; raises ConfigError."""
    prefix = host.prefix or (SYSTEM_PREFIX if host.scope == "system" else "")
    own = (
        [f"{prefix}/{name}" for name in ("state", "releases", "parts", "current", "secrets", "gateway")]
        if prefix
        else []
    )
    given = [(each, "folder") for each in host.folders.values()] + [(each, "mount") for each in host.mounts]
    for each, kind in [(prefix, "prefix"), *given]:
        temporary = host.scope == "system" and re.match(r"/(var/)?tmp(/|$)", each)
        shallow = kind == "prefix" and each.startswith("/") and each.count("/") < 2
        if SYSTEM.match(each) or each in _SHARED or temporary or shallow:
            why = "the service has its own /tmp" if temporary else "it is a system folder, or shared with other users"
            raise ConfigError(
                "config",
                f"{place}: {each} cannot be a {kind}",
                cause=why,
                hint="use a folder of its own, such as /srv/models",
            )
        if any(f"{each}/".startswith(f"{its}/") for its in own) or (
            kind == "folder" and each in (prefix, f"{prefix}/data")
        ):
            raise ConfigError(
                "config",
                f"{place}: {each} cannot be a {kind}",
                cause=f"Hearth keeps its own files in {prefix}",
                hint="another",
            )


def check_host(place: str, host: Host) -> None:
    """Check a host's values; raises ConfigError. `place` is the location of its declaration."""
    _check_words(place, host)
    _check_numbers(place, host)
    _check_paths(place, host)
    _check_places(place, host)
    _check_overlaps(place, host)
    _check_mounts(place, host)
    check_settings(place, host.override)


def _check_words(place: str, host: Host) -> None:
    """Names and addresses."""
    for key, (form, hint) in _PLAIN.items():
        if not re.fullmatch(form, value := getattr(host, key)):
            raise ConfigError("config", f"{place}: {key} = {value!r}", hint=hint)
    for each in host.members:
        if not re.fullmatch(r"\w[\w.@-]*\$?", each, re.ASCII):
            raise ConfigError("config", f"{place}: members: {each!r} is not a user name", hint='members = ["anna"]')
        if each in (host.run_as, EXPORTER):
            raise ConfigError(
                "config",
                f"{place}: members: {each} is the user of a service",
                cause="nodes or the exporter run as that user; members have more rights",
                hint="list only the logins of people",
            )
    for each in host.listen.split(","):
        try:
            ipaddress.ip_address(each.replace("%", " "))  # no zone as in fe80::1%eth0, because units expand %
        except ValueError as error:
            hint = 'use one or more, such as "127.0.0.1" or "127.0.0.1,::1"; "0.0.0.0,::" is all addresses'
            raise ConfigError(
                "config", f"{place}: listen = {host.listen!r}: {each!r} is not an IP address", hint=hint
            ) from error
    for each in host.secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", each):
            raise ConfigError(
                "config", f"{place}: secrets: {each!r} is not a variable name", hint='secrets = ["HF_TOKEN"]'
            )
    bad = [each for each in host.developed if not re.fullmatch(r"\w[\w-]*", each, flags=re.ASCII)]
    if bad or len(host.developed) < len(host.develop):
        raise ConfigError(
            "config",
            f"{place}: develop: {', '.join(bad or host.develop)}: not valid as names of node folders",
            hint="use letters, digits, _ and -",
        )


def _check_numbers(place: str, host: Host) -> None:
    """Ports, and the number of kept releases."""
    ports = range(1, 65536)
    if host.port not in ports or not (host.ssh_port is None or host.ssh_port in ports) or host.keep < 1:
        raise ConfigError("config", f"{place}: port and ssh_port must be from 1 to 65535, and keep at least 1")
    if not all(each in ports for each in host.connect):
        raise ConfigError("config", f"{place}: connect = {list(host.connect)}", hint="use ports from 1 to 65535")
    if host.metrics_port is not None and (host.metrics_port not in ports or host.metrics_port == host.port):
        what = f"{place}: metrics_port must be from 1 to 65535, and not ComfyUI's {host.port}"
        raise ConfigError("config", what)


def _check_paths(place: str, host: Host) -> None:
    """The form of every path, and its visibility to the service."""
    prefix, home = host.prefix, re.compile(r"/(home|root)\b")
    if host.scope == "system" and prefix and (not prefix.startswith("/") or home.match(prefix)):
        raise ConfigError(
            "config",
            f'{place}: prefix {prefix} is not allowed with scope = "system"',
            cause="it must be absolute, and the unit hides home folders from the service",
            hint='use /opt/comfyui, or scope = "user"',
        )
    for each in (*host.mounts, *host.folders.values(), *host.model_roots, *host.develop, *([prefix] if prefix else [])):
        below = each.removeprefix("~") if each is prefix else each  # the agent replaces it by the login's home
        if each not in (prefix, *host.develop, *host.folders.values()):
            below = below.replace(":", "_")  # colons matter only where systemd binds a path
        if not PLAIN_PATH.fullmatch(below) or {".", ".."} & set(each.split("/")):
            raise ConfigError(
                "config",
                f"{place}: {each!r} is not a plain absolute path",
                hint="use a path such as /mnt/models: letters, digits and . _ @ + -, no slash at the end",
            )
        # nodes under development are bound to the service's own path
        if host.scope == "system" and each not in host.develop and home.match(each):
            raise ConfigError(
                "config",
                f"{place}: {each} is in a home folder, which the unit hides from the service",
                hint='use another folder, such as a bind mount of it, or scope = "user"',
            )


def _check_overlaps(place: str, host: Host) -> None:
    """No path is inside a folder that ComfyUI writes."""
    prefix = host.prefix or SYSTEM_PREFIX
    written = [f"{prefix}/data", *host.folders.values()] if host.scope == "system" else []
    for each in (*host.mounts, *host.folders.values(), *host.develop):
        if inside := next((its for its in written if each.startswith(f"{its}/")), ""):
            raise ConfigError(
                "config",
                f"{place}: {each} is in {inside}",
                cause="ComfyUI can write there, and could replace it by a link that root would follow",
                hint='use a folder of its own, such as mounts."/mnt/models" and folders.models = "/mnt/models"',
            )


def _check_mounts(place: str, host: Host) -> None:
    """The file systems that Hearth mounts."""
    for each, mount in host.mounts.items():
        if mount.what and (not mount.type or host.scope != "system"):
            raise ConfigError(
                "config",
                f"{place}: mount {each} is not possible",
                cause='`what` needs a `type` and scope = "system"',
                hint='set type, such as "nfs4"; without root omit `what` and mount it in fstab',
            )
        for key, _, value in (each.partition("=") for each in mount.options.split(",")):
            if names_secret(key.strip()) and not value.startswith("/"):  # a file with a secret is named by its path
                raise ConfigError(
                    "secret",
                    f"{place}: mount {each}: the option {key} is a secret",
                    cause="this file is copied, backed up and shown, and every user can read a unit",
                    hint='use a file that only root can read: options = "credentials=/etc/hearth/nas"',
                )
        fields = (
            ("what", mount.what, r"(?![- ])[^\\'\"]*(?<! )"),
            ("type", mount.type, r"[\w.-]*"),
            ("options", mount.options, r"[^\s\\'\"]*"),
        )
        for key, value, form in fields:
            if not ((value.isprintable() and re.fullmatch(form, value)) or not value):
                raise ConfigError("config", f"{place}: mount {each}: {key} = {value!r} cannot be written into a unit")


def check_settings(place: str, given: Profile | Override) -> None:
    """Refuse values that a unit cannot contain, invalid ranges, and contradictory allocator settings."""
    if not re.fullmatch(r"([0-9]+(\.[0-9]+)?%|[0-9]+[KMGT]?|infinity)?", given.memory_max or ""):
        raise ConfigError("config", f"{place}: memory_max = {given.memory_max!r}", hint="use a size such as 48G or 90%")
    if not re.fullmatch(r"([1-9][0-9]{0,5}%)?", given.cpu_max or ""):
        raise ConfigError("config", f"{place}: cpu_max = {given.cpu_max!r}", hint="use a share such as 400%")
    for each in given.pythons or ():
        if not re.fullmatch(r"3\.[0-9]+", each):
            raise ConfigError("config", f"{place}: pythons: {each!r}", hint="use a version such as 3.12")
    kernels = [each.partition(":")[0] for each in given.kernels or ()]
    if again := next((each for each in kernels if kernels.count(each) > 1), ""):
        raise ConfigError("config", f"{place}: kernels names {again} twice", hint="keep the profile to deploy")
    forms = ((given.flags, r"--[a-z][a-z0-9-]*", r"[^\\'\"]*"), (given.env, r"[A-Za-z_][A-Za-z0-9_]*", r".*"))
    for settings, form, values in forms:
        for name, setting in settings.items():
            if not re.fullmatch(form, name):
                raise ConfigError(
                    "config", f"{place}: {name!r} is not a {'flag' if settings is given.flags else 'variable'}"
                )
            if not (setting.value.isprintable() and re.fullmatch(values, setting.value)):
                what = f"{place}: {name}: {setting.value!r} cannot be written into a unit"
                raise ConfigError(
                    "config",
                    what,
                    hint="remove line breaks and control characters, in flags also quotes and backslashes",
                )
    for name, setting in (given.flags | given.env).items():
        for what in ("torch", "comfyui"):
            try:
                SpecifierSet(getattr(setting, what))
            except InvalidSpecifier as error:
                text = getattr(setting, what)
                raise ConfigError("config", f"{place}: {name}: {what} = {text!r} is not a version range") from error
        if "expandable_segments:True" in setting.value and "max_split_size_mb" in setting.value:
            raise ConfigError(
                "config",
                f"{place}: {name}: max_split_size_mb has no effect with expandable_segments",
                cause="expandable segments are always split",
                hint="remove max_split_size_mb",
            )
