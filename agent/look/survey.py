"""Survey of ComfyUI installations that Hearth did not make. Reads files only; runs and changes nothing of theirs."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from agent.files import AgentError, Json, read_some, read_text
from agent.folders import LEVELS, branches, mounts, real
from agent.layout import Layout
from agent.look.ports import port_holder
from agent.parts import forked
from agent.processes import run
from agent.schema.survey import FileSystem, Folder, FoundNode, Installation, OldProcess, Survey, Unit
from agent.serve.systemd import UNITS, WRITTEN

FOLDERS = ("models", "input", "output", "user")


def survey(layout: Layout, path: str) -> Survey:
    """Return the installation at `path`, or all at the usual places if `path` is empty."""
    units, processes = _units(layout), all_processes()
    looked = [path] if path else _usual_places(layout, units, processes)
    found: dict[str, Installation] = {}
    for each in looked:
        with suppress(OSError):  # an unreadable home, or a symlink loop
            place = real(Path(each).expanduser())
            # Hearth's own trees contain a PART.json.
            if (place / "main.py").is_file() and (place / "comfy").is_dir() and not (place / "PART.json").exists():
                found[str(place)] = _installation(layout, place, units, processes)
    return Survey(tuple(looked), tuple(found.values()))


def _usual_places(layout: Layout, units: list[Json], processes: list[Json]) -> list[str]:
    """Return the folders of units and processes, and those in the guides of ComfyUI and comfy-cli."""
    homes = sorted({entry.pw_dir for entry in pwd.getpwall() if entry.pw_uid == 0 or 1000 <= entry.pw_uid < 65534})
    fixed = [str(layout.prefix / "ComfyUI"), str(layout.prefix), "/opt/comfyui/ComfyUI", "/opt/ComfyUI", "/opt/comfyui"]
    fixed += ["/srv/comfyui/ComfyUI", "/srv/ComfyUI", "/srv/comfyui"]
    fixed += [f"{home}/{each}" for home in homes for each in ("comfy/ComfyUI", "ComfyUI", "comfyui")]
    return list(dict.fromkeys([each["place"] for each in (*units, *processes) if each["place"]] + fixed))


def _installation(layout: Layout, place: Path, units: list[Json], processes: list[Json]) -> Installation:
    """Describe one installation."""
    own = [each for each in processes if each["place"] == str(place)]
    through = {each["unit"] for each in own} | {f"{layout.service}.service"}
    started = [each for each in units if each["place"] == str(place) or each["name"] in through]
    # Any user can run a main.py with any flags. Trust only processes of its owner or of a unit's user.
    owners = {place.stat().st_uid} | {uid for each in started if (uid := _uid(each["user"])) is not None}
    trusted = [each for each in own if _uid(each["user"]) in owners]
    argv: list[str] = next((each["argv"] for each in (*trusted, *started) if each["argv"]), [])
    base = Path(_flag(argv, "--base-directory") or place)
    folders = {}
    for name in FOLDERS:
        folder = base / name
        if given := _flag(argv, f"--{name}-directory"):
            folder = place / given
        folders[name] = _folder(folder, layout.data, owners)
    configs = [base / "extra_model_paths.yaml", place / "extra_model_paths.yaml"]
    configs += [place / argv[number + 1] for number, word in enumerate(argv[:-1]) if word == _MODEL_PATHS]
    version = re.search(
        r'^(?:__version__|version) *= *"([^"]+)"', read_text(place / "comfyui_version.py"), re.MULTILINE
    )
    return Installation(
        path=str(place),
        version=version[1] if version else "",
        **_repository(place),
        **_installed(place, [each["program"] for each in (*trusted, *started)]),
        owners=tuple(sorted(owners)),
        folders=folders,
        paths="\n".join(read_text(each) for each in dict.fromkeys(configs)),
        nodes=tuple(_nodes(base / "custom_nodes")),
        argv=tuple(argv),
        units=tuple(Unit(**{each.name: unit[each.name] for each in fields(Unit)}) for unit in started),
        processes=tuple(OldProcess(each["pid"], each["user"], each["unit"]) for each in own),
        holds_port=port_holder(layout.port).get("pid", -1) in [each["pid"] for each in own],
    )


def _uid(user: str) -> int | None:
    """Return the uid of a user name or decimal uid; None if the user does not exist."""
    with suppress(KeyError):
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    return None


_MODEL_PATHS = "--extra-model-paths-config"


def _flag(argv: list[str], name: str) -> str:
    """Return the value of a flag; empty if absent."""
    for number, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and number + 1 < len(argv):
            return argv[number + 1]
    return ""


def _units(layout: Layout) -> list[Json]:
    """Return units that mention ComfyUI and are not Hearth's, including units set aside by an adoption."""
    found: dict[str, Json] = {}
    known = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
    for folder in [*(Path(each, "systemd/system") for each in known), layout.state / "adopted"]:
        for path in sorted(folder.glob("*.service")):
            text = read_text(path)
            named = path.name == f"{layout.service}.service" or re.search(r"comfy|main\.py", text, re.IGNORECASE)
            if path.name in found or WRITTEN in text or not named:
                continue
            text += "\n".join(read_text(each) for each in sorted((UNITS / f"{path.name}.d").glob("*.conf")))
            values = dict(re.findall(r"^(\w+) *= *(.+)$", text.replace("\\\n", " "), re.MULTILINE))
            user, command = values.get("User", "root"), values.get("ExecStart", "").lstrip("@-:+!")
            place, argv = _started(command, values.get("WorkingDirectory", "/").lstrip("-"))
            place = os.path.expanduser(place.replace("~", f"~{user}", 1))  # noqa: PTH111  Path fails on unknown users
            with suppress(OSError):
                place = place and str(real(place))
            shown: dict[str, str] = {}
            if Path("/run/systemd/system").is_dir():
                ask = ["systemctl", "show", path.name, "--property=ActiveState,UnitFileState"]
                lines = subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()
                shown = dict(line.partition("=")[::2] for line in lines)
            found[path.name] = {
                "name": path.name,
                "path": str(path),
                "aside": folder == layout.state / "adopted",
                "place": place,
                "argv": argv,
                "program": command.split(" ")[0],
                "user": user,
                "variables": sorted(set(re.findall(r'^Environment *= *"?(\w+)=', text, re.MULTILINE))),
                "active": shown.get("ActiveState") in ("active", "activating", "reloading"),
                "enabled": shown.get("UnitFileState", "").startswith("enabled"),
            }
    return list(found.values())


def _started(command: str, folder: str, depth: int = 0) -> tuple[str, list[str]]:
    """Return the folder and flags of the ComfyUI that a command starts; read referenced scripts, up to 3 levels."""
    for words in _commands(command):
        if words[0] == "cd" and len(words) > 1:
            folder = str(Path(folder, words[1]))
        for number, word in enumerate(words):
            if word.endswith("main.py"):
                return str(Path(folder, word).parent), _plain(words[number + 1 :])
            if word == "launch" and "comfy" in [Path(each).name for each in words[:number]]:  # comfy-cli's
                workspace = [each.partition("=")[2] for each in words if each.startswith("--workspace=")]
                after = words.index("--") + 1 if "--" in words else len(words)
                return (workspace or ["~/comfy/ComfyUI"])[0], _plain(words[after:])
            inner = word if " " in word else read_text(Path(folder, word)) if "/" in word else ""
            if depth < 3 and (inner == word or inner.startswith("#!")):
                place, argv = _started(inner, folder, depth + 1)
                if place:
                    return place, argv
    return "", []


def _commands(text: str) -> list[list[str]]:
    """Split a shell script into commands as word lists; skip lines with invalid quoting."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        with suppress(ValueError):
            found.append([])
            for word in shlex.split(line, comments=True):
                found[-1] += [word.rstrip(";")] if word not in ("&&", "||", ";") else []
                if word.endswith(("&&", "||", ";")):
                    found.append([])
    return [words for words in found if words]


def _plain(words: list[str]) -> list[str]:
    """Return the words up to a redirection or pipe, without shell variables."""
    end = next((number for number, word in enumerate(words) if re.match(r"[0-9]?[<>|&]", word)), len(words))
    return [word for word in words[:end] if not word.startswith("$")]


def all_processes() -> list[Json]:
    """Return the processes that run a main.py, each with its folder and system unit."""
    found: list[Json] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, KeyError):
            words = read_some(folder / "cmdline", 32_768).decode(errors="replace").split("\0")[:-1]
            number = next((number for number, word in enumerate(words) if word.endswith("main.py")), 0)
            if not number:
                continue
            unit = re.search(r"/system\.slice/([^/\n]+\.service)", read_text(folder / "cgroup"))
            place = real((folder / "cwd").readlink() / words[number])
            found.append(
                {
                    "pid": int(folder.name),
                    "user": pwd.getpwuid(folder.stat().st_uid).pw_name,
                    "place": str(place.parent),
                    "program": words[0],
                    "argv": words[number + 1 :],
                    "unit": unit[1] if unit else "",
                }
            )
    return found


def _installed(place: Path, programs: list[str]) -> Json:
    """Return the versions of Python and torch in its environment, taken from folder names."""
    named = [Path(each).parent.parent for each in programs if each.startswith("/")]
    for environment in (*named, place / ".venv", place / "venv", place.parent / "venv", place.parent / ".venv"):
        for packages in environment.glob("lib/python3*/site-packages"):
            torch = [each.name[6:-10] for each in packages.glob("torch-*.dist-info")]
            return {"python": packages.parent.name[6:], "torch": (torch or [""])[0], "environment": str(environment)}
    return {"python": "", "torch": "", "environment": ""}


_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/usr")
_SHARED = ("/", "/home", "/media", "/mnt", "/opt", "/srv", "/tmp", "/var", "/var/lib", "/var/tmp")  # noqa: S108


def _foreign(folder: Path, owners: set[int]) -> str:
    """Return the reason why a folder must not be adopted; empty if it may be."""
    homes = {entry.pw_dir for entry in pwd.getpwall()}
    if str(folder) in (*_SHARED, *_SYSTEM, *homes) or str(folder).startswith(tuple(f"{each}/" for each in _SYSTEM)):
        return "it is a system folder or a user's home"
    owner = folder.stat().st_uid
    return "" if owner in owners else f"it belongs to user {owner}, who neither owns nor runs this ComfyUI"


def _folder(place: Path, data: Path, owners: set[int]) -> Folder:
    """Describe a folder of ComfyUI. Skip counting link targets and mounts: they may be network file systems."""
    folder = real(place)
    kind = "link" if place.is_symlink() else "folder" if place.is_dir() else "missing"
    found = Folder(str(place), str(folder), kind)
    if not folder.is_dir():
        return found
    if why := _foreign(folder, owners):
        return replace(found, foreign=why)
    listed = [FileSystem(**each) for each in mounts()]
    mount = _mount_of(folder, listed)
    status = folder.stat()
    owner, people = "", list[str]()
    with suppress(KeyError):
        owner = pwd.getpwuid(status.st_uid).pw_name
        people = [owner] if status.st_uid >= 1000 else []
        people += grp.getgrgid(status.st_gid).gr_mem
    inner = tuple(each for each in listed if each.point.startswith(f"{folder}/"))
    found = replace(found, owner=owner, people=tuple(people), mount=mount, mounts=inner)
    if kind != "folder" or mount.point == str(folder) or inner:
        return found
    there = next(path for path in (data, *data.parents) if path.exists()).resolve()
    found = replace(_counted(found), rename=mount == _mount_of(there, listed) and status.st_dev == there.stat().st_dev)
    far = (_mount_of(Path(each), listed) for each in found.links.values() if each.startswith("/"))
    return replace(found, mounts=tuple(each for each in {each.point: each for each in far}.values() if each != mount))


COUNT_SECONDS = 120
"""Time limit for counting a folder's files: about 60,000 per second."""


def _counted(found: Folder) -> Folder:
    """Count the folder's files and list its links; `foreign` is set if it is too deep or counting takes too long."""
    end, folder, links = time.monotonic() + COUNT_SECONDS, found.real, dict[str, str]()
    files = size = 0

    def counted(foreign: str = "") -> Folder:
        return replace(found, files=files, bytes=size, links=links, foreign=foreign)

    for name, place in branches(Path(folder)):
        if name.count("/") == LEVELS:
            return counted(f"its folders are nested {LEVELS} deep: {folder}/{name}"[:1000])
        with os.scandir(place) as entries:
            for entry in entries:
                if time.monotonic() > end:
                    return counted(f"counting its files takes more than {COUNT_SECONDS} s: {folder}/{name}"[:1000])
                if not entry.is_dir(follow_symlinks=False):
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_size
                    if entry.is_symlink() and len(links) < 100:
                        links[f"{name}{entry.name}"] = str(Path(entry).readlink())
    return counted()


def _mount_of(path: Path, mounts: list[FileSystem]) -> FileSystem:
    """Return the mount that contains a path: the deepest mount point, and of several at one place the latest."""
    above = {str(each) for each in (path, *path.parents)}
    return max((each for each in reversed(mounts) if each.point in above), key=lambda each: len(each.point))


def _nodes(folder: Path) -> list[FoundNode]:
    """Return the custom nodes: trees with their origin, and single files."""
    found: list[FoundNode] = []
    for place in sorted([*folder.glob("*"), *folder.glob(".disabled/*")]):
        disabled = place.name.endswith(".disabled") or place.parent != folder
        name = place.name.removesuffix(".disabled")
        if place.is_dir() and not name.startswith((".", "__")):
            found.append(FoundNode(name, disabled, file=False, **_repository(place)))
        elif name.endswith(".py") and name != "websocket_image_save.py":  # shipped with ComfyUI
            found.append(FoundNode(name, disabled, file=True, url="", commit="", edited=None))
    return found


def _repository(place: Path) -> Json:
    """Return a tree's origin URL, commit, and edited files (None: unknown).

    Runs as the tree's owner: it may contain symlinks, and git does not guard against hostile repositories.
    """
    try:
        found = _as_owner(place, _read_repository, place)
        return {**found, "edited": None if found["edited"] is None else tuple(found["edited"])}
    except (OSError, AgentError):
        return {"url": "", "commit": "", "edited": None}


def _as_owner(place: Path, work: Callable[..., Json], *given: Any) -> Json:
    """As root, run `work` in a child process as the folder's owner; otherwise run it here. Raises like `forked`."""
    owner = place.stat().st_uid
    if os.geteuid() or not owner:
        return work(*given)

    def lowered() -> Json:
        group = 65534
        with suppress(KeyError):
            group = pwd.getpwuid(owner).pw_gid
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(owner, owner, owner)
        return work(*given)

    found: Json = forked(lowered, seconds=GIT_SECONDS + 5)()
    return found


def _read_repository(place: Path) -> Json:
    folder = place / ".git"
    if folder.is_file():
        folder = place / read_text(folder).partition("gitdir:")[2].strip()
    head = read_text(folder / "HEAD").strip()
    if head.startswith("ref: "):
        packed = [line.split() for line in read_text(folder / "packed-refs").splitlines()]
        head = read_text(folder / head[5:]).strip() or next((line[0] for line in packed if line[1:] == [head[5:]]), "")
    commit = head if re.fullmatch(r"[0-9a-f]{40}", head) else ""
    origin = re.search(r'^\[remote "origin"\][^\[]*?^\s*url\s*=\s*(\S+)', read_text(folder / "config"), re.MULTILINE)
    if not commit:  # installed from the node registry, without history
        origin = re.search(r'^Repository *= *"([^"]+)', read_text(place / "pyproject.toml"), re.MULTILINE)
    url = re.sub(r"(://)[^/@]*@", r"\1", origin[1]) if origin else ""  # remove credentials
    return {"url": url, "commit": commit, "edited": _edited(place, folder, commit) if commit else None}


GIT_SECONDS, INDEX = 60, 50_000_000
"""Time limit for `git status`, and maximum size of an index in bytes: 100,000 files take ten million."""


def _edited(place: Path, folder: Path, commit: str) -> list[str] | None:
    """Return the files of a working tree that differ from its commit; None if git is missing or fails.

    A repository's configuration can make git run programs, hooks and filters. So git gets a temporary folder with a
    copy of the index and the repository's object path, and reads no configuration.
    """
    index = read_some(folder / "index", INDEX + 1)
    if not shutil.which("git") or len(index) > INDEX:
        return None
    with tempfile.TemporaryDirectory(prefix="hearth-") as own:
        (Path(own) / "HEAD").write_text(f"{commit}\n")
        (Path(own) / "refs").mkdir()
        (Path(own) / "index").write_bytes(index)
        environment = {"PATH": os.environ.get("PATH", "/usr/bin"), "GIT_DIR": own, "GIT_WORK_TREE": str(place)}
        environment |= {"GIT_OBJECT_DIRECTORY": str(folder / "objects"), "GIT_OPTIONAL_LOCKS": "0"}
        environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
        words = ["git", "-c", "core.fsmonitor=false", "status", "--porcelain", "-z", "--untracked-files=no"]
        words += ["--ignore-submodules=all", "--no-renames"]
        try:
            output = run(words, environment, GIT_SECONDS, inherit=False, cwd=place)
        except AgentError:
            return None
    return [line[3:] for line in output.split("\0") if line]
