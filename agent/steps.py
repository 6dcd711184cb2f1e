"""The steps of a plan, by their kind. Each may have been cut short before, and is done again then."""

from __future__ import annotations

import csv
import errno
import json
import os
import pwd
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent.comfyui import gate
from agent.facts import sudoers
from agent.files import (
    INDEX,
    Fault,
    Json,
    copy,
    discard,
    free,
    inherited,
    link,
    own,
    read,
    read_text,
    remove,
    run,
    sha256,
    sync,
    tree,
    write,
)
from agent.journal import history
from agent.parts import as_service, contents, part
from agent.services import UNITS, manager_of
from agent.site import DATA, SHARED, SHARING, Site


def account(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Create the system user, with its group, that the service runs as."""
    with suppress(KeyError):
        pwd.getpwnam(site.user)
        note(f"{site.user} is there")
        return
    home = str(site.data)
    run(["useradd", "--system", "--user-group", "--home-dir", home, "--shell", "/usr/sbin/nologin", site.user])


def members(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Put the named users, and only them, into the service's group."""
    run(["gpasswd", "--members", ",".join(step["members"]), site.user])


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
            os.fchown(place, *site.owner())
            os.fchmod(place, 0o755)
        finally:
            os.close(place)
        fresh.rename(folder)
        sync(folder.parent)
    as_service(site, _share, site.data, list(site.elsewhere.values()))


def _share(data: Path, elsewhere: list[str]) -> None:
    """Make the folders of the data, and let the group change whatever lies in them and elsewhere."""
    for name in DATA:
        if not (data / name).is_symlink():
            (data / name).mkdir(exist_ok=True)
    sync(data)
    for root in (str(data), *elsewhere):
        for place in tree(Path(root)):
            try:
                if place.stat().st_uid == os.geteuid():  # another's is another's affair
                    place.chmod(place.stat().st_mode | 0o2770)
                    with suppress(OSError):  # NFS 4 has lists of another kind
                        os.setxattr(place, SHARING, SHARED)
            except OSError as error:  # gone by now, or so deep that no path leads to it
                if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
                    raise


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
        run([step["python"], *_compileall(site, step, place), str(place)])
        _corners(site, step, place)


def _unpack(site: Site, step: Json, place: Path) -> None:
    """Fill a part with a tree: what was sent, and the rest from parts that have those very files."""
    with tarfile.open(receive_blob(site, step["blob"])) as archive:
        archive.extractall(place)  # the client's own archive, checked by hash; 3.10 may lack the filters
    for name, source in step["reuse"].items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(site.parts / source, place / name)
    for path, _, _ in os.walk(place):
        Path(path).chmod(0o755)
    if contents(place) != step["files"]:
        raise Fault("step", f"the tree of {step['part']} is not the one that was planned", "a part was changed")


def node(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Make a custom node's tree."""
    with part(site, step["part"]) as place:
        _unpack(site, step, place)
        # Some nodes carry files that no Python parses; ComfyUI tells which nodes cannot be imported.
        subprocess.run([step["python"], *_compileall(site, step, place), str(place)], capture_output=True)
        if step["install"]:
            _install(site, step, place)
        _corners(site, step, place)


def _corners(site: Site, step: Json, place: Path) -> None:
    """Make what a tree writes links into the data, seeded once with what it came with."""
    for name in step["writable"]:
        inside, kept = place / name.rstrip("/"), site.data / step["keeps"] / name.rstrip("/")
        if not Path(os.path.realpath(inside.parent)).is_relative_to(os.path.realpath(place)):
            cause = "the node's install.py has put a link there"
            raise Fault(
                "step", f"{name} of {step['part']} lies outside of it", cause, "remove the node, or its install.py"
            )
        as_service(site, _seed, inside, kept, name.endswith("/"))
        remove(inside)
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.symlink_to(kept)


def _seed(source: Path, place: Path, folder: bool) -> None:
    """Give the data what a node came with, or an empty folder; a file that it did not come with is left to the node."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
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


def _install(site: Site, step: Json, place: Path) -> None:
    """Run a node's install.py as whom the service runs as, in the tree that is being made."""
    user, group = site.owner()
    if site.user:
        own(place, user, group)
    python = site.parts / step["install"] / "bin/python"
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}  # nothing of whoever deploys
    environment |= {"HOME": str(site.data / "cache"), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}
    who: Json = {"user": user, "group": group, "extra_groups": []} if site.user else {}
    try:
        run([str(python), "install.py"], environment, INSTALL_SECONDS, inherit=False, cwd=place, **who)
    except Fault as fault:
        cause = fault.report["cause"] or fault.report["what"]
        fault.report |= {"what": f"the install.py failed: {step['title']}", "cause": cause}
        raise
    if site.user:
        own(place, 0, 0)


def _compileall(site: Site, step: Json, place: Path) -> list[str]:
    """Compile Python files in a part that is being made; their tracebacks name its final place."""
    return ["-I", "-m", "compileall", "-q", "-j", "0", "-s", str(place), "-p", str(site.parts / step["part"])]


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
        run([uv, *venv, str(place)], environment)
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
            run([*argv, str(listed)], environment)
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
        subprocess.run([f"{place}/bin/python", *_compileall(site, step, place), f"{place}/lib"], capture_output=True)
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
    for name in manifest.get("folders", ()):  # what the unit mounts onto, which systemd would make as root
        as_service(site, os.makedirs, name, 0o777, True)
    for name, text in manifest["files"].items():
        write(place / name, text)
    if manifest.get("develop") or manifest.get("free_memory"):  # units of the release run it
        write(place / "agent.pyz", (site.state / "agent.pyz").read_bytes())
    write(place / "release.json", json.dumps(manifest, indent=1))


def preflight(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Import what the release must be able to import, while the old one still serves."""
    manifest = site.manifest(step["release"])
    code = "".join(f"import {name}; " for name in manifest["gate"]["imports"]) or "import torch"
    run([manifest["argv"][0], "-I", "-c", code], {**manifest["environment"], "CUDA_VISIBLE_DEVICES": ""})


def serve(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Run what is current: the unit in place, started at boot, started now and healthy."""
    manager = manager_of(site)
    manager.install()
    manager.start()
    current = site.release()
    gate(site, manager, site.manifest(current), note)


def prune(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Delete releases that are not kept, then what only they needed, blobs that are used up, and old journals."""
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
    journals = {line["run"] for line in history(site)[-JOURNALS:]} | {plan.get("run")}
    for path in (site.state / "runs").glob("*.jsonl"):
        if path.stem not in journals:
            path.unlink()


JOURNALS = 50
"""So many of the last runs keep their journal; a line of every run stays in the history."""
