"""A survey: the existing ComfyUI installations that the agent found (`agent/look/survey.py`)."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from core.errors import HostError
from deploy.secrets import TOKEN, names_secret

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.schema.survey import Installation, Survey


def only(survey: Survey, host: str) -> Installation:
    """Return the only installation; raises HostError if there are none or several."""
    if len(survey.found) == 1:
        return survey.found[0]
    if survey.found:
        places = [each.path for each in survey.found]
        raise HostError(
            "no-installation",
            f"{host} has {len(places)} installations of ComfyUI: {', '.join(places)}",
            hint=f"choose one: --path {shlex.quote(places[0])}",
        )
    raise HostError(
        "no-installation",
        f"no ComfyUI was found on {host}",
        cause="\n".join(["searched for main.py and comfy/ in:", *survey.looked]),
        hint="name its folder with --path FOLDER",
    )


def port(found: Installation) -> int:
    """The port that an installation listens on; ComfyUI's default is 8188."""
    given = settings(found.argv).get("--port", "")
    return int(given) if given.isdecimal() else 8188


HIDDEN = "***"

# The user part of an address, up to the last @ (a password may contain @ and /); also in scp form.
_USER = re.compile(r"(?i)([a-z][a-z0-9+.-]*://)([^\s?#]*)@|(?<![\w/:@])([\w.+-]+:[^\s/]*)@(?=[\w.-]+:)")
_QUERY = re.compile(r"([?&;#])([\w.-]+)=([^&;#\s]+)")


def without_secrets(found: Any, hidden: str = HIDDEN) -> Any:
    """Remove passwords and tokens from an agent's answer: in addresses, flags and variables."""
    if isinstance(found, dict):  # an address is useful without its user
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
    """The flags of a command line with their values; the last one wins, as in ComfyUI."""
    found: dict[str, str] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = value
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return found
