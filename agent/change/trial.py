"""Trial of a release: run and prove it beside the current release, in the same sandbox and on the same GPU.

It uses a separate loopback port and scratch data: separate folders, a copy of the database, the real models read-only.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from agent.api import Endpoint
from agent.deletion import SafeDeleter
from agent.files import AgentError, Json, Note, link, meminfo, read_some, recorded, regular, write
from agent.folders import branches, inside
from agent.layout import DATA, Layout
from agent.look.gpu import gpus
from agent.look.ports import port_holder
from agent.parts import as_service, drop_root
from agent.processes import end_descendants, logged, run, take_orphans, wait_for
from agent.schema.change import COMPARED, CutOver, Proof
from agent.schema.facts import Service
from agent.schema.manifest import ReleaseManifest
from agent.schema.records import Proven
from agent.serve.health import first_answer, prove, report_changed_types
from agent.serve.managers import Manager
from agent.serve.proofs import EXAMINE_SECONDS, OutOfMemoryError, Prover
from agent.serve.supervised import end_of
from agent.serve.systemd import Systemd

CLEAR_SECONDS = 120
"""Time limit for deleting a trial's files, some megabytes."""

MEMORY, GPU_MEMORY = 2_500_000_000, 1_500_000_000
"""Bytes that a second, idle ComfyUI needs: for its process (0.9 GB measured on a CPU, more with node packs), and on the
GPU for a CUDA context with the kernels' libraries (estimated, not measured)."""

SMALL = 16_000_000
"""Maximum size in bytes of a copied file of nodes (data/nodes): copies settings, not the nodes' models."""

SMALL_ONES = 500_000_000
"""Maximum total size of these copies in bytes, so that a node's runaway files do not fill the disk."""


def memory_shortage(proofs: Sequence[Proof] = ()) -> str:
    """Return a sentence about the memory that is too small for two instances; empty if memory suffices."""
    more = max((each.memory for each in proofs), default=0)
    if (free := meminfo()["MemAvailable"]) < MEMORY + more:
        return f"{free / 1e9:.1f} GB of memory available, {(MEMORY + more) / 1e9:.1f} GB needed"
    for gpu in gpus():
        if not gpu["unified"] and gpu["memory_total"] and gpu["memory_used"] is not None:
            free = gpu["memory_total"] - gpu["memory_used"]
            if free < GPU_MEMORY + more:
                return f"GPU {gpu['index']} has {free / 1e9:.1f} GB free, {(GPU_MEMORY + more) / 1e9:.1f} GB needed"
    return ""


def trial_of(layout: Layout, manager: Manager) -> Trial:
    """Return a trial for the manager that runs the service."""
    return SystemdTrial(layout) if isinstance(manager, Systemd) else Trial(layout)


def run_trial(
    layout: Layout, manager: Manager, release: ReleaseManifest, note: Note, step: CutOver, database: Path
) -> bool:
    """Prove a release without touching the current one. Return whether it also ran the workflows of `step`.

    It gets a copy of the database in the folder `database`.
    Raises AgentError of kind `trial` with the trial's log.
    """
    trial = trial_of(layout, manager)
    trial.proofs, trial.database = step.proofs, database
    current = layout.release()
    times: dict[str, float] | None = {}

    def tell(text: str) -> None:
        note(f"trial: {text}")

    try:
        trial.start(release)
        proof = prove(Endpoint.of(trial.argv), trial, release, trial.argv, tell, lambda: None)
        try:
            times = Prover(layout, trial, release, trial.argv, tell).run(step.proofs)
        except OutOfMemoryError as error:
            if step.trial == "only":
                raise
            times = None
            note(f"{error} beside release {current}: the proofs run after the cut-over")
    except Exception as error:
        report = error.report if isinstance(error, AgentError) else AgentError("trial", repr(error)).report
        still = f"release {current} stays in service: nothing was stopped" if current else "no release was in service"
        error = AgentError("trial", f"release {release.id} failed its trial: {report['what']}")
        error.report["cause"] = "\n".join(filter(None, [report["cause"], still]))
        error.report["hint"] = report["hint"] or "read the log above; to try again: inv deploy"
        with suppress(AgentError, OSError):
            error.report["log"] = trial.log(25) if trial.argv else []  # an earlier trial's, if this one has no port
        raise error from error
    finally:
        trial.clear()
    if times is not None:  # otherwise the gate reports them
        report_changed_types(recorded(layout.releases / current / "proven", Proven, lenient=True), proof, note)
    if times and current not in ("", release.id):
        _compare(layout, manager, step.proofs, times, note)
    return times is not None


def _compare(layout: Layout, manager: Manager, proofs: Sequence[Proof], times: Mapping[str, float], note: Note) -> None:
    """Run the workflows on a trial of the current release, too, and note both times.

    Not on the active one: its users would wait, and it would keep the workflows' results and models.
    """
    current, trial = layout.release(), trial_of(layout, manager)
    trial.proofs = tuple(proofs)
    before: dict[str, float] = {}
    try:
        if short := memory_shortage(proofs):
            raise AgentError("trial", short)
        release = layout.manifest(current)
        trial.start(release)
        first_answer(Endpoint.of(trial.argv), trial, release.gate.seconds)
        for each in proofs:
            before |= Prover(layout, trial, release, trial.argv, lambda _: None).run([each])
    except Exception as error:  # the new release has passed; nothing depends on this
        note(f"the proofs could not be run on release {current} to compare: {error}")
    finally:
        trial.clear()
    for name, seconds in before.items():
        note(COMPARED.format(name, times[name], current, seconds))


IMPORT_SECONDS = 300
"""Time limit for importing torch and the kernels from a cold disk."""


def imports(release: ReleaseManifest) -> list[str]:
    """Return the command that imports all kernels of the release: ComfyUI loads only the one it uses."""
    names = release.gate.imports
    return [release.argv[0], "-I", "-B", "-c", f"import torch, {', '.join(names)}"] if names else []


class Trial:
    """A release on scratch data, as a child process that ends with the agent."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # No other user may write to this folder: systemd mounts from it and would follow symlinks.
        self.room = layout.state / "trial"
        self.scratch = self.room / "data"
        self.argv: list[str] = []
        # The scratch folder for each writable path: the data, and data folders outside of it.
        elsewhere = {path: name for name, path in layout.elsewhere.items() if name != "models"}
        self.places = {str(layout.data): self.scratch, **{path: self.room / name for path, name in elsewhere.items()}}
        self.database = layout.database.parent
        self.proofs: tuple[Proof, ...] = ()  # workflows that it will run
        self.child: subprocess.Popen[bytes] | None = None
        self.spared: set[int] = set()

    def moved(self, text: str) -> str:
        """Replace the data's paths by scratch paths in a command line, unit or environment value."""
        for path, place in self.places.items():
            text = re.sub(rf"{re.escape(path)}(?![\w.-])", str(place).replace("\\", r"\\"), text)
        return text

    def confined(self, release: ReleaseManifest) -> list[str]:
        """Return the release's confining command prefix, adapted to the trial's paths and port."""
        words = [self.moved(word) for word in release.confined]
        if words and "write" in json.loads(words[-2]):
            spec, port = json.loads(words[-2]), int(self.argv[self.argv.index("--port") + 1])
            models = self.layout.elsewhere.get("models")  # the real models
            spec["read"] += [models] if models else []
            spec["write"] = [path for path in spec["write"] if path != models]
            words[-2] = json.dumps({**spec, "bind": [port], "connect": [*spec["connect"], port]})
        return words

    def prepare(self, release: ReleaseManifest, models: Path) -> None:
        """Choose a port and create the scratch data as the service user; `models` is the target of its models link.

        Raises AgentError if an earlier trial's files cannot be deleted.
        """
        self.clear()
        if os.path.lexists(self.room):
            what = f"{self.room} could not be deleted: an earlier trial left too many files in it, or a mount"
            raise AgentError("trial", what, "", f"inspect it, then delete it: rm -r --one-file-system {self.room}")
        port = self.port()
        self.argv = list(release.argv)
        for flag, value in (("--listen", "127.0.0.1"), ("--port", str(port))):
            self.argv[self.argv.index(flag) + 1] = value
        for place in self.places.values():
            place.mkdir(0o750, parents=True)
            os.chown(place, *self.layout.owner())
        as_service(self.layout, _fill, self.layout.data, self.scratch, models, self.database)
        source = self.layout.folder("input")
        if workflows := [proof.workflow for proof in self.proofs]:
            as_service(self.layout, _copy_inputs, source, Path(self.moved(str(source))), workflows)

    def port(self) -> int:
        """Return a free port, or the one that only a gateway reaches. Raises AgentError if that is in use."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # another trial may just have ended
            try:
                probe.bind(("127.0.0.1", self.layout.trial))
            except OSError:
                holder = port_holder(self.layout.trial)
                what = f"port {self.layout.trial} is in use by {holder.get('command', 'another program')}"
                why = "a trial needs it: the gateway's firewall lets nobody else reach it"
                raise AgentError("trial", what, why, "stop that program, then run the same command again") from None
            return int(probe.getsockname()[1])

    def start(self, release: ReleaseManifest) -> None:
        """Start a release. Raises AgentError if a kernel cannot be imported."""
        self.prepare(release, self.layout.data / "models")
        self.argv = [self.moved(word) for word in self.argv]
        variables = {name: self.moved(value) for name, value in release.environment.items()}
        self.spared = take_orphans()
        log = (self.layout.state / "trial.log").open("wb", buffering=0)  # stays open while any process runs
        if check := imports(release):
            self.child, _ = logged([*self.confined(release), *check], variables, log)
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(IMPORT_SECONDS)
            if self.child.poll() != 0:
                raise AgentError("gate", "a kernel of the release cannot be imported", " ".join(check[1:]))
        self.child, _ = logged([*self.confined(release), *self.argv], variables, log)

    def stop(self) -> None:
        """Stop it if it runs."""
        if self.child:
            self.child.send_signal(signal.SIGINT)  # ComfyUI handles SIGINT, not SIGTERM
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(20)
            self.child.kill()
            self.child.wait()
            end_descendants(self.spared)

    def clear(self) -> None:
        """Stop it if it runs, and delete its files."""
        self.stop()
        SafeDeleter(CLEAR_SECONDS).delete(self.room)

    def status(self) -> Service:
        """Return its state; it is never restarted."""
        code = self.child.poll() if self.child else None
        active = self.child is not None and code is None
        return Service(
            active=active, state=f"ended with {code}", enabled=False, linked=True, restarts=0, since="", pid=0
        )

    def log(self, lines: int) -> list[str]:
        """Return its last lines."""
        return end_of(self.layout.state / "trial.log", lines)


class SystemdTrial(Trial):
    """A release on scratch data, as a runtime unit: the service's unit with other paths.

    The system manager mounts the scratch data over the real data, which also covers the release's symlinks into the
    data. The user manager cannot; there the paths are replaced.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.unit = Systemd(Layout({**vars(layout.site), "service": f"{layout.service}-trial"}))
        self.drop_ins = self.unit.units / f"{layout.service}.service.d"
        system = layout.scope == "system"
        own = Path("/run" if system else f"/run/user/{os.getuid()}")
        self.unit.units = own / f"systemd/{'system' if system else 'user'}"
        self.unit.quadlets = own / "containers/systemd"  # podman-systemd.unit(5)
        self.place = self.unit.units / self.unit.unit

    def start(self, release: ReleaseManifest) -> None:
        """Start a release. The service's drop-ins (systemctl edit) apply to the trial, too."""
        container = self.layout.releases / release.id / f"{self.layout.service}.container"
        if container.exists():
            self.start_container(release, container.read_text())
            return
        text = container.with_suffix(".service").read_text()
        lines = ["[Service]", "Restart=no", f"RuntimeMaxSec={self.seconds(release)}", "ExecStart="]
        if self.layout.scope == "system":
            # Mount all of the real data read-only for its models: if `models` were a symlink, systemd would follow it
            # as root. The trial follows it inside its sandbox.
            real = Path(f"/run/{self.layout.service}-data")
            self.prepare(release, real / "models")
            lines += [f"BindPaths={place}:{path}" for path, place in self.places.items()]
            lines += [f"BindReadOnlyPaths={self.layout.data}:{real}"]
            if models := self.layout.elsewhere.get("models"):  # set by the operator
                lines += [f"BindReadOnlyPaths=-{models}:{models}"]
        else:
            self.prepare(release, self.layout.data / "models")
            self.argv, text = [self.moved(word) for word in self.argv], self.moved(text)
        for key, argv in (("ExecStartPre", imports(release)), ("ExecStart", self.argv)):
            command = shlex.join([*self.confined(release), *argv]).replace("%", "%%").replace("$", "$$")
            lines += [f"{key}={command}"] if argv else []
        lines += [f"TimeoutStartSec={IMPORT_SECONDS}"]
        storage = f"{self.layout.service}-storage.service"  # systemd does not know a first release's storage unit yet
        write(self.place, "".join(f"{line}\n" for line in text.splitlines() if not line.endswith(f"={storage}")))
        ours = self.place.with_name(f"{self.place.name}.d")
        for each in self.drop_ins.glob("*.conf"):
            link(ours / each.name, each)
        write(ours / "~trial.conf", "\n".join(lines) + "\n")  # sorts last, so it takes precedence
        run([*self.unit.ctl, "daemon-reload"])
        self.unit.start()

    def seconds(self, release: ReleaseManifest) -> int:
        """Return the longest time that it may run."""
        proofs = sum(2 * (each.seconds + EXAMINE_SECONDS) for each in self.proofs)
        return int(release.gate.seconds + 900 + proofs)

    def start_container(self, release: ReleaseManifest, text: str) -> None:
        """Start a release in a container of its own, which has the scratch data in place of the real data."""
        real = Path(f"/run/{self.layout.service}-data")
        self.prepare(release, real / "models")
        models = self.layout.elsewhere.get("models", "")
        confined = release.confined
        command = shlex.join([*confined, *self.argv])
        if check := imports(release):
            command = shlex.join([*confined, "/bin/sh", "-c", f"{shlex.join(check)} && exec {shlex.join(self.argv)}"])
        lines = {
            "[Container]": [
                f"ContainerName={self.unit.layout.service}",
                f"Exec={command.replace('%', '%%').replace('$', '$$')}",
                *(f"Volume={place}:{path}:rw,z" for path, place in self.places.items()),
                f"Volume={self.layout.data}:{real}:ro",
                *([f"Volume={models}:{models}:ro"] if models else []),
            ],
            "[Service]": ["Restart=no", f"RuntimeMaxSec={self.seconds(release)}"],
        }
        replaced = re.compile(r"(ContainerName|Exec|Notify|Health\w+|Restart)=|Volume=.*:rw,z$|.*-storage\.service$")
        kept = [line for line in text.splitlines() if not replaced.match(line)]
        found = [each for line in kept for each in (line, *lines.get(line, ()))]
        write(self.unit.place(self.unit.container), "\n".join(found) + "\n")
        for each in self.drop_ins.glob("*.conf"):
            link(self.place.with_name(f"{self.place.name}.d") / each.name, each)
        run([*self.unit.ctl, "daemon-reload"])
        self.unit.start()

    def stop(self) -> None:
        """Stop it if it runs, and remove its unit."""
        container = self.unit.place(self.unit.container)
        if self.place.exists() or container.exists():
            self.unit.stop()
            self.place.unlink(missing_ok=True)
            container.unlink(missing_ok=True)
            shutil.rmtree(self.place.with_name(f"{self.place.name}.d"), ignore_errors=True)
            run([*self.unit.ctl, "daemon-reload"])
            subprocess.run([*self.unit.ctl, "reset-failed", self.unit.unit], capture_output=True)

    def status(self) -> Service:
        """Return its state."""
        return self.unit.status()

    def log(self, lines: int) -> list[str]:
        """Return its last lines. Wait up to 3 s: the journal may receive them after the process has died."""
        wait_for(lambda: bool(self.unit.log(1)), 3)
        return self.unit.log(lines)


def _fill(data: Path, scratch: Path, models: Path | None, database: Path) -> None:
    """Create the scratch data: folders, a copy of the database, and copies of the nodes' small files."""
    left = SMALL_ONES
    for name, folder in itertools.chain(branches(data, "nodes"), branches(data, "comfyui")):  # releases link to these
        place = scratch / name
        try:
            place.mkdir(parents=True, exist_ok=True)
            with os.scandir(folder) as entries:
                for each in entries:
                    size = each.stat(follow_symlinks=False).st_size
                    if each.is_file(follow_symlinks=False) and size <= min(SMALL, left):
                        (place / each.name).write_bytes(read_some(Path(each), size, follow=os.O_NOFOLLOW))
                        left -= size + 4096
        except OSError as error:  # deleted meanwhile, or its path is too long
            if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG, errno.EACCES):
                raise
        if left < 0:
            break
    if models:
        (scratch / "models").symlink_to(models)
    for name in DATA:
        if not (scratch / name).is_symlink():  # it may dangle until the trial begins
            (scratch / name).mkdir(parents=True, exist_ok=True)
    _copy_live(database, scratch / "user/comfyui.db")


def _texts(value: Any) -> Iterator[str]:
    """Yield all text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


INPUT = 200_000_000
"""Maximum size in bytes of a copied input file of a proof: a picture or a short video."""


def _copy_inputs(source: Path, place: Path, workflows: list[Json]) -> None:
    """Copy the input files that workflows name: any of their texts may be a name."""
    for name in _texts(workflows):
        with suppress(OSError):  # too long for a name, or not readable
            if not name.isprintable() or name.startswith("/") or ".." in name:
                continue
            if (source / name).is_file() and (source / name).stat().st_size <= INPUT:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(read_some(source / name, INPUT))


def _copy_live(folder: Path, place: Path) -> None:
    """Copy a SQLite database that another process may be writing. Raises OSError if it was replaced meanwhile."""
    with suppress(FileNotFoundError), inside(folder) as here:
        source = here / "comfyui.db"
        if not regular(source):
            return
        import sqlite3

        drop_root()  # parses a file that the service wrote
        known = source.lstat()
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as live,
            closing(sqlite3.connect(place)) as copied,
        ):
            live.backup(copied)
            # SQLite reopens the path behind the descriptor, which may be a symlink by now.
            own = [each.stat() for each in Path("/proc/self/fd").iterdir() if each.exists()]
            if not any(os.path.samestat(known, each) for each in own):
                place.unlink()
                raise OSError(errno.ELOOP, "it was replaced during the copy", str(folder / "comfyui.db"))
