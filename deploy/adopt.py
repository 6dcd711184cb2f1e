"""Taking over a ComfyUI that somebody else installed: what of it Hearth can keep, and the plan that does it.

Pure, as plans are: what `agent/look/survey.py` saw goes in, a proposal or a plan comes out.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from agent.schema import change
from agent.schema.survey import Folder, Installation, Survey
from core import console
from core.errors import ConfigError, NoInstallationError
from deploy.host import TOKEN, Host, names_secret, profiles
from deploy.plan import Options, Plan, Refusal, account
from lock import application
from lock.nodes import check_address

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agent.schema.change import Step
    from deploy.facts import Facts
    from deploy.host import Target
    from lock.application import Flag
    from lock.nodes import Catalogue


def only(survey: Survey, host: str) -> Installation:
    """The one installation; raises NoInstallationError when there is none, or more than one."""
    if len(survey.found) == 1:
        return survey.found[0]
    if survey.found:
        places = [each.path for each in survey.found]
        raise NoInstallationError(
            f"{host} has {len(places)} installations of ComfyUI: {', '.join(places)}",
            hint=f"choose one: --path {shlex.quote(places[0])}",
        )
    raise NoInstallationError(
        f"no ComfyUI was found on {host}",
        cause="\n         ".join(["looked for main.py and comfy/ in:", *survey.looked]),
        hint="--path FOLDER says where it is",
    )


def port(found: Installation) -> int:
    """The port that an installation listens on; ComfyUI's default is 8188."""
    told = settings(found.argv).get("--port", "")
    return int(told) if told.isdecimal() else 8188


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


@dataclass(frozen=True)
class Proposal:
    """What becomes of an installation.

    `snippet` is for hosts.toml; `moves` says of each folder whence and how much (bytes, files); `nodes` are those that
    Hearth knows, with a remark; `add` are commands that pin others; `left` is what is not taken over, with the reason.
    """

    host: str
    installation: Installation
    snippet: str
    moves: dict[str, tuple[str, int, int]]
    nodes: dict[str, str]
    add: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


OWN_FLAGS = {
    "--listen", "--port", "--base-directory", "--output-directory", "--input-directory", "--user-directory",
    "--models-directory", "--temp-directory", "--database-url", "--extra-model-paths-config", "--auto-launch",
    "--disable-auto-launch",
}  # fmt: skip
"""Flags that a release sets itself, or that the proposal says in another way."""

WHY = "the installation before was started so"


def propose(
    target: Target, facts: Facts, found: Installation, known: Catalogue, flags: Mapping[str, Flag], by: str
) -> Proposal:
    """What of an installation Hearth keeps, and how; `by` is "rename" or "reference"."""
    left: list[tuple[str, str]] = []
    moves, places, mounts = _folders(found, by, target.site["folders"], left)
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
    """The lines of a host's own keys: as they are now, but where the installation listens, and who shares it."""
    told = settings(found.argv)
    started = bool(found.units or found.processes)  # else nobody knows with which flags
    people = {name for folder in found.folders.values() for name in folder.people} - {host.run_as}
    values = {
        "address": host.address, "user": host.user, "ssh_port": host.ssh_port, "prefix": host.prefix,
        "service": host.service, "run_as": host.run_as, "keep": host.keep,
        "listen": (told["--listen"] or "0.0.0.0") if "--listen" in told else host.listen,  # noqa: S104  ComfyUI's own
        "port": port(found) if started else host.port, "members": tuple(sorted(people | set(host.members))),
    }  # fmt: skip
    default = Host()
    lines = {key: f"{key} = {json.dumps(value)}" for key, value in values.items() if value != getattr(default, key)}
    if "listen" in lines and values["listen"] != "127.0.0.1":
        lines["listen"] += "    # WHOEVER REACHES THIS ADDRESS CAN USE IT, without a password"
    return list(lines.values())


def _lost(found: Installation) -> list[tuple[str, str]]:
    """What is not taken over of the installation as a whole."""
    names = sorted({name for unit in found.units for name in unit.variables} - {"PATH", "PYTHONUNBUFFERED"})
    lost = [(f"variable {name}", "set it in the host's override.env if it has a reason") for name in names]
    if edited := [each for each in found.edited or () if not each.startswith(("models/", "input/", "output/"))]:
        lost.append((f"edits of ComfyUI: {_some(edited)}", "a release has ComfyUI as it is pinned"))
    unread = ["ComfyUI"] if found.commit and found.edited is None else []
    if unread := [*unread, *(each.name for each in found.nodes if each.commit and each.edited is None)]:
        lost.append((f"edits of {_some(unread)}", "nobody can tell whether there are any: the host has no git"))
    if database := settings(found.argv).get("--database-url"):
        lost.append(("its database", f"it is at {database}; Hearth's ComfyUI makes one anew"))
    return lost


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


def _folders(
    found: Installation, by: str, elsewhere: Mapping[str, str], left: list[tuple[str, str]]
) -> tuple[dict[str, tuple[str, int, int]], dict[str, str], dict[str, str]]:
    """What is moved; what stays and is named in `folders`; the mounts that both need, with what they are now."""
    moves: dict[str, tuple[str, int, int]] = {}
    places: dict[str, str] = {}
    mounts: dict[str, str] = {}
    for name, folder in found.folders.items():
        if told := elsewhere.get(name):
            places[name] = told
            if folder.files and folder.real != told:
                left.append((f"{name} in {folder.real}", f"hosts.toml says that it lies in {told}"))
        elif folder.foreign:
            left.append((f"{name} in {folder.real}", folder.foreign))
        elif folder.kind == "missing" or (folder.rename and not folder.files):
            continue  # nothing in it, or no more
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
    """Why a folder cannot be named in hosts.toml; empty when it can."""
    if re.match(r"/(home|root)\b", place):
        return "a system's service sees no home folder: move it elsewhere first"
    return "" if re.fullmatch(r"(/[\w.@:+-]+)+", place, re.ASCII) else "hosts.toml takes no such name: rename it first"


def _links(folder: Folder, found: Installation) -> list[tuple[str, str]]:
    """Links in a folder that is moved which then lead nowhere, or where the service may not look."""
    wrong: list[tuple[str, str]] = []
    for link, target in folder.links.items():
        here = PurePosixPath(folder.real, link)
        moved = [each.real for each in found.folders.values() if each.rename]
        if not target.startswith("/"):
            depth = len(PurePosixPath(link).parent.parts)
            if PurePosixPath(target).parts[: depth + 1] == ("..",) * (depth + 1):
                wrong.append((f"link {here} -> {target}", "it leads out of what is moved: make it absolute first"))
        elif any(PurePosixPath(target).is_relative_to(each) for each in moved):
            wrong.append((f"link {here} -> {target}", "it leads into what is moved: make it anew afterwards"))
        elif target.startswith(("/home/", "/root/")):
            wrong.append((f"link {here} -> {target}", "a system's service sees no home folder"))
    return wrong


def _model_roots(text: str, left: list[tuple[str, str]]) -> list[str]:
    """The folders of an extra_model_paths.yaml that are laid out as ComfyUI's models are: in it, a folder a kind.

    Read line by line: sections, `base_path`, and one or (after `|`) several folders for a kind.
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
            why = _unfit(str(place.parent)) if fits else "model_roots have a folder a kind, named as ComfyUI names it"
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
    profile: str, told: Mapping[str, str], known: Mapping[str, Flag], left: list[tuple[str, str]]
) -> dict[str, str]:
    """The flags that an override must set: those that this ComfyUI takes beside the profile's."""
    own = {name: setting.value for name, setting in profiles()[profile].flags.items()}
    chosen: dict[str, str] = {}
    for name, value in told.items():
        if name in OWN_FLAGS or own.get(name) == value:
            continue
        if HIDDEN in value:
            left.append((f"flag {name}", "it holds a secret, which belongs in no command line: inv secret set"))
        elif name.startswith("--enable-manager"):
            left.append((f"flag {name}", "off by default, and unable to install: docs/decisions/0010-manager.md"))
        elif wrong := application.wrong({**own, **chosen, name: value}, known):
            left.append((f"flag {f'{name} {value}'.strip()}", wrong[0][0]))
        else:
            chosen[name] = value
    return chosen


def _nodes(found: Installation, known: Catalogue, left: list[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The nodes that Hearth knows, with a remark, and commands that list the others."""
    listed = {address(node.url): name for name, node in known.nodes.items()}
    nodes: dict[str, str] = {}
    add: list[str] = []
    for each in found.nodes:
        name = listed.get(address(each.url), "")
        if each.disabled:
            left.append((f"node {each.name}", "it is disabled"))
        elif each.file:
            left.append((f"node {each.name}", "a single file has no repository that could be pinned"))
        elif each.edited:
            why = f"it was edited here ({_some(each.edited)}): put that into a repository of yours, and pin it"
            left.append((f"node {each.name}", why))
        elif name:
            pinned = known.nodes[name].commit
            same = "at the same commit" if pinned == each.commit else f"pinned at {pinned[:9]}, here {each.commit[:9]}"
            nodes[name] = same if each.commit else f"pinned at {pinned[:9]}, here of an unknown commit"
        elif each.name in known.left_out:
            left.append((f"node {each.name}", known.left_out[each.name]))
        elif not each.url:
            left.append((f"node {each.name}", "nothing says which repository it is from"))
        else:
            try:  # the address is whatever its owner wrote there
                check_address(f"node {each.name}", each.url)
            except ConfigError:
                left.append((f"node {each.name}", f"its repository has no address that git takes here: {each.url!r}"))
                continue
            commit = f"@{each.commit}" if each.commit else ""
            add.append(f'inv nodes.add {shlex.quote(each.url + commit)} --why "it was installed on this host"')
    return nodes, add


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def address(url: str) -> str:
    """A repository's address as all its spellings have it."""
    plain = re.sub(r"^(ssh://)?git@([^:/]+)[:/]", r"https://\2/", url.lower())
    return plain.removesuffix("/").removesuffix(".git")


# --- plans ---------------------------------------------------------------------------------------------------------


def make(target: Target, facts: Facts, proposal: Proposal, options: Options) -> Plan:
    """The plan that takes an installation over: its units out of service, then what is moved, a rename a folder."""
    found, data = proposal.installation, f"{facts.prefix}/data"
    refusals = _place(target, facts)
    there = [unit for unit in found.units if not unit.aside]
    # One that came with a package stays where it is, stopped and disabled.
    units = {unit.name: unit for unit in there if unit.active or unit.enabled or unit.path.startswith("/etc/")}
    for each in found.processes:
        if each.unit not in units:
            what = f"the old ComfyUI runs without a unit of the system's: pid {each.pid} of {each.user}"
            refusals.append(Refusal(what, "end it, so that nothing is moved while it is in use"))
    steps: list[Step] = []
    if units:
        title = f"stop {', '.join(units)} and put it aside"
        old = tuple(change.OldUnit(each.name, each.path, each.active, each.enabled) for each in units.values())
        why = f"it runs {found.path}, or has the name of Hearth's"
        steps.append(change.Retire(title, why, _UNDO, options.drain, options.force, old, found.path, port(found)))
    if proposal.moves and not facts.user:
        steps.append(account([target.host.run_as], "what is moved becomes its own"))
    if proposal.moves and not facts.data:
        steps.append(
            change.Folders(f"lay out {facts.prefix}", "its folders are not all there", f"rm -r {facts.prefix}")
        )
    for name, (source, size, count) in proposal.moves.items():
        title = f"move {source} to {data}/{name} ({count} files, {console.size(size)})"
        steps.append(change.Adopt(title, "one rename, nothing is copied", _UNDO, name, source, tuple(found.owners)))
    return Plan(facts.current, facts.current, steps=() if refusals else tuple(steps), refusals=tuple(refusals))


_UNDO = "inv adopt --undo"


def undo(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that puts everything back; raises NoInstallationError when nothing was adopted."""
    if not facts.adopted:
        raise NoInstallationError(f"nothing was adopted on {target.name}", hint=f"inv history --host {target.name}")
    refusals = _place(target, facts)
    steps: list[Step] = []
    if facts.current:
        why = "the old ComfyUI gets its folders and its port back"
        title = f"take release {facts.current} out of service"
        steps.append(change.Withdraw(title, why, "inv deploy", options.drain, options.force))
    steps.append(change.Unadopt("put the old ComfyUI back as it was", "asked for", "inv adopt --apply"))
    return Plan(facts.current, "", steps=() if refusals else tuple(steps), refusals=tuple(refusals))


def _place(target: Target, facts: Facts) -> list[Refusal]:
    """What keeps a host from being changed so."""
    found: list[Refusal] = []
    if target.host.scope == "user":
        what = "folders and units of others can be moved by root only, and this host's scope is user"
        found.append(Refusal(what, 'scope = "system", or move its folders by hand to the data that inv facts names'))
    elif not facts.manager.startswith("systemd"):
        found.append(Refusal("the host runs no systemd", "move its folders by hand"))
    if facts.busy:
        who = f"{facts.busy['action']} by {facts.busy['who']} since {facts.busy['since']}"
        found.append(Refusal(f"the host is being changed: {who}", f"inv attach --host {target.name}"))
    return found
