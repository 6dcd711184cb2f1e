"""The crash matrix: every durable operation of a cut-over, killed or failing, in every scenario.

It runs the agent's own code from `runs.apply` down; service manager and health check are stand-ins. Each scenario
first runs once to count its operations, so the matrix grows with the code. That run takes a snapshot before each
operation: it is the disk state that a killed process leaves, so a kill case resumes from a copy of it. Failing
operations run in this process. A file operation that the counter misses fails the test.

Each operation is interrupted in one of the two ways, and a random eighth of the failures runs (HEARTH_SEED);
`--faults` runs all.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent import files
from agent.change import cutover, database, lifecycle, runs, trial
from agent.files import AgentError, Json, link, write
from agent.journal import history
from agent.layout import DATA, Layout
from agent.processes import wait_for
from agent.schema.change import CutOver, Prune, Stop, packed
from agent.schema.facts import Service
from agent.schema.manifest import ReleaseManifest
from agent.schema.records import CutOverPhase, Proven
from agent.serve import health

PLAN = {
    "run": "r1",
    "who": "anna@laptop",
    "since": "2026-11-25T12:00:00Z",
    "action": "deploy",
    "release": "new",
    "base": "old",
    "steps": [
        packed(CutOver("cut over", "w", "u", 0, False, "new", "yes")),
        packed(Prune("prune", "w", "u", ("new", "old"))),
    ],
}


@dataclass(frozen=True)
class Scenario:
    """The new release's behaviour. `migrates`: it migrates the database, and the old release then refuses it.

    `back`: the new release is in service and has migrated the database; the old one replaces it.
    """

    name: str
    trial: bool = True
    gate: bool = True
    hangs: bool = False
    migrates: bool = False
    restores: bool = True
    back: bool = False


SCENARIOS = [
    Scenario("healthy"),
    Scenario("fails the trial", trial=False),
    Scenario("fails the gate", gate=False),
    Scenario("migrates", migrates=True),
    Scenario("migrates and fails the gate", migrates=True, gate=False),
    Scenario("migrates, fails the gate, cannot be restored", migrates=True, gate=False, restores=False),
    Scenario("back to before a migration", back=True),
    Scenario("back to before a migration, fails the gate", back=True, gate=False),
]

KILLED = 137
KILLS = ("killed", "power")
"""The process dies before the operation; so does ComfyUI, and the machine boots."""
FAILURES = {
    "ENOSPC": "the operation fails once",
    "EIO": "the operation fails once",
    "full": "this and every later operation that needs room fails, until the run has ended",
    "EROFS": "this and every later operation on files fails, until the run has ended",
}
MODES = (*KILLS, *FAILURES)
NEEDS_ROOM = {"open", "write", "mkdir", "symlink", "link", "posix_fallocate"}


def schema(database: Path) -> int:
    with closing(sqlite3.connect(database)) as opened:
        return int(opened.execute("select version_num from alembic_version").fetchone()[0])


def set_schema(database: Path, version: int) -> None:
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("create table if not exists alembic_version (version_num text)")
        opened.execute("delete from alembic_version")
        opened.execute(f"insert into alembic_version values ('{version}')")
        opened.execute(f"create table t{version} (x)")
        opened.commit()


class Manager:
    """A service manager: its running and enabled services are recorded next to the prefix."""

    def __init__(self, layout: Layout, scenario: Scenario, layer: Layer) -> None:
        self.site = layout
        self.scenario = scenario
        self.layer = layer
        self.running = layout.prefix.parent / "running"
        self.enabled = layout.prefix.parent / "enabled"

    def status(self) -> Service:
        active, enabled = self.running.exists(), self.enabled.exists()
        return Service(active, "a stand-in", enabled, linked=True, restarts=0, since="", pid=0)

    def stop(self) -> None:
        self.layer.count("stop", "service")
        with self.layer.off():
            self.running.unlink(missing_ok=True)

    def start(self, *, wait: bool = True) -> None:
        self.layer.count("start", f"service, {wait=}")
        with self.layer.off():
            self.boot()

    def boot(self) -> None:
        """Start the current release; an old release does not open a newer database."""
        release = self.site.release()
        if self.running.exists() or not release:
            return
        if release == "new" and self.scenario.migrates and schema(self.site.database) == 1:
            set_schema(self.site.database, 2)
        if schema(self.site.database) <= (2 if release == "new" else 1):
            self.running.write_text(release)

    def install(self) -> None:
        with self.layer.off():
            self.enabled.touch()

    def disable(self) -> None:
        with self.layer.off():
            self.enabled.unlink(missing_ok=True)

    def uninstall(self) -> None:
        self.disable()

    def start_missed(self) -> None:
        pass

    def start_apply(self) -> None:
        pass

    def log(self, lines: int) -> list[str]:
        return ["a line of its log"][:lines]

    timed_log = log


class Layer:
    """Counts the durable operations of this process, and makes one of them fail."""

    COUNTED = ("open", "write", "fsync", "rename", "replace", "unlink", "remove", "symlink", "link", "mkdir", "rmdir",
               "posix_fallocate")  # fmt: skip

    def __init__(self, prefix: Path, mode: str = "", at: int = 0, photographs: Path | None = None) -> None:
        self.prefix = str(prefix)
        self.mode = mode
        self.at = at
        self.photographs = photographs
        self.number = 0
        self.quiet = 0
        self.unseen: list[str] = []
        self.seen: list[str] = []

    @contextmanager
    def off(self) -> Iterator[None]:
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    def count(self, name: str, what: object) -> None:
        """Count an operation, and inject the fault when it is due."""
        if self.quiet:
            return
        self.number += 1
        self.seen.append(f"{self.number} {name} {what}")
        if self.photographs:
            with self.off():
                shutil.copytree(Path(self.prefix).parent, self.photographs / str(self.number), symlinks=True)
        if self.number == self.at and self.mode in KILLS:
            os._exit(KILLED)
        if self.number == self.at and self.mode in ("ENOSPC", "EIO"):
            raise OSError(getattr(errno, self.mode), os.strerror(getattr(errno, self.mode)))
        if self.mode == "full" and self.number >= self.at and name in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.mode == "EROFS" and self.number >= self.at and name in self.COUNTED:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def install(self) -> None:
        """Install the counter for the rest of this process."""
        for name in self.COUNTED:
            setattr(os, name, self.counted(name, getattr(os, name)))
        sys.addaudithook(self.audit)

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self.COUNTED:
                patch.setattr(os, name, self.counted(name, getattr(os, name)))
            yield

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*words: Any, **more: Any) -> Any:
            reads = name == "open" and not words[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads:
                self.count(name, words[0])
            with self.off():
                return real(*words, **more)

        return wrapped

    def audit(self, event: str, details: tuple[Any, ...]) -> None:
        """Record files that were opened for writing, renamed or removed without being counted."""
        if self.quiet:
            return
        if event == "open" and isinstance(details[0], str) and not details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        changes = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")
        path, ours = str(details[0]), (f"{self.prefix}/state/trial", f"{self.prefix}/state/lock")
        if event in changes and path.startswith(f"{self.prefix}/") and not path.startswith(ours):
            self.unseen.append(f"{event} {path}")


class StandIn(trial.Trial):
    """A trial without a real ComfyUI; its scratch data is real."""

    def start(self, release: ReleaseManifest) -> None:
        self.prepare(release, self.layout.data / "models")


@dataclass
class World:
    """A host, created for each case from a template."""

    place: Path
    scenario: Scenario
    short: str = ""
    """The memory that a trial lacks; empty if there is enough."""
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        prefix = self.place / "prefix"
        self.site = Layout(
            {"prefix": str(prefix), "service": "s", "scope": "user", "user": "", "address": "", "port": 1}
        )

    def make(self) -> World:
        layout = self.site
        for folder in (layout.state, layout.releases, *(layout.data / name for name in DATA)):
            folder.mkdir(parents=True)
        argv = ["python", "main.py", "--listen", "127.0.0.1", "--port", "8188"]
        for name in ("old", "new"):
            release = {"id": name, "argv": argv, "environment": {}, "parts": {}, "gate": {"seconds": 1}}
            write(layout.releases / name / "release.json", json.dumps(release))
            for number in (1, 2) if name == "new" else (1,):
                text = f'revision = "{number}"\ndown_revision = "{number - 1}"\n'
                write(layout.releases / name / f"app/alembic_db/versions/{number}.py", text)
        first, second = ("new", "old") if self.scenario.back else ("old", "new")
        link(layout.current, f"releases/{first}")
        set_schema(layout.database, 1)
        if self.scenario.back:
            (layout.databases / "old").mkdir(parents=True)
            shutil.copy(layout.database, (layout.databases / "old"))
            set_schema(layout.database, 2)
        (layout.data / "output/art.png").write_text("art")
        (layout.data / "user/comfyui.db.mine").write_text("a user's own copy")
        manager = Manager(layout, self.scenario, Layer(layout.prefix))
        manager.install()
        manager.boot()
        write(layout.state / cutover.RESERVE, bytes(runs.RESERVED))
        write(layout.pending, json.dumps({**PLAN, "release": second, "base": first}))
        self.plan(to=second)
        return self

    def plan(self, **values: object) -> None:
        """Change the pending cut-over."""
        cut, prune = PLAN["steps"]
        steps = [{**cut, **values}] + ([prune] if values.get("trial") != "only" else [])  # type: ignore[dict-item]
        write(self.site.pending, json.dumps({**files.read(self.site.pending), "steps": steps}))

    def failing(self, mode: str, at: int) -> int:
        """Apply the pending change in this process, with a failing operation; returns the exit code."""
        layer = Layer(self.site.prefix, mode, at)
        try:
            with layer.installed():
                return self.apply(layer)
        except Exception as error:
            print(repr(error))
            return 1

    def faulty(self, mode: str, at: int, counted: mmap.mmap | None = None, photographs: Path | None = None) -> int:
        """Apply the pending change in a separate process, with a fault; returns its exit code."""
        if (child := os.fork()) == 0:
            code = 1
            try:
                layer = Layer(self.site.prefix, mode, at, photographs)
                if mode:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                layer.install()
                code = self.apply(layer)
                if counted is not None:
                    counted[:] = json.dumps([layer.seen, layer.unseen]).encode().ljust(len(counted))
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def apply(self, layer: Layer | None = None) -> int:
        """Apply the pending change; 4: the disk accepts no writes."""
        with self.standing_in(layer):
            try:
                runs.apply(self.site)
            except OSError:
                return 4
        return 0

    @contextmanager
    def standing_in(self, layer: Layer | None = None) -> Iterator[None]:
        """Use stand-ins for service, health check and trial."""
        manager = Manager(self.site, self.scenario, layer or Layer(self.site.prefix))

        def directly(_: Layout, work: Callable[..., Any], *given: Any) -> Any:
            if work is database.restore and not self.scenario.restores:
                raise OSError(errno.EIO, "cannot be restored")
            return work(*given)

        def prove(_: object, process: object, *__: object) -> Proven:
            if not (self.scenario.trial if isinstance(process, trial.Trial) else self.scenario.gate):
                raise AgentError("gate", "unhealthy", "as the scenario wants it")
            while self.scenario.hangs and not isinstance(process, trial.Trial):
                pass
            return Proven()

        def first_answer(*_: object) -> Json:
            if not manager.status().active:
                raise AgentError("gate", "ComfyUI died during its start")
            return {}

        with pytest.MonkeyPatch.context() as patch:
            for module in (cutover, runs):
                patch.setattr(module, "manager_of", lambda _: manager)
            for module in (cutover, trial):
                patch.setattr(module, "as_service", directly)
            for module in (health, trial):
                patch.setattr(module, "prove", prove)
            for module in (runs, trial):
                patch.setattr(module, "trial_of", lambda layout, _: StandIn(layout))
            patch.setattr(cutover, "drain", lambda *_: None)
            patch.setattr(cutover, "first_answer", first_answer)
            patch.setattr(cutover, "memory_shortage", lambda _: self.short)
            patch.setattr(files, "RETRIES", [0, 0])
            patch.setattr(files, "DRAFT_SECONDS", 0)
            yield

    def boot(self) -> None:
        """Boot after a power cut: enabled services start."""
        manager = Manager(self.site, self.scenario, Layer(self.site.prefix))
        manager.running.unlink(missing_ok=True)
        if manager.enabled.exists():
            manager.boot()

    def listing(self) -> dict[str, float]:
        return {str(path): path.lstat().st_mtime for path in self.place.rglob("*")}

    def faults(self) -> list[str]:
        """The violated invariants once no run is pending."""
        layout, found = self.site, []
        running = (self.place / "running").read_text() if (self.place / "running").exists() else "nothing"
        current = layout.release()
        if current not in ("old", "new"):
            found.append(f"current is {current!r}")
        kept = list(layout.state.glob("database-r1/comfyui.db"))
        if kept:
            if schema(kept[0]) != 1 or self.scenario.restores:
                found.append(f"the database was not restored, and what is kept has schema {schema(kept[0])}")
        else:
            if running != current:
                found.append(f"{running} runs, and {current} is current")
            if schema(layout.database) > (2 if current == "new" else 1):
                found.append(f"{current} cannot open a database of schema {schema(layout.database)}")
        if (layout.data / "output/art.png").read_text() != "art" or not (layout.data / "user/comfyui.db.mine").exists():
            found.append("the user's files changed")
        expected = {"comfyui.db", "comfyui.db.mine"}
        if {path.name for path in (layout.data / "user").iterdir()} != expected:
            found.append(f"data/user holds {sorted(path.name for path in (layout.data / 'user').iterdir())}")
        saved = {path.parent.name: schema(path) for path in layout.state.glob("databases/*/comfyui.db")}
        if self.scenario.back:
            expected_copies = {"new": 2} if current == "old" else {"old": 1}
        else:
            expected_copies = {"old": 1} if (current, schema(layout.database)) == ("new", 2) else {}
        if saved != expected_copies:
            found.append(f"saved are the databases {saved}")
        names = {"history.jsonl", "runs", "lock", "incoming", "databases"}
        names |= {path.name for path in layout.state.glob("database-*")}
        left = [path.name for path in layout.state.iterdir() if path.name not in names]
        if left:
            found.append(f"left in state/: {left}")
        if extra := {path.name for path in layout.prefix.iterdir()} - {
            "current", "data", "parts", "releases", "state",
        }:  # fmt: skip
            found.append(f"left in the prefix: {extra}")
        return found


def count_of(world: World, photographs: Path | None = None) -> tuple[list[str], list[str]]:
    """The durable operations of a scenario without faults, and those that the counter missed."""
    shared = mmap.mmap(-1, 1 << 20)
    assert world.faulty("", 0, shared, photographs) == 0
    seen, unseen = json.loads(shared[:].decode())
    assert world.faults() == []
    return seen, unseen


@pytest.mark.process
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_cut_over_survives_every_fault_at_every_operation(
    scenario: Scenario, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """`current` is the old or the new release; it runs and opens the database; nothing is left over."""
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path  # in memory: a thousand hosts are created
    place = root / f"hearth-{os.getpid()}"
    template, photographs, case = place / "template", place / "photographs", place / "case"
    chance = random.Random(f"{os.environ['HEARTH_SEED']} {scenario.name}")
    all_faults = request.config.getoption("--faults")
    try:
        case.mkdir(parents=True)
        World(case, scenario).make()
        shutil.copytree(case, template, symlinks=True)
        seen, unseen = count_of(World(case, scenario), photographs)
        assert unseen == []
        bad: list[str] = []
        chosen: list[tuple[str, int]] = []
        for at in range(1, len(seen) + 1):
            some = [chance.choice(KILLS), *(mode for mode in FAILURES if chance.random() < 1 / 8)]
            chosen += [(mode, at) for mode in (MODES if all_faults else some)]
        for mode, at in chosen:
            photographed = mode in KILLS and at % 16 != 0  # the others are really killed
            shutil.rmtree(case)
            shutil.copytree(photographs / str(at) if photographed else template, case, symlinks=True)
            found = outcome(World(case, scenario), mode, at, photographed=photographed)
            bad += [f"{mode} at {seen[at - 1]}: {fault}" for fault in found]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"\n{scenario.name}: {len(chosen)} cases, {len(seen)} operations")
    assert not bad, "\n".join(bad[:40])


ABORT: Json = {
    **PLAN, "run": "r2", "action": "stop",
    "steps": [packed(Stop("stop", "w", "u", 0, True, pause=False))],
}  # fmt: skip


@pytest.mark.parametrize("again", [False, True])
def test_forced_stop_ends_a_hanging_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, again: bool) -> None:
    """Afterwards no process starts ComfyUI: the old release is current, with its own database."""
    monkeypatch.setattr(sys, "argv", [__file__])  # what is kept as the agent
    monkeypatch.setattr(lifecycle, "_strays", list)  # else it ends the confined processes of tests beside it
    world = World(tmp_path, Scenario("hangs", hangs=True, migrates=True)).make()
    layout, running = world.site, tmp_path / "running"
    if (child := os.fork()) == 0:
        world.apply()
        os._exit(0)
    assert wait_for(lambda: running.exists() and running.read_text() == "new", 20)
    with world.standing_in():
        with pytest.raises(AgentError, match="is in progress"):
            runs.submit(layout, {**ABORT, "steps": [{**ABORT["steps"][0], "force": False}]})
        if again:  # the aborting process is also killed, before it does anything else
            write(layout.pending, json.dumps({**PLAN, "aborted": "stop by anna"}))
        runs.submit(layout, dict(ABORT))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        assert not running.exists()
        assert (layout.release(), schema(layout.database)) == ("old", 1)
        (ended,) = history(layout)
        assert (ended["run"], ended["result"]) == ("r1", "reverted")
        assert ended["error"].startswith("aborted by stop by anna")
        assert files.read(layout.pending)["run"] == "r2"
    assert world.apply() == 0
    assert not running.exists()
    assert [each["result"] for each in history(layout)] == ["reverted", "done"]


def test_aborted_run_starts_nothing(tmp_path: Path) -> None:
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as root:
        scenario = Scenario("migrates", migrates=True)
        seen, _ = count_of(World(Path(root, "host"), scenario).make(), Path(root))
        for at in range(1, len(seen) + 1):
            world = World(Path(root, str(at)), scenario)
            (world.place / "running").unlink(missing_ok=True)
            plan = files.read(world.site.pending)
            if plan:
                write(world.site.pending, json.dumps({**plan, "aborted": "x"}))
            assert world.apply() == 0
            left = [each for each in world.faults() if not each.startswith("nothing runs")]
            assert (left, (world.place / "running").exists()) == ([], False), seen[at - 1]


def test_a_release_that_cannot_open_the_database_stops_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, Scenario("", back=True)).make()
    shutil.rmtree(world.site.databases)
    assert world.apply() == 0
    (line,) = history(world.site)
    assert (line["result"], world.site.release(), (tmp_path / "running").read_text()) == ("failed", "new", "new")
    assert "cannot open ComfyUI's database" in line["error"]


def test_a_saved_database_of_another_release_is_used(tmp_path: Path) -> None:
    """The same older ComfyUI with other flags is another release."""
    world = World(tmp_path, Scenario("", back=True)).make()
    (world.site.databases / "old").rename(world.site.databases / "with-other-flags")
    assert world.apply() == 0
    assert (world.site.release(), schema(world.site.database)) == ("old", 1)


def test_the_record_of_another_run_is_ignored(tmp_path: Path) -> None:
    world = World(tmp_path, SCENARIOS[0]).make()
    other = {"run": "r0", "phase": "reverting", "from": "gone", "to": "new", "tried": True, "copied": True}
    write(world.site.cut, json.dumps({**other, "error": AgentError("gate", "of another run").report}))
    assert world.apply() == 0
    assert (world.site.release(), world.faults()) == ("new", [])


def test_agents_of_other_versions_read_the_record(tmp_path: Path) -> None:
    """Another client's forced stop aborts the run with its own agent."""
    world = World(tmp_path, SCENARIOS[0]).make()
    step = CutOver("", "", "", drain=0, force=True, to="new", trial="no")
    found = cutover.Cutover(world.site, step, CutOverPhase("r1", "planned", "old", "new"), print)
    found.enter("switched", copied=True)
    written = files.read(world.site.cut)
    assert (written["from"], written["to"], "base" in written) == ("old", "new", False)
    assert cutover._recorded(world.site) == found.record
    older = {name: value for name, value in written.items() if value is not None}
    write(world.site.cut, json.dumps({**older, "more": 1}))
    assert cutover._recorded(world.site) == found.record


def test_a_revert_leaves_a_service_as_it_was(tmp_path: Path) -> None:
    """A user stopped and disabled it: it is neither started nor enabled."""
    world = World(tmp_path, Scenario("fails the gate", gate=False)).make()
    for name in ("running", "enabled"):
        (tmp_path / name).unlink()
    assert world.apply() == 0
    assert world.site.release() == "old"
    assert not (tmp_path / "running").exists()
    assert not (tmp_path / "enabled").exists()


def test_resumed_cut_over_limits_the_wait_for_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount's server is late: the old release is current again, and starts when the mount is available."""
    world = World(tmp_path, SCENARIOS[0]).make()
    seen, _ = count_of(world)
    at = next(number for number, each in enumerate(seen, 1) if "start" in each)
    world = World(tmp_path / "again", SCENARIOS[0])
    world.place.mkdir()
    assert world.make().faulty("power", at) == KILLED
    monkeypatch.setattr(cutover, "MOUNTS_SECONDS", 0)
    monkeypatch.setattr(Layout, "unmounted", lambda _: ["/mnt/late"])
    waits: list[bool] = []

    def start(self: Manager, *, wait: bool = True) -> None:
        waits.append(wait)
        self.boot()

    monkeypatch.setattr(Manager, "start", start)
    assert world.apply() == 0
    (line,) = history(world.site)
    assert (line["result"], world.site.release(), waits) == ("reverted", "old", [False])
    assert "/mnt/late is not mounted" in line["error"]


def test_too_little_memory_skips_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "meminfo", lambda: {"MemAvailable": 1_000_000_000})
    assert trial.memory_shortage() == "1.0 GB of memory available, 2.5 GB needed"
    monkeypatch.setattr(trial, "meminfo", lambda: {"MemAvailable": 10_000_000_000})
    gpu = {"index": 0, "unified": False, "memory_total": 12_000_000_000, "memory_used": 11_000_000_000}
    monkeypatch.setattr(trial, "gpus", lambda: [gpu])
    assert trial.memory_shortage() == "GPU 0 has 1.0 GB free, 1.5 GB needed"
    monkeypatch.setattr(trial, "gpus", lambda: [{**gpu, "unified": True}, {**gpu, "memory_used": None}])
    assert trial.memory_shortage() == ""
    world = World(tmp_path, Scenario("fails the trial", trial=False)).make()
    world.short = "no memory"
    assert world.apply() == 0
    assert world.site.release() == "new"
    world = World(tmp_path / "only", SCENARIOS[0])
    world.place.mkdir()
    world.make().plan(trial="only")
    world.short = "no memory"
    assert world.apply() == 0
    (line,) = history(world.site)
    assert (line["result"], line["error"]) == ("failed", "there is not enough memory for a trial: no memory")


@pytest.mark.parametrize("good", [True, False])
def test_a_trial_alone_touches_nothing(tmp_path: Path, good: bool) -> None:
    world = World(tmp_path, Scenario("", trial=good, migrates=True)).make()
    world.plan(trial="only")
    before = world.site.database.read_bytes()
    assert world.apply() == 0
    assert (world.site.release(), (tmp_path / "running").read_text()) == ("old", "old")
    assert (world.faults(), world.site.database.read_bytes()) == ([], before)
    (line,) = history(world.site)
    assert line["result"] == ("done" if good else "failed")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_disk_errors_have_their_own_kind(code: int) -> None:
    error = files.os_error(OSError(code, os.strerror(code)), "it could not be written")
    assert (error.report["kind"], error.report["hint"] != "") == ("disk", True)
    assert os.strerror(code) in error.report["cause"]


def outcome(world: World, mode: str, at: int, *, photographed: bool) -> list[str]:
    """The violated invariants after a fault and any number of resumptions. A snapshot counts as killed already."""
    code = KILLED if photographed else (world.faulty if mode in KILLS else world.failing)(mode, at)
    expected = (KILLED,) if mode in KILLS else (0, 4)
    if code not in expected:
        return [f"the agent ended with {code}"]
    if mode == "power":
        world.boot()
    for _ in range(3):
        if not world.site.pending.exists():
            break
        if (code := world.apply()) != 0:
            return [f"the resumed agent ended with {code}"]
    world.apply()  # as at the next boot: cleans up after a run that could not record its end
    if world.site.pending.exists():
        return ["the plan is still pending"]
    found = world.faults()
    before = world.listing()
    if world.apply() != 0 or world.listing() != before:
        found.append("a second run is not a no-op")
    if len(history(world.site)) > 1:
        found.append("history tells the run twice")
    return found
