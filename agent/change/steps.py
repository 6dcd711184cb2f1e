"""The steps of a plan, by their kind. Each may have been cut short before, and is done again then."""

from __future__ import annotations

import csv
import grp
import itertools
import json
import os
import pwd
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent.files import (
    INDEX,
    Fault,
    Json,
    branches,
    copy,
    discard,
    free,
    inherited,
    inside,
    link,
    opened,
    os_fault,
    read,
    read_text,
    remove,
    run,
    sha256,
    sync,
    tree,
    write,
)
from agent.install import prune as prune_agents
from agent.journal import history
from agent.layout import DATA, SHARED, SHARING, UNUSED, Site, shared
from agent.look.facts import sudoers
from agent.parts import as_service, contents, part
from agent.serve.health import gate
from agent.serve.sandbox import confined_to, sandboxed
from agent.serve.services import UNITS, dies_with_parent, manager_of


def account(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Create the system users, each with its group, that units run as, and the group of the service's members."""
    run(["groupadd", "--force", "--system", site.group])
    for user in filter(None, (site.user, site.exporter)):
        with suppress(KeyError):
            pwd.getpwnam(user)
            note(f"{user} is there")
            continue
        home = str(site.data) if user == site.user else "/nonexistent"
        run(["useradd", "--system", "--user-group", "--home-dir", home, "--shell", "/usr/sbin/nologin", user])


def members(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Put the named users, and only them, into the members' group, and nobody into the service's own."""
    run(["groupadd", "--force", "--system", site.group])
    run(["gpasswd", "--members", ",".join(step["members"]), site.group])
    with suppress(KeyError):
        if grp.getgrnam(site.user).gr_mem:
            run(["gpasswd", "--members", "", site.user])


def rights(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Write what members may do by sudo; a file that sudo would not take is never put there: it would lock all out."""
    place = sudoers(site)
    if not step["text"]:
        discard(place)
        return
    draft = site.state / "sudoers"
    write(draft, step["text"], 0o440)
    run(["visudo", "--check", "--strict", f"--file={draft}"])
    draft.unlink()
    write(place, step["text"], 0o440)


def mount(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Mount a file system by a unit of its own, now and at boot; an encrypted volume's, whenever it is opened."""
    path, unit = Path(step["path"]), site.mounts[step["path"]]
    mounted = os.path.ismount(path)
    path.mkdir(parents=True, exist_ok=True)
    if not mounted and any(os.scandir(path)):
        hint = f"move them away first: ls {path}"
        raise Fault("step", f"there are files in {path} itself, which the mount would hide", "", hint)
    write(UNITS / unit, step["text"])
    link(UNITS / "multi-user.target.wants" / unit, f"../{unit}")
    if step["what"].startswith("/dev/"):
        device = run(["systemd-escape", "--path", "--suffix=device", step["what"]]).strip()
        link(UNITS / f"{device}.wants" / unit, f"../{unit}")
    run(["systemctl", "daemon-reload"])
    done = subprocess.run(["systemctl", "reload" if mounted else "start", unit], capture_output=True, text=True)
    if done.returncode:
        tail = run(["journalctl", "--no-pager", "--output=cat", "--lines=5", f"--unit={unit}"])
        hint = "look whether the server or device answers, then run the same command again"
        raise Fault("step", f"{step['what']} cannot be mounted at {path}", tail.strip() or done.stderr.strip(), hint)


def linger(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Let the login's systemd run without a session, from boot on; where that is not allowed, Hearth supervises."""
    write(site.lingered, "")
    done = subprocess.run(["loginctl", "enable-linger"], capture_output=True, text=True)
    if done.returncode:
        discard(site.lingered)
        note(f"loginctl enable-linger: {done.stderr.strip()}: ComfyUI is supervised by Hearth instead")


def folders(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Lay the prefix out. Folders that are there, mounts or links, stay where they are, with what is in them."""
    for folder in (site.parts, site.releases, site.state, site.incoming):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in (site.data, *map(Path, site.elsewhere.values())):
        if folder.exists() or folder.is_symlink():
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        # Others may write in the folder above, and have put a link, or another folder, in the place of the new one.
        place = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(place).st_uid != os.geteuid() or os.listdir(place):  # noqa: PTH208
                raise Fault("step", f"{fresh} was replaced while it was being made", "look who may write there")
            os.fchown(place, *site.sharing())
            os.fchmod(place, 0o750 if site.user and not site.public else 0o755)
        finally:
            os.close(place)
        fresh.rename(folder)
        sync(folder.parent)
    group = site.sharing()[1]
    mode = (0o2755 if site.public else 0o2750) if site.user else 0
    whole = as_service(site, _share, site.data, list(site.elsewhere.values()), group, mode, sharing=True)
    if not whole:
        note(f"there is so much in {site.data} that not all of it is given to the members yet: inv deploy goes on")
    _lay_out_unused(site)


def _lay_out_unused(site: Site) -> None:
    """Make the folder that nothing is loaded from, root's and read-only; one with something in it is left, and told."""
    with suppress(OSError), opened(Path(os.path.realpath(site.data))) as data:
        with suppress(OSError):
            os.rmdir(UNUSED, dir_fd=data)
        os.mkdir(UNUSED, 0o555, dir_fd=data)
        # through a descriptor: by now the service may have put a link there
        place = os.open(UNUSED, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=data)
        os.fchmod(place, 0o555)
        os.close(place)


SHARE_SECONDS = 300
"""For giving folders to the members: a tree that the service made without an end must not keep a deploy from ending."""


def _share(data: Path, elsewhere: list[str], group: int, mode: int) -> bool:
    """Make the folders of the data, and let the group change what lies in those of people; whether all is done.

    `mode` is the data's own, 0 where it stays as it is: without root there are no members.
    """
    end = time.monotonic() + SHARE_SECONDS
    for name in (*DATA, *SHARED):
        if not (data / name).is_symlink():
            (data / name).mkdir(exist_ok=True)
    sync(data)
    above = {"", *(os.path.dirname(each) for each in SHARED)}  # noqa: PTH120  names, not paths
    for root in (data, *map(Path, elsewhere)) if mode else ():
        for name, place in branches(root):
            if time.monotonic() > end:
                return False
            try:
                status = place.stat()
                if status.st_uid != os.geteuid():  # another's is another's affair
                    continue
                if root == data and not any(name.startswith(f"{each}/") for each in SHARED):
                    os.chown(place, -1, group if name.rstrip("/") in above else os.getegid())
                    place.chmod(mode if name.rstrip("/") in above else status.st_mode & 0o705)
                    with suppress(OSError):  # an older Hearth's, by which members could change all that came later
                        os.removexattr(place, SHARING)
                    continue
                if status.st_gid != group:
                    _give_to(place, group)
                wanted = status.st_mode | 0o2770
                place.chmod(wanted)
                with suppress(OSError):  # NFS 4 has lists of another kind
                    os.setxattr(place, SHARING, shared(wanted, os.geteuid()))
            except FileNotFoundError:  # something in it is gone by now
                pass
    return True


def _give_to(folder: Path, group: int) -> None:
    """Give a folder and the files in it to a group, as far as they are ours."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                os.chown(entry.path, -1, group, follow_symlinks=False)
    os.chown(folder, -1, group)


def receive_blob(site: Site, digest: str) -> Path:
    """A blob that the client sent; raises Fault when it is not there whole."""
    path = site.incoming / digest
    if not path.exists() or sha256(path) != digest:
        path.unlink(missing_ok=True)
        raise Fault("step", f"what was sent is damaged: {digest[:12]}", "", "run the same command again")
    return path


def tool(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Put the pinned uv where the steps find it."""
    place = site.state / "tools" / step["name"]
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = receive_blob(site, step["blob"])
        blob.chmod(0o755)  # the copy has its mode
        copy(blob, place)


def app(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Make the application's tree, or another one that is only unpacked and compiled."""
    with part(site, step["part"]) as place:
        _unpack(site, step, place)
        run(_compileall(site, step, place))
        _corners(site, step, place)


def _unpack(site: Site, step: Json, place: Path) -> None:
    """Fill a part with a tree: what was sent, and the rest from parts that have those very files."""
    with tarfile.open(receive_blob(site, step["blob"])) as archive:
        archive.extractall(place)  # the client's own archive, checked by hash; 3.10 may lack the filters
    for name, source in step["reuse"].items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(site.parts / source, place / name)
        (place / name).chmod(0o755 if (site.parts / source).stat().st_mode & 0o100 else 0o644)
    for path in tree(place):
        path.chmod(0o755)
    if contents(place) != step["files"]:
        raise Fault("step", f"the tree of {step['part']} is not the one that was planned", "a part was changed")


def node(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Make a custom node's tree."""
    with part(site, step["part"]) as place:
        _unpack(site, step, place)
        if step["install"]:
            _install(site, step, place, note)
        with suppress(Fault):  # some have files that no Python parses; ComfyUI tells which nodes cannot be imported
            run(_compileall(site, step, place))
        _corners(site, step, place)


def _corners(site: Site, step: Json, place: Path) -> None:
    """Make what a tree writes links into the data, seeded once with what it came with."""
    for name in step["writable"]:
        own, kept = place / name.rstrip("/"), f"{step['keeps']}/{name.rstrip('/')}"
        as_service(site, _seed, own, site.data, kept, name.endswith("/"))
        remove(own)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(site.data / kept)


def _seed(source: Path, data: Path, name: str, folder: bool) -> None:
    """Give the data what a node came with, or an empty folder; a file that it did not come with is left to the node.

    No link below the data is followed: the unit keeps the service from where it leads, and this is outside of it.
    """
    parent, _, last = name.rpartition("/")
    with inside(data, parent, make=True) as here:
        place, fresh = here / last, here / f".{last}.{os.getpid()}"
        if os.path.lexists(place):
            return
        remove(fresh)  # a killed run may have had this number, too
        if source.is_dir():
            shutil.copytree(source, fresh, copy_function=shutil.copyfile)
        elif folder:
            fresh.mkdir()
        elif source.exists():
            shutil.copyfile(source, fresh)
        else:
            return
        os.sync()  # once it is there it is trusted, also after a power cut
        fresh.rename(place)


INSTALL_SECONDS = 1800
"""For an install.py, which may download models."""

# Runs in the sandbox: a copy of the tree, its install.py, and what there is then, on standard output (`taken_over`).
_INSTALLER = """
import os, shutil, stat, struct, subprocess, sys
source, place, python = sys.argv[1:]
shutil.copytree(source, place)
done = subprocess.run([python, "install.py"], cwd=place, stdin=subprocess.DEVNULL, stdout=2)
if done.returncode:
    sys.exit(done.returncode % 256)
for folder, _, names in os.walk(os.fsencode(place)):
    for path in [os.path.join(folder, name) for name in names]:
        status = os.lstat(path)
        regular = stat.S_ISREG(status.st_mode)
        content = open(path, "rb").read() if regular else b""
        name = os.path.relpath(path, os.fsencode(place))
        kind = (2 if status.st_mode & 0o100 else 1) if regular else 0
        sys.stdout.buffer.write(struct.pack(">HIB", len(name), len(content), kind) + name + content)
sys.stdout.buffer.write(bytes(7))
"""


def _install(site: Site, step: Json, place: Path, note: Callable[[str], None]) -> None:
    """Run a node's install.py on a copy of its tree, as nobody else, and take over the regular files that it leaves."""
    scratch = site.state / "install"
    room = "/tmp" if site.scope == "system" else str(scratch)  # noqa: S108  its unit's own
    remove(scratch)
    scratch.mkdir(parents=True)
    environment = {**step["environment"], **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), room)}
    release = {"environment": environment, "confined": confined_to(scratch, site, step)}
    python = str(site.parts / step["install"] / "bin/python")
    argv = [step["python"], "-I", "-S", "-c", _INSTALLER, str(place), f"{room}/node", python]
    try:
        raw = sandboxed(
            site, step["unit"], argv, release, seconds=INSTALL_SECONDS, apart=True, network=bool(step["network"])
        )
        for inner in list(place.iterdir()):
            remove(inner)
        taken_over(raw, place, note)
    except Fault as fault:
        cause = fault.report["cause"] or fault.report["what"]
        fault.report |= {"what": f"the install.py failed: {step['title']}", "cause": cause}
        raise
    finally:
        remove(scratch)


TAKEN, DEEP = 100_000, 50
"""Files that an install.py may leave, and folders in each other."""


def taken_over(raw: bytes, place: Path, note: Callable[[str], None]) -> None:
    """Write the regular files of a tree that somebody else made into an empty folder; `note` what is left out.

    Each is a length of its name, one of its content, and a kind (0: no regular file, 2: an executable one), then name
    and content; a name without a length ends it. No archive's format: those are for parsers to get wrong. Raises Fault.
    """
    left: list[str] = []
    view, at = memoryview(raw), 0
    try:
        for number in itertools.count():
            length, size, kind = struct.unpack_from(">HIB", view, at)
            content = at + 7 + length
            name, at = os.fsdecode(bytes(view[at + 7 : content])), content + size
            if not name:
                break
            words = name.split("/")
            if at > len(raw) or number >= TAKEN or len(words) > DEEP or not {"", ".", ".."}.isdisjoint(words):
                raise ValueError(f"entry {number}, {name[:200]!r}")
            if not kind:
                left.append(name)
            elif "__pycache__" not in words:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                with (place / name).open("xb") as file:
                    file.write(view[content:at])
                (place / name).chmod(0o755 if kind == 2 else 0o644)
    except (struct.error, ValueError) as error:
        raise Fault("step", "what it left is no tree that can be taken over", str(error)) from error
    except OSError as error:
        raise os_fault(error, "what it left cannot be taken over") from error
    if left:
        note(f"not regular files, and left out: {', '.join(left[:10])}")


def _run_long(argv: list[str], env: dict[str, str] | None = None) -> None:
    """Run a program that a killed agent takes with it: what goes on from there makes the same part, or deletes all.

    Not for compileall, which ends in seconds: the workers of one that is killed would wait for it for ever.
    """
    run(argv, env, preexec_fn=dies_with_parent())


def _compileall(site: Site, step: Json, place: Path) -> list[str]:
    """The command that compiles the Python files in a part that is being made; their tracebacks name its final place.

    It runs none of them: the environment's own Python would run each .pth file of its packages, as root.
    """
    words = ["-I", "-S", "-m", "compileall", "-q", "-j", "0", "-s", str(place), "-p", str(site.parts / step["part"])]
    return [step["python"], *words, str(place)]


_NEVER_IMPORTED = ("tests", "test", "docs", "examples", "benchmarks")
"""Folders that packages leave beside their own by mistake, many of them the same ones."""


def _refuse_overwritten(environment: Path) -> None:
    """Raise Fault when two packages brought the same module with other contents: the one installed last has it."""
    owners: dict[str, tuple[str, str]] = {}
    for record in sorted(environment.glob("lib/python*/site-packages/*.dist-info/RECORD")):
        package = record.parent.name.partition("-")[0].replace("_", "-")
        with record.open(newline="") as file:
            for path, digest, _ in csv.reader(file):
                if path.partition("/")[0] in _NEVER_IMPORTED or not path.endswith((".py", ".so")):
                    continue
                other, held = owners.setdefault(path, (package, digest))
                if held != digest:
                    raise Fault(
                        "step",
                        f"{other} and {package} both bring {path}, and one has overwritten the other's",
                        "which one a node gets is chance",
                        f"decide which stays: [override.{package}] in nodes.toml, then inv lock",
                    )


_NO_NETWORK = "failed to fetch|error sending request|dns error|connection refused|network is unreachable|timed out"
_NO_NETWORK += "|network connectivity is disabled"
_UNTRUSTED = "invalid peer certificate|certificate verify failed"


def _configured(python: str) -> dict[str, str]:
    """The indexes and certificates of the system's and the login's uv.toml, as uv's variables for them.

    A system service has no other way to be told. `python` reads the files: the agent's own may be too old for that.
    """
    code = "import json, sys, tomllib; print(json.dumps(tomllib.load(open(sys.argv[1], 'rb')), default=str))"
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found: dict[str, str] = {}
    for path in (Path("/etc/uv/uv.toml"), user / "uv/uv.toml"):
        with suppress(Fault, ValueError, LookupError, TypeError, AttributeError):  # a file that uv rejects says nothing
            found |= index_settings(json.loads(run([python, "-ISc", code, str(path)]))) if path.exists() else {}
    return found


def index_settings(said: Json) -> dict[str, str]:
    """What a uv.toml says of indexes and certificates, as variables. `core/tools.py` has the same for the client."""
    said = {**said, **said.get("pip", {})}
    names = ("index-url", "extra-index-url", "keyring-provider", "allow-insecure-host", "native-tls", "system-certs")
    variables = {name: f"UV_{name.upper().replace('-', '_').replace('ALLOW_', '')}" for name in names if said.get(name)}
    found = {
        variable: " ".join(said[name]) if isinstance(said[name], list) else str(said[name]).replace("True", "true")
        for name, variable in variables.items()
    }
    for each in said.get("index", []):
        if each.get("default"):
            found["UV_DEFAULT_INDEX"] = each["url"]
        elif not each.get("explicit"):
            named = f"{each['name']}={each['url']}" if "name" in each else each["url"]
            found["UV_INDEX"] = f"{found.get('UV_INDEX', '')} {named}".strip()
    return found


def env(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Make the virtual environment from the locked list and the kernel wheels, every file by its hash."""
    uv = str(site.state / "tools" / step["tool"])
    # uv links what it installs to its cache. In a shared one, others could change the files of a part.
    own_cache = str(site.state / "cache/uv")
    environment = {**_configured(step["python"]), **inherited(*INDEX)}
    environment |= {"UV_CACHE_DIR": own_cache, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    # uv syncs nothing: a power cut may leave files without content in the cache. A kill, in the same boot, does not.
    boot, used = read_text(Path("/proc/sys/kernel/random/boot_id")), site.state / "cache-in-use"
    if used.exists() and read_text(used) != boot:
        remove(site.state / "cache")
    write(used, boot)
    wheels = site.state / "wheels"
    wheels.mkdir(exist_ok=True)
    for wheel in step["wheels"]:
        if "/" in wheel["file"]:
            raise Fault("step", f"{wheel['file']} is no wheel's name", "its manifest was altered", "do not deploy it")
        link(wheels / wheel["file"], receive_blob(site, wheel["sha256"]))
    with part(site, step["part"]) as place:
        venv = ["--no-config", "venv", "--quiet", "--relocatable", "--no-project", "--python", step["python"]]
        _run_long([uv, *venv, str(place)], environment)
        listed = site.state / f"requirements-{os.getpid()}.txt"
        listed.write_text(step["requirements"])
        argv = [
            uv,
            "--no-config",
            "pip",
            "sync",
            "--quiet",
            "--python",
            f"{place}/bin/python",
            "--require-hashes",
            "--strict",
        ]
        argv += ["--only-binary", ":all:", "--find-links", str(wheels)]
        argv += ["--no-index"] if step["offline"] else []
        # A damaged part may have been linked from the cache, which is then damaged too.
        argv += ["--no-cache"] if step["repair"] else []
        try:
            _run_long([*argv, str(listed)], environment)
        except Fault as fault:
            if not step["offline"] and re.search(_UNTRUSTED, fault.report["cause"], re.IGNORECASE):
                what = "the host does not trust the certificate of the package index, or of a proxy before it"
                hint = "on the host: add the CA to the system's (update-ca-certificates), and system-certs = true to "
                hint += "/etc/uv/uv.toml; or deploy from a bundle, which needs no index (inv bundle)"
                raise Fault("step", what, fault.report["cause"], hint) from None
            if not step["offline"] and re.search(_NO_NETWORK, fault.report["cause"], re.IGNORECASE):
                raise Fault("offline", "the host cannot reach the package index", fault.report["cause"]) from None
            raise
        finally:
            listed.unlink()
        _refuse_overwritten(place)
        # Some packages ship templates and tests that no Python parses; what cannot be compiled is not imported.
        with suppress(Fault):
            run(_compileall(site, step, place))
    used.unlink()  # sealing the part has synced everything
    shutil.rmtree(wheels)


def release(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Write the release: its manifest, its files (the unit above all), and links to its parts."""
    manifest = step["release"]
    place = site.releases / manifest["id"]
    place.mkdir(parents=True, exist_ok=True)
    for kind, name in manifest["parts"].items():
        link(place / kind, f"../../{'../' * kind.count('/')}parts/{name}")
    for name, target in manifest["links"].items():
        link(place / name, target)
    for name in manifest.get("empty", ()):
        (place / name).mkdir(parents=True, exist_ok=True)
    for name, text in manifest["files"].items():
        write(place / name, text)
    if any(manifest.get(each) for each in ("develop", "free_memory", "confined")):  # what the release runs needs it
        link(place / "agent", os.path.relpath(site.agent.resolve(), place.resolve()))
    write(place / "release.json", json.dumps(manifest, indent=1))


def serve(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Run what is current: the unit in place, started at boot, started now and healthy."""
    manager = manager_of(site)
    manager.install()
    manager.start()
    current = site.release()
    gate(site, manager, site.manifest(current), note)


def prune(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Delete releases that are not kept, the parts and agents that only they needed, used blobs, and old journals."""
    current = site.release()
    for path in site.releases.glob("*"):
        if path.name not in (*step["keep"], current):
            remove(path)
    named = {part for path in site.releases.glob("*/release.json") for part in read(path)["parts"].values()}
    for path in site.parts.glob("*"):
        if path.name not in named:
            remove(path)
            if path.name.startswith("env-"):  # its packages lie in uv's cache too, several GB that nothing else needs
                shutil.rmtree(site.state / "cache", ignore_errors=True)
    plan = read(site.pending)
    used, old = json.dumps(plan), 24 * 3600  # in seconds; what is younger may be another client's for its next plan
    for path in site.incoming.glob("*"):
        with suppress(FileNotFoundError):
            needless = path.name.partition(".")[0] in used or abs(time.time() - path.stat().st_mtime) > old
            if needless and free(path):
                path.unlink()
    prune_agents(site)
    journals = {line["run"] for line in history(site)[-JOURNALS:]} | {plan.get("run")}
    for path in (site.state / "runs").glob("*.jsonl"):
        if path.stem not in journals:
            path.unlink()


JOURNALS = 50
"""So many of the last runs keep their journal; a line of every run stays in the history."""
