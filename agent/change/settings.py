"""System settings as drop-in files: written to apply a setting, deleted to undo it.

The folder of a file decides what else it changes, at once and at every boot:

    /etc/sysctl.d          kernel values (sysctl.d(5))
    /etc/tmpfiles.d        kernel files, and groups and modes of device files (tmpfiles.d(5), lines `w` and `z`)
    /etc/systemd/system    a unit, enabled and started
    /etc/containers/systemd    a drop-in file of a container

Deleting a file leaves the running kernel as it is, so the state of each place is recorded before its first change.
"""

from __future__ import annotations

import grp
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from agent.change.lifecycle import await_answer, await_jobs
from agent.files import AgentError, Note, discard, write
from agent.journal import SettingsJournal
from agent.layout import Layout
from agent.look.accounts import group_name
from agent.processes import run
from agent.schema.change import Set, Unset
from agent.schema.records import SettingChange
from agent.schema.requests import SettingsQuery
from agent.schema.settings import Applied, Seen, State
from agent.serve.managers import manager_of
from agent.serve.systemd import QUADLETS, UNITS

SYSCTL, TMPFILES = Path("/etc/sysctl.d"), Path("/etc/tmpfiles.d")

# --- places: their states are strings, or None for an absent file or group ----------------------------------------


def _read_file(place: str) -> str | None:
    path = Path(place)
    return path.read_text(errors="surrogateescape") if os.path.lexists(path) else None


def _write_file(place: str, text: str | None) -> None:
    path = Path(place)
    changed = text is not None and path.exists()
    if text is None:
        discard(path)
        with suppress(OSError):  # the drop-in folder of a unit has other files or is missing
            if path.parent.name.endswith((".service.d", ".container.d")):
                path.parent.rmdir()
    else:
        write(path, text.encode(errors="surrogateescape"))
    if {UNITS, QUADLETS} & {*path.parents}:
        run(["systemctl", "daemon-reload"])
        if changed and path.parent == UNITS:
            subprocess.run(["systemctl", "reset-failed", path.name], capture_output=True)  # our starts must not count
            run(["systemctl", "try-restart", path.name])
    elif path.parent == Path("/etc/udev/rules.d") and shutil.which("udevadm"):
        run(["udevadm", "control", "--reload"])
        run(["udevadm", "trigger", "--action=change", "--subsystem-match=drm"])


def _read_value(place: str) -> str:
    text = Path(place).read_text().strip()
    chosen = re.search(r"\[(.+?)\]", text)  # /sys/kernel/mm/transparent_hugepage/enabled: always [madvise] never
    return chosen[1] if chosen else text


def _write_value(place: str, value: str | None) -> None:
    with Path(place).open("w") as file:  # in place: not a regular file
        file.write(value or "")


def _read_device(place: str) -> str:
    status = Path(place).stat()
    return f"{stat.S_IMODE(status.st_mode):04o} {group_name(status.st_gid)}"


def _write_device(place: str, value: str | None) -> None:
    mode, group = (value or "").split()
    shutil.chown(place, group=int(group) if group.isdecimal() else group)
    Path(place).chmod(int(mode, 8))


def _read_group(name: str) -> str | None:
    with suppress(KeyError):
        return ",".join(sorted(grp.getgrnam(name).gr_mem))
    return None


def _write_group(name: str, members: str | None) -> None:
    known = _read_group(name) is not None
    if members is None:
        if known:
            run(["groupdel", name])
        return
    if not known:
        run(["groupadd", "--system", name])
    run(["gpasswd", "--members", members, name])


def _read_unit(name: str) -> str:
    asked = ("is-enabled", "is-active")
    enabled, active = (subprocess.run(["systemctl", each, "--quiet", name]).returncode == 0 for each in asked)
    return "on" if enabled and active else "failed" if enabled or active else "off"


def _write_unit(name: str, wanted: str | None) -> None:
    subprocess.run(["systemctl", "reset-failed", name], capture_output=True)
    run(["systemctl", "enable" if wanted == "on" else "disable", "--now", name])


KINDS: dict[str, tuple[Callable[[str], str | None], Callable[[str, str | None], None]]] = {
    "file": (_read_file, _write_file),
    "value": (_read_value, _write_value),
    "device": (_read_device, _write_device),
    "group": (_read_group, _write_group),
    "unit": (_read_unit, _write_unit),
}


def _changes(files: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, str]]:
    """Yield kind, place and wanted state of all that a setting changes. A file may contain `@gid:GROUP@`."""
    for group, members in groups.items():
        now = _read_group(group)
        yield "group", group, ",".join(sorted({*(now.split(",") if now else []), *members}))
    for file, text in files.items():
        with suppress(KeyError):
            text = re.sub("@gid:(.+?)@", lambda found: str(grp.getgrnam(found[1]).gr_gid), text)
        yield "file", file, text
        path = Path(file)
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        if path.parent == SYSCTL:
            for key, _, setting in (line.partition(" = ") for line in lines):
                yield "value", f"/proc/sys/{key.replace('.', '/')}", setting
        elif path.parent == TMPFILES:
            for kind, pattern, mode, _, group, _, *value in map(str.split, lines):
                for place in sorted(map(str, Path("/").glob(pattern.lstrip("/")))):
                    yield ("value", place, " ".join(value)) if kind == "w" else ("device", place, f"{mode} {group}")
        elif path.parent == UNITS:
            yield "unit", path.name, "on"


def seen(files: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> tuple[Seen, ...]:
    """Return the state of every place that a setting changes."""
    found: list[Seen] = []
    for kind, place, wanted in _changes(files, groups):
        with suppress(OSError):
            now = KINDS[kind][0](place)
            found.append(Seen(kind, place, now, wanted, kind != "value" or os.access(place, os.W_OK)))
    return tuple(found)


def look(layout: Layout, asked: SettingsQuery) -> State:
    """Return the changes in force and the state of the requested `settings`, by name."""
    applied = {
        name: tuple(Applied(each.kind, each.place, each.old, each.new) for each in listed)
        for name, listed in SettingsJournal(layout).in_force().items()
    }
    return State(applied, {name: seen(each.files, each.groups) for name, each in asked.settings.items()})


# --- steps ---------------------------------------------------------------------------------------------------------


def apply_setting(layout: Layout, step: Set, note: Note) -> None:
    """Apply a setting; with `serves`, stop ComfyUI first and start it afterwards.

    Undoes the whole setting and raises AgentError if a change fails or ComfyUI does not respond.
    """
    if step.serves:
        _stop(layout, step, note)
    try:
        _apply(layout, step)
        if step.serves:
            await_answer(layout, manager_of(layout), note)
    except (AgentError, OSError) as error:
        failed = _undo(layout, step.setting, force=True)
        if step.serves:
            manager_of(layout).stop()
            await_answer(layout, manager_of(layout), note)
        what = f"{step.setting} could not be set and was undone: {error}"
        cause = error.report["cause"] if isinstance(error, AgentError) else ""
        hint = "fix the cause, then run the same command"
        raise AgentError("step", what, "\n".join([cause, *failed]).strip(), hint) from error


def _apply(layout: Layout, step: Set) -> None:
    record = SettingsJournal(layout)
    known = {(each.kind, each.place): each.new for each in record.in_force().get(step.setting, [])}
    for kind, place, wanted in _changes(step.files, step.groups):
        read, put = KINDS[kind]
        now = read(place)
        if now == wanted:
            continue
        if known.get((kind, place)) != wanted:
            record.add(SettingChange(kind, place, now, wanted, step.setting))
        put(place, wanted)


def undo_settings(layout: Layout, step: Unset, note: Note) -> None:
    """Undo settings, last change first.

    Places edited since are kept and raise AgentError, unless `overwrite` is set.
    """
    if step.serves:
        _stop(layout, step, note)
    kept = [each for name in step.settings for each in _undo(layout, name, force=step.overwrite)]
    if step.serves:
        await_answer(layout, manager_of(layout), note)
    if kept:
        what = "some changes were not undone, since others changed the same places later"
        raise AgentError("changed", what, "\n".join(kept), "check them; --force restores the state before Hearth")


def _undo(layout: Layout, setting: str, *, force: bool) -> list[str]:
    """Undo the changes of a setting; return those that were kept, with reasons."""
    record = SettingsJournal(layout)
    kept: list[str] = []
    for change in reversed(record.in_force().get(setting, [])):
        kind, place, old, new = change.kind, change.place, change.old, change.new
        read, put = KINDS[kind]
        try:
            now = read(place)
            # A unit's state is not an edit: it may have crashed.
            if now not in (old, new) and kind != "unit" and not force:
                kept.append(f"{place}: {_edited(kind, now, new)}")
                continue
            if now != old:
                put(place, old)
        except FileNotFoundError:
            pass  # a CPU or device that no longer exists
        except (AgentError, OSError) as error:
            kept.append(f"{place}: {error}")
            continue
        record.add(SettingChange(kind, place, setting=setting, event="undone"))
    return kept


def _edited(kind: str, now: str | None, new: str) -> str:
    return "deleted" if now is None else "edited" if kind == "file" else f"{now}, Hearth set {new}"


def _stop(layout: Layout, step: Set | Unset, note: Note) -> None:
    manager = manager_of(layout)
    await_jobs(layout, manager, step, note)
    manager.stop()
