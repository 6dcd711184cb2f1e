"""A proposal: the parts of an existing installation that Hearth adopts, and the parts that it does not.

Pure: the input is a survey and facts, the output is lines for hosts.toml and folders to move.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from core.errors import ConfigError
from deploy.host import Host
from deploy.profile import profiles
from deploy.release import OWN_FLAGS
from deploy.survey import HIDDEN, port, settings
from lock import application
from lock.nodes import check_address

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agent.schema.survey import Folder, Installation
    from deploy.facts import Facts
    from deploy.host import Target
    from lock.application import Flag
    from lock.nodes import Catalogue


@dataclass(frozen=True)
class Proposal:
    """The proposal for one installation.

    `snippet` is for hosts.toml. `moves` gives the origin and size (bytes, files) of each folder to move. `nodes` are
    the nodes that Hearth knows, with a remark; `add` are commands that pin others; `left` are the items not adopted,
    with the reason.
    """

    host: str
    installation: Installation
    snippet: str
    moves: dict[str, tuple[str, int, int]]
    nodes: dict[str, str]
    add: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


WHY = "as in the previous installation"


def propose(
    target: Target, facts: Facts, found: Installation, known: Catalogue, flags: Mapping[str, Flag], by: str
) -> Proposal:
    """Propose which parts of an installation Hearth adopts; `by` is "rename" or "reference"."""
    left: list[tuple[str, str]] = []
    moves, places, mounts = _folders(found, by, target.site.folders, left)
    roots = _model_roots(found.paths, left)
    nodes, add = _nodes(found, known, left)
    profile = _profile(facts)
    chosen = _flags(profile, settings(found.argv), flags, left)
    left += _lost(found)
    lines = [f"[hosts.{target.name}]", f'profile = "{profile}"', *_host(target.host, found)]
    lines += [f"model_roots = {json.dumps(roots)}"] if roots else []
    for point, what in sorted(mounts.items()):
        lines += ["", f"[hosts.{target.name}.mounts.{json.dumps(point)}]    # {what}"]
    if places:
        lines += ["", f"[hosts.{target.name}.folders]"]
        lines += [f"{name} = {json.dumps(place)}" for name, place in places.items()]
    if nodes or chosen:
        lines += ["", f"[hosts.{target.name}.override]"]
        lines += [f"nodes = {json.dumps([*profiles()[profile].nodes, *nodes])}"] if nodes else []
        for name, value in chosen.items():
            given = f"value = {json.dumps(value)}, " if value else ""
            lines.append(f'flags."{name}" = {{ {given}why = "{WHY}" }}')
    return Proposal(target.name, found, "\n".join(lines) + "\n", moves, nodes, tuple(add), tuple(left))


def _host(host: Host, found: Installation) -> list[str]:
    """The lines of a host's own keys: current values, with the installation's address, port and members."""
    given = settings(found.argv)
    started = bool(found.units or found.processes)  # otherwise its flags are unknown
    people = {name for folder in found.folders.values() for name in folder.people} - {host.run_as}
    values = {
        "address": host.address, "user": host.user, "ssh_port": host.ssh_port, "prefix": host.prefix,
        "service": host.service, "run_as": host.run_as, "keep": host.keep, "comfyui": host.comfyui,
        "listen": (given["--listen"] or "0.0.0.0") if "--listen" in given else host.listen,  # noqa: S104  ComfyUI's own
        "port": port(found) if started else host.port, "members": tuple(sorted(people | set(host.members))),
    }  # fmt: skip
    default = Host()
    lines = {key: f"{key} = {json.dumps(value)}" for key, value in values.items() if value != getattr(default, key)}
    if "listen" in lines and values["listen"] != "127.0.0.1":
        lines["listen"] += "    # WHOEVER REACHES THIS ADDRESS CAN USE IT, without a password"
    return list(lines.values())


def _lost(found: Installation) -> list[tuple[str, str]]:
    """The items that are not adopted and belong to the installation as a whole."""
    names = sorted({name for unit in found.units for name in unit.variables} - {"PATH", "PYTHONUNBUFFERED"})
    lost = [(f"variable {name}", "set it in the host's override.env if it is needed") for name in names]
    if edited := [each for each in found.edited or () if not each.startswith(("models/", "input/", "output/"))]:
        lost.append((f"edits of ComfyUI: {_some(edited)}", "a release contains the pinned ComfyUI without edits"))
    unread = ["ComfyUI"] if found.commit and found.edited is None else []
    if unread := [*unread, *(each.name for each in found.nodes if each.commit and each.edited is None)]:
        lost.append((f"edits of {_some(unread)}", "unknown, because the host has no git"))
    if database := settings(found.argv).get("--database-url"):
        lost.append(("its database", f"it is at {database}; Hearth's ComfyUI creates a new one"))
    return lost


def _folders(
    found: Installation, by: str, elsewhere: Mapping[str, str], left: list[tuple[str, str]]
) -> tuple[dict[str, tuple[str, int, int]], dict[str, str], dict[str, str]]:
    """Folders to move; folders that stay, for `folders`; the mounts that both need, with their current source."""
    moves: dict[str, tuple[str, int, int]] = {}
    places: dict[str, str] = {}
    mounts: dict[str, str] = {}
    for name, folder in found.folders.items():
        if configured := elsewhere.get(name):
            places[name] = configured
            if folder.files and folder.real != configured:
                left.append((f"{name} in {folder.real}", f"hosts.toml places it in {configured}"))
        elif folder.foreign:
            left.append((f"{name} in {folder.real}", folder.foreign))
        elif folder.kind == "missing" or (folder.rename and not folder.files):
            continue  # empty, or already moved
        elif folder.rename and by == "rename":
            moves[name] = (folder.real, folder.bytes, folder.files)
            left += _links(folder, found)
        elif wrong := _unfit(folder.real):
            left.append((f"{name} in {folder.real}", wrong))
        else:
            places[name] = folder.real
        needed = [*folder.mounts, *([folder.mount] if places.get(name) else [])]
        mounts |= {each.point: f"{each.type} {each.what}" for each in needed if each.point != "/"}
    return moves, places, mounts


def _unfit(place: str) -> str:
    """The reason why hosts.toml cannot name a folder; empty if it can."""
    if re.match(r"/(home|root)\b", place):
        return "a system service cannot see home folders: move it elsewhere first"
    plain = re.fullmatch(r"(/[\w.@:+-]+)+", place, re.ASCII)
    return "" if plain else "hosts.toml does not accept this name: rename it first"


def _links(folder: Folder, found: Installation) -> list[tuple[str, str]]:
    """Links in a moved folder that would then be dangling, or point outside the service's view."""
    wrong: list[tuple[str, str]] = []
    for link, target in folder.links.items():
        here = PurePosixPath(folder.real, link)
        moved = [each.real for each in found.folders.values() if each.rename]
        if not target.startswith("/"):
            depth = len(PurePosixPath(link).parent.parts)
            if PurePosixPath(target).parts[: depth + 1] == ("..",) * (depth + 1):
                wrong.append((f"link {here} -> {target}", "it leads out of the moved folders: make it absolute first"))
        elif any(PurePosixPath(target).is_relative_to(each) for each in moved):
            wrong.append((f"link {here} -> {target}", "it leads into the moved folders: create it again afterwards"))
        elif target.startswith(("/home/", "/root/")):
            wrong.append((f"link {here} -> {target}", "a system service cannot see home folders"))
    return wrong


def _model_roots(text: str, left: list[tuple[str, str]]) -> list[str]:
    """The folders of an extra_model_paths.yaml with ComfyUI's model layout: one subfolder per model type.

    Parsed line by line: sections, `base_path`, and one or (after `|`) several folders per type.
    """
    roots: dict[str, None] = {}
    base = kind = ""
    for line in text.splitlines():
        bare = line.split(" #")[0].rstrip()
        if not bare.strip() or bare.lstrip().startswith("#"):
            continue
        if not bare[0].isspace():
            base = kind = ""
            continue
        key, colon, value = bare.strip().partition(":")
        if colon and re.fullmatch(r"\w+", key):
            kind = key
        else:
            value = bare.strip()
        value = value.strip().strip("\"'")
        if kind == "base_path":
            base = value or base
        elif value not in ("", "|", ">") and kind != "is_default":
            place = PurePosixPath(base, value)
            fits = place.name == kind and place.is_absolute() and kind != "custom_nodes"
            why = (
                _unfit(str(place.parent))
                if fits
                else "a folder of model_roots has one folder for each kind, with ComfyUI's name for it"
            )
            if not why:
                roots[str(place.parent)] = None
            else:
                left.append((f"{kind} in {place} (extra_model_paths.yaml)", why))
    return list(roots)


def _profile(facts: Facts) -> str:
    """The profile for the machine's GPU."""
    have = {gpu.capability for gpu in facts.gpus}
    fitting = [name for name, profile in profiles().items() if profile.arch and profile.arch in have]
    return (fitting or ["cuda" if facts.gpus else "cpu"])[0]


def _flags(
    profile: str, given: Mapping[str, str], known: Mapping[str, Flag], left: list[tuple[str, str]]
) -> dict[str, str]:
    """The flags for an override: those that this ComfyUI accepts and the profile does not set."""
    own = {name: setting.value for name, setting in profiles()[profile].flags.items()}
    chosen: dict[str, str] = {}
    for name, value in given.items():
        if name in (*OWN_FLAGS, "--auto-launch") or own.get(name) == value:
            continue
        if HIDDEN in value:
            left.append(
                (f"flag {name}", "it is a secret, and a command line is visible to other users: inv secret set")
            )
        elif name.startswith("--enable-manager"):
            left.append((f"flag {name}", "off by default, and cannot install nodes: docs/decisions/0010-manager.md"))
        elif wrong := application.wrong({**own, **chosen, name: value}, known):
            left.append((f"flag {f'{name} {value}'.strip()}", wrong[0][0]))
        else:
            chosen[name] = value
    return chosen


def _nodes(found: Installation, known: Catalogue, left: list[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The nodes that Hearth knows, with a remark, and commands that add the others."""
    listed = {address(node.url): name for name, node in known.nodes.items()}
    nodes: dict[str, str] = {}
    add: list[str] = []
    for each in found.nodes:
        name = listed.get(address(each.url), "")
        if each.disabled:
            left.append((f"node {each.name}", "it is disabled"))
        elif each.file:
            left.append((f"node {each.name}", "a single file has no repository to pin"))
        elif each.edited:
            why = f"it was edited ({_some(each.edited)}): put the edits into your own repository, and pin that"
            left.append((f"node {each.name}", why))
        elif name:
            pinned = known.nodes[name].commit
            same = (
                "pinned at the same commit"
                if pinned == each.commit
                else f"pinned at {pinned[:9]}, installed {each.commit[:9]}"
            )
            nodes[name] = same if each.commit else f"pinned at {pinned[:9]}, installed from an unknown commit"
        elif each.name in known.left_out:
            left.append((f"node {each.name}", known.left_out[each.name]))
        elif not each.url:
            left.append((f"node {each.name}", "its repository is unknown"))
        else:
            try:  # the address is untrusted input
                check_address(f"node {each.name}", each.url)
            except ConfigError:
                left.append((f"node {each.name}", f"git does not accept the address of its repository: {each.url!r}"))
                continue
            commit = f"@{each.commit}" if each.commit else ""
            add.append(f'inv nodes.add {shlex.quote(each.url + commit)} --why "it was installed on this host"')
    return nodes, add


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def address(url: str) -> str:
    """A repository's address in a normal form, equal for all spellings."""
    plain = re.sub(r"^(ssh://)?git@([^:/]+)[:/]", r"https://\2/", url.lower())
    return plain.removesuffix("/").removesuffix(".git")
