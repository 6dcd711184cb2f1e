"""Settings outside the prefix, changed on request. Old values are recorded first and restored on undo.

A setting is a list of changes, each with a kind and a place:

    file    a file: its text and mode (None: absent)
    value   a kernel file under /proc/sys or /sys; the place may contain wildcards
    group   a group: its members (None: absent)
    node    a device file: its group and mode; the place may contain wildcards
    unit    a systemd unit: enabled, active
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.change.lifecycle import await_answer, await_jobs
from agent.files import AgentError, Json, Note, discard, write
from agent.journal import SettingsJournal
from agent.layout import Layout
from agent.processes import run
from agent.schema.change import Set, Unset
from agent.schema.settings import Access, Applied, Node, Rule, Seen, State
from agent.serve.managers import manager_of
from agent.serve.systemd import UNITS

# --- kinds ---------------------------------------------------------------------------------------------------------


def _read_file(place: str) -> list[Any] | None:
    path = Path(place)
    if not os.path.lexists(path):
        return None
    return [path.read_text(errors="surrogateescape"), stat.S_IMODE(path.stat().st_mode)]


def _write_file(place: str, value: list[Any] | None) -> None:
    path = Path(place)
    if value is None:
        discard(path)
        with suppress(OSError):  # the drop-in folder has other files or is missing
            if path.parent.name.endswith(".service.d"):
                path.parent.rmdir()
    else:
        there = path.exists()
        write(path, value[0].encode(errors="surrogateescape"), value[1])
        if there and path.parent == UNITS:
            _reload(path)
            subprocess.run(["systemctl", "reset-failed", path.name], capture_output=True)  # our starts must not count
            run(["systemctl", "try-restart", path.name])
    _reload(path)


def _reload(path: Path) -> None:
    """Reload the daemon that reads this file."""
    if UNITS in path.parents:
        run(["systemctl", "daemon-reload"])
    elif path.parent == Path("/etc/udev/rules.d") and shutil.which("udevadm"):
        run(["udevadm", "control", "--reload"])
        run(["udevadm", "trigger", "--action=change", "--subsystem-match=drm"])


def _read_value(place: str) -> str:
    text = Path(place).read_text().strip()
    chosen = re.search(r"\[(.+?)\]", text)  # /sys/kernel/mm/transparent_hugepage/enabled: always [madvise] never
    return chosen[1] if chosen else text


def _write_value(place: str, value: str) -> None:
    with Path(place).open("w") as file:  # in place: not a regular file
        file.write(value)


def _read_group(place: str) -> list[str] | None:
    with suppress(KeyError):
        return sorted(grp.getgrnam(place).gr_mem)
    return None


def _write_group(place: str, value: list[str] | None) -> None:
    there = _read_group(place) is not None
    if value is None:
        if there:
            run(["groupdel", place])
        return
    if not there:
        run(["groupadd", "--system", place])
    run(["gpasswd", "--members", ",".join(value), place])


def _read_node(place: str) -> list[int]:
    status = Path(place).stat()
    return [status.st_gid, stat.S_IMODE(status.st_mode)]


def _write_node(place: str, value: list[int]) -> None:
    os.chown(place, -1, value[0])
    Path(place).chmod(value[1])


def _read_unit(place: str) -> list[bool]:
    return [subprocess.run(["systemctl", ask, "--quiet", place]).returncode == 0 for ask in ("is-enabled", "is-active")]


def _write_unit(place: str, value: list[bool]) -> None:
    enabled, active = value
    if _read_unit(place) == value:
        return
    run(["systemctl", "daemon-reload"])
    subprocess.run(["systemctl", "reset-failed", place], capture_output=True)
    run(["systemctl", "enable" if enabled else "disable", place])
    run(["systemctl", "start" if active else "stop", place])


KINDS: dict[str, tuple[Callable[[str], Any], Callable[[str, Any], None]]] = {
    "file": (_read_file, _write_file),
    "value": (_read_value, _write_value),
    "group": (_read_group, _write_group),
    "node": (_read_node, _write_node),
    "unit": (_read_unit, _write_unit),
}


def _glob(pattern: str) -> list[str]:
    return sorted(map(str, Path("/").glob(pattern.lstrip("/"))))


def _places(change: Json) -> list[str]:
    """Return the places of a change."""
    return _glob(change["place"]) if change["kind"] in ("value", "node") else [change["place"]]


def _wanted(change: Json, now: Any) -> Any:
    """Return the wanted value of a place. The gid of a group that does not exist yet is -1."""
    kind = change["kind"]
    gid = -1
    with suppress(KeyError):
        gid = grp.getgrnam(change.get("group", "")).gr_gid
    if kind == "file":
        return [change["text"].replace("@gid@", str(gid)), 0o644]
    if kind == "group":
        return sorted({*(now or []), *change["members"]})
    return {"value": change.get("value"), "node": [gid, change.get("mode")], "unit": [True, True]}[kind]


def seen(changes: Sequence[Json]) -> tuple[Seen, ...]:
    """Return the state of every place of these changes."""
    found: list[Seen] = []
    for change in changes:
        for place in _places(change):
            with suppress(OSError):
                now = KINDS[change["kind"]][0](place)
                may = change["kind"] != "value" or os.access(place, os.W_OK)
                wanted = _wanted(change, now)
                found.append(Seen(change["kind"], place, now, wanted, may))
    return tuple(found)


def look(layout: Layout, request: Json) -> State:
    """Return the changes in force and the state of the places of the requested settings (`changes`, by name)."""
    applied = {
        name: tuple(Applied(each["kind"], each["place"], each["old"], each["new"]) for each in listed)
        for name, listed in SettingsJournal(layout).in_force().items()
    }
    return State(applied, {name: seen(changes) for name, changes in request["changes"].items()})


# --- steps ---------------------------------------------------------------------------------------------------------


def apply_setting(layout: Layout, step: Set, note: Note) -> None:
    """Apply the changes of a setting; with `serves`, stop ComfyUI first and start it afterwards.

    Undoes the whole setting and raises AgentError if a change fails or ComfyUI does not respond.
    """
    if step.serves:
        _stop(layout, step, note)
    try:
        _apply(layout, step.setting, step.changes)
        if step.serves:
            await_answer(layout, manager_of(layout), note)
    except (AgentError, OSError) as error:
        stuck = _undo(layout, step.setting, force=True)
        if step.serves:
            manager_of(layout).stop()
            await_answer(layout, manager_of(layout), note)
        what = f"{step.setting} could not be set, and is undone: {error}"
        cause = error.report["cause"] if isinstance(error, AgentError) else ""
        raise AgentError(
            "step", what, "\n".join([cause, *stuck]).strip(), "mend that, then run the same command"
        ) from error


def _apply(layout: Layout, setting: str, changes: Sequence[Json]) -> None:
    record = SettingsJournal(layout)
    known = {(each["kind"], each["place"]): each["new"] for each in record.in_force().get(setting, [])}
    for change in changes:
        read, put = KINDS[change["kind"]]
        for place in _places(change):
            now = read(place)
            wanted = _wanted(change, now)
            if now == wanted:
                continue
            if known.get((change["kind"], place), ...) != wanted:
                record.add("change", setting=setting, kind=change["kind"], place=place, old=now, new=wanted)
            put(place, wanted)


def undo_settings(layout: Layout, step: Unset, note: Note) -> None:
    """Undo settings, last change first.

    Places edited since are kept and raise AgentError, unless `overwrite` is set.
    """
    if step.serves:
        _stop(layout, step, note)
    stuck = [each for name in step.settings for each in _undo(layout, name, force=step.overwrite)]
    if step.serves:
        await_answer(layout, manager_of(layout), note)
    if stuck:
        hint = "look at them; --force puts back what was there before Hearth, too"
        raise AgentError(
            "changed", f"{len(stuck)} things were changed since, and are left as they are", "\n".join(stuck), hint
        )


def _undo(layout: Layout, setting: str, *, force: bool) -> list[str]:
    record = SettingsJournal(layout)
    stuck: list[str] = []
    for change in reversed(record.in_force().get(setting, [])):
        read, put = KINDS[change["kind"]]
        told = {key: change[key] for key in ("setting", "kind", "place")}
        try:
            now = read(change["place"])
            # A unit's state is not an edit: it may have crashed.
            if now not in (change["old"], change["new"]) and change["kind"] != "unit" and not force:
                stuck.append(f"{change['place']}: {_edited(now, change['new'])}")
                continue
            if now != change["old"]:
                put(change["place"], change["old"])
        except FileNotFoundError:
            pass  # a CPU or device that no longer exists
        except (AgentError, OSError) as error:
            stuck.append(f"{change['place']}: {error}")
            continue
        record.add("undone", **told)
    return stuck


def _edited(now: Any, new: Any) -> str:
    return "gone" if now is None else f"{now}, Hearth set {new}" if isinstance(new, str) else "edited"


def _stop(layout: Layout, step: Set | Unset, note: Note) -> None:
    manager = manager_of(layout)
    await_jobs(layout, manager, step, note)
    manager.stop()


# --- access to the GPU ---------------------------------------------------------------------------------------------


def access(layout: Layout, request: Json) -> Access:
    """Return the GPU's device files, which `users` may not use each, and the settings that control access."""
    people = {name: _groups(name) for name in request["users"]}
    nodes: list[Node] = []
    for place in [*_glob("/dev/nvidia*"), *_glob("/dev/dri/render*")]:
        status = Path(place).stat()
        if not stat.S_ISCHR(status.st_mode):
            continue
        group = _group(status.st_gid)
        denied = tuple(name for name, groups in people.items() if not _may(status, name, groups))
        nodes.append(Node(place, stat.S_IMODE(status.st_mode), _user(status.st_uid), group, denied))
    params = {}
    with suppress(OSError):
        lines = Path("/proc/driver/nvidia/params").read_text().splitlines()
        split = (line.partition(": ") for line in lines)
        params = {
            name: value for name, _, value in split if name.startswith("DeviceFile") or name == "ModifyDeviceFiles"
        }
    rules: list[Rule] = []
    for folder in ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"):
        if Path(folder).resolve() in {Path(each.file).parent for each in rules}:
            continue  # /lib links to /usr/lib
        for path in sorted(Path(folder).resolve().glob("*.rules")):
            rules += [
                Rule(str(path), line.strip()[:200])
                for line in path.read_text(errors="replace").splitlines()
                if not line.lstrip().startswith("#") and re.search(r"nvidia|renderD|0x10de", line)
            ]
    return Access(tuple(nodes), params, tuple(rules), people)


def _groups(user: str) -> tuple[str, ...] | None:
    """Return a user's groups; None if the user does not exist."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return None
    return tuple(sorted(_group(each) for each in os.getgrouplist(user, entry.pw_gid)))


def _may(status: os.stat_result, user: str, groups: tuple[str, ...] | None) -> bool:
    """Return whether a user may read and write a device by its mode (ACLs are ignored)."""
    if groups is None:
        return False
    if _user(status.st_uid) == user:
        return status.st_mode & 0o600 == 0o600
    shift = 3 if _group(status.st_gid) in groups else 0
    return (status.st_mode >> shift) & 0o6 == 0o6


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
