"""A survey: what the agent (`agent/look/survey.py`) saw of ComfyUI installations that are not Hearth's."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

import msgspec

from core.errors import NoInstallationError
from deploy.secrets import TOKEN, names_secret

if TYPE_CHECKING:
    from collections.abc import Sequence


class FileSystem(msgspec.Struct, frozen=True):
    """A mounted file system: its place, what it is and of which type."""

    point: str = "/"
    what: str = ""
    type: str = ""


class Folder(msgspec.Struct, frozen=True):
    """One of ComfyUI's folders: a "folder", a "link" or "missing"; `real` is where it leads.

    `rename` says whether one rename brings it into Hearth's data; `bytes`, `files` and `links` (with what they say)
    are counted only then. `mounts` are in it or links in it lead there; `people` own it or are in its group. `foreign`
    says why it is not ComfyUI's to take.
    """

    place: str
    real: str
    kind: str
    mount: FileSystem
    rename: bool
    bytes: int
    files: int
    owner: str
    people: tuple[str, ...]
    links: dict[str, str]
    mounts: tuple[FileSystem, ...]
    foreign: str = ""


class Found(msgspec.Struct, frozen=True):
    """A custom node's folder, or a single `file`; `edited` is None where nobody can tell."""

    name: str
    disabled: bool
    file: bool
    url: str
    commit: str
    edited: tuple[str, ...] | None


class Unit(msgspec.Struct, frozen=True):
    """A systemd unit that starts it; `aside` when adopting has put it away already."""

    name: str
    path: str
    aside: bool
    user: str
    variables: tuple[str, ...]
    active: bool
    enabled: bool


class Process(msgspec.Struct, frozen=True):
    """A process that runs it; `unit` is empty when no unit of the system's started that."""

    pid: int
    user: str
    unit: str


class Installation(msgspec.Struct, frozen=True):
    """An installation of ComfyUI as the agent read it; `paths` is the text of its extra_model_paths.yaml.

    `owners` are the user ids that own or run it.
    """

    path: str
    version: str
    url: str
    commit: str
    edited: tuple[str, ...] | None
    python: str
    torch: str
    environment: str
    folders: dict[str, Folder]
    paths: str
    nodes: tuple[Found, ...]
    argv: tuple[str, ...]
    units: tuple[Unit, ...]
    processes: tuple[Process, ...]
    holds_port: bool
    owners: tuple[int, ...] = ()

    @property
    def port(self) -> int:
        """Where it listens; ComfyUI's own default is 8188."""
        told = settings(self.argv).get("--port", "")
        return int(told) if told.isdecimal() else 8188


class Survey(msgspec.Struct, frozen=True):
    """The installations found, and all the places looked at."""

    looked: tuple[str, ...]
    found: tuple[Installation, ...]

    def only(self, host: str) -> Installation:
        """The one installation; raises NoInstallationError when there is none, or more than one."""
        if len(self.found) == 1:
            return self.found[0]
        if self.found:
            places = [each.path for each in self.found]
            raise NoInstallationError(
                f"{host} has {len(places)} ComfyUIs: {', '.join(places)}",
                hint=f"choose one: --path {shlex.quote(places[0])}",
            )
        raise NoInstallationError(
            f"no ComfyUI was found on {host}",
            cause="\n         ".join(["looked for main.py and comfy/ in:", *self.looked]),
            hint="--path FOLDER says where it is",
        )


HIDDEN = "***"

# Who an address is asked as, to the last @ before it ends (a password may hold one, and a slash); of scp's form, too.
_USER = re.compile(r"(?i)([a-z][a-z0-9+.-]*://)([^\s?#]*)@|(?<![\w/:@])([\w.+-]+:[^\s/]*)@(?=[\w.-]+:)")
_QUERY = re.compile(r"([?&;#])([\w.-]+)=([^&;#\s]+)")


def without_secrets(found: Any, hidden: str = HIDDEN) -> Any:
    """What an agent saw, and in none of its texts a password or token: of addresses, flags and variables."""
    if isinstance(found, dict):  # an address is of use without who asks for it
        return {key: without_secrets(value, "" if key == "url" else hidden) for key, value in found.items()}
    if isinstance(found, list):
        flags = [each if isinstance(each, str) else "" for each in found]
        return [
            HIDDEN if flag.startswith("-") and "=" not in flag and names_secret(flag) and each else each
            for flag, each in zip(["", *flags], (without_secrets(each, hidden) for each in found), strict=False)
        ]
    if not isinstance(found, str):
        return found
    name, equals, _ = found.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name) and names_secret(name):
        return f"{name}={HIDDEN}"

    def user(match: re.Match[str]) -> str:
        if re.fullmatch(r"[A-Za-z_.-]{1,16}", match[2] or match[3]):  # git@, anna@
            return match[0]
        return f"{match[1] or ''}{hidden}{'@' if hidden else ''}"

    text = _QUERY.sub(lambda each: f"{each[1]}{each[2]}={HIDDEN}" if names_secret(each[2]) else each[0], found)
    return TOKEN.sub(HIDDEN, _USER.sub(user, text))


def settings(argv: Sequence[str]) -> dict[str, str]:
    """Flags with their values, as far as the words of a command line tell."""
    found: dict[str, str] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = value
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return found
