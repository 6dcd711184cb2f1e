"""Files that the agent reads, deletes and changes the owner of on hosts: damaged records, links, deep trees."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent import files as agent_files
from agent.change import folders, releases, trees
from agent.deletion import SafeDeleter, remove
from agent.files import AgentError, append, link, read
from agent.layout import DATA, Layout
from agent.locks import flock, free
from agent.look.facts import facts
from agent.look.prefix import _deletable
from agent.schema.change import Folders, Release
from agent.schema.facts import Questions
from agent.schema.manifest import ReleaseManifest
from agent.serve import supervised
from core import files


def at(place: Path, **values: object) -> Layout:
    return Layout(
        {"prefix": str(place), "service": "s", "scope": "user", "user": "", "address": "", "port": 1, **values}
    )


def deep(root: Path, levels: int) -> None:
    """A tree of nested folders; a path can name at most 1365 levels."""
    root.mkdir()
    place = os.open(root, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("dd", dir_fd=place)
        inner = os.open("dd", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=place))
    os.close(place)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- reading -------------------------------------------------------------------------------------------------------


def test_unreadable_record_is_an_error(tmp_path: Path) -> None:
    assert read(tmp_path / "none.json") == {}
    (tmp_path / "file").touch()
    assert read(tmp_path / "file/none.json") == {}
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        read(tmp_path / "folder")
    for content in (b"", b'{"run": "a"', b"[]", b"null", b"\xff\xfe", b"\0" * 100):
        (tmp_path / "damaged.json").write_bytes(content)
        with pytest.raises(AgentError, match="is damaged") as raised:
            read(tmp_path / "damaged.json")
        assert f"rm {tmp_path}/damaged.json" in raised.value.report["hint"]
        assert read(tmp_path / "damaged.json", lenient=True) == {}


@pytest.mark.parametrize("name", ["pending.json", "paused.json"])
def test_damaged_run_or_pause_record_is_an_error(tmp_path: Path, name: str) -> None:
    layout = at(tmp_path)
    layout.state.mkdir()
    (layout.state / name).write_text('{"run": ')
    with pytest.raises(AgentError, match=f"{name} is damaged"):
        facts(layout, ASK, [])


def test_damaged_supervisor_record_is_reported(tmp_path: Path) -> None:
    manager = supervised.Supervised(at(tmp_path))
    manager.lock.parent.mkdir()
    manager.record.write_text("")
    assert not manager.status().active  # owned by nobody
    with flock(manager.lock), pytest.raises(AgentError, match="is damaged"):
        manager.stop()


ASK = Questions()


def test_damaged_caches_are_ignored(tmp_path: Path) -> None:
    layout = at(tmp_path)
    (layout.releases / "one").mkdir(parents=True)
    layout.state.mkdir()
    (layout.parts / "app-1").mkdir(parents=True)
    layout.current.symlink_to("releases/one")
    for path in (
        layout.releases / "one/release.json",
        layout.releases / "one/proven",
        layout.parts / "app-1/PART.json",
    ):
        path.write_text('{"id": ')
    for path in (layout.state / "site.json", layout.state / "verified.json"):
        path.write_text("")
    found = facts(layout, ASK, [])
    assert (found.releases, found.current, found.failed_nodes) == ((), "", {})
    assert found.current_error["kind"] == "foreign"
    assert found.parts["app-1"].startswith("it cannot be read")


# --- the order of releases -----------------------------------------------------------------------------------------


def test_previous_release_comes_from_history_not_clocks(tmp_path: Path) -> None:
    layout = at(tmp_path)
    at_once = {"a": 1000, "b": 2000, "c": 500, "d": 9000}  # the clock was set back before c was served
    for name, when in at_once.items():
        (layout.releases / name).mkdir(parents=True)
        (layout.releases / name / "proven").write_text("{}")
        os.utime(layout.releases / name / "proven", (when, when))
    runs = [("a", "done"), ("b", "done"), ("c", "done"), ("b", "reverted"), ("x", "done"), ("d", "failed")]
    for release, result in runs:
        append(layout.history, {"action": "deploy", "run": "r", "release": release, "result": result})
    assert facts(layout, ASK, []).proven == ("c", "b", "a", "d")
    append(layout.history, {"action": "rollback", "run": "r", "release": "a", "result": "done"})
    assert facts(layout, ASK, []).proven == ("a", "c", "b", "d")


# --- deleting ------------------------------------------------------------------------------------------------------


def test_a_tree_of_any_depth_is_deleted_with_few_descriptors(tmp_path: Path) -> None:
    deep(tmp_path / "deep", 1400)
    code = "import resource, sys; from pathlib import Path; from agent.deletion import SafeDeleter\n"
    code += (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\nsweep = SafeDeleter(); sweep.delete(Path(sys.argv[1]))\n"
    )
    code += "assert (sweep.files, sweep.left, sweep.stuck) == (1, [], []), sweep.stuck"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "deep")], cwd=files.CHECKOUT, check=True)
    assert not (tmp_path / "deep").exists()


def test_undeletable_file_keeps_its_parent_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep(tmp_path / "deep", 30)
    (tmp_path / "deep/dd/other").touch()
    real = os.unlink

    def refuse(name: str, dir_fd: int | None = None) -> None:  # as chattr +i would
        if name == "file":
            raise PermissionError(1, "Operation not permitted")
        real(name, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(AgentError, match="cannot be deleted") as raised:
            remove(tmp_path / "deep")
    assert raised.value.report["cause"] == f"{tmp_path}/deep{'/dd' * 30}/file: Operation not permitted"
    assert (tmp_path / f"deep{'/dd' * 30}/file").exists()
    assert not (tmp_path / "deep/dd/other").exists()
    remove(tmp_path / "deep")
    remove(tmp_path / "deep")  # it is gone already


def test_folder_moved_during_deletion_deletes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/file").touch()
    (tmp_path / "kept/other").mkdir(parents=True)
    (tmp_path / "kept/tree").mkdir()
    real = os.unlink

    def moving(name: str, dir_fd: int | None = None) -> None:
        (tmp_path / "tree/inner").rename(tmp_path / "kept/inner")
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", moving)
    sweep = SafeDeleter()
    sweep.delete(tmp_path / "tree")
    assert [each.rpartition(": ")[2] for each in sweep.stuck] == ["it was moved during its deletion"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["inner", "other", "tree"]


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/key").touch()
    for folder in (home / ".ssh", home):
        folder.chmod(0o500)
    (tmp_path / "part").mkdir()
    (tmp_path / "part/cache").symlink_to(home)
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "part", "dangling"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (mode(home), mode(home / ".ssh"), (home / ".ssh/key").exists()) == (0o500, 0o500, True)


def test_folders_without_any_permission_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "tree/closed/er").mkdir(parents=True)
    (tmp_path / "tree/closed/er").chmod(0)
    (tmp_path / "tree/closed").chmod(0)
    remove(tmp_path / "tree")
    assert not list(tmp_path.iterdir())


def test_parent_folders_of_mount_points_are_kept(tmp_path: Path) -> None:
    deep(tmp_path / "data", 1200)
    point = f"{tmp_path}/data{'/dd' * 1100}"
    assert not _deletable(f"{tmp_path}/data", [point])
    (tmp_path / "data/dd/dd/file").touch()
    assert _deletable(f"{tmp_path}/data", [point])
    remove(tmp_path / "data")


# --- owners and modes ----------------------------------------------------------------------------------------------


def test_a_tree_deeper_than_python_recurses_is_shared(tmp_path: Path) -> None:
    """os.walk recurses on Python 3.10 and 3.11."""
    for levels in (1200, 1400):  # of the latter, as far as a path can name them
        layout = at(tmp_path / str(levels))
        layout.prefix.mkdir()
        layout.data.mkdir()
        deep(layout.data / "output", levels)
        folders.folders(layout, Folders("t", "w", "u"), lambda _: None)
        assert all((layout.data / name).is_dir() for name in DATA)
        assert mode(layout.data / f"output{'/dd' * 1100}") == 0o755
        remove(layout.data)


def test_replaced_new_folder_is_not_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "secret").touch()
    layout = at(tmp_path / "prefix", folders={"output": str(tmp_path / "pool/out")})

    def swapped(prefix: str, dir: Path) -> str:  # noqa: A002  tempfile.mkdtemp's own name
        place = dir / f"{prefix}x"
        place.symlink_to(victim)
        return str(place)

    with monkeypatch.context() as patch:
        patch.setattr("agent.change.folders.tempfile.mkdtemp", swapped)
        with pytest.raises(OSError):
            folders.folders(layout, Folders("t", "w", "u"), lambda _: None)
        patch.setattr("agent.change.folders.tempfile.mkdtemp", lambda **_: str(victim))
        with pytest.raises(AgentError, match="was replaced while it was being made"):
            folders.folders(layout, Folders("t", "w", "u"), lambda _: None)
    assert mode(victim) == 0o700
    for path in tmp_path.glob("p*/.*"):
        path.unlink()
    folders.folders(layout, Folders("t", "w", "u"), lambda _: None)
    assert (tmp_path / "pool/out").is_dir()
    assert mode(tmp_path / "pool/out") == 0o755


def test_leftovers_of_a_killed_run_with_this_pid_are_replaced(tmp_path: Path) -> None:
    """In a container, every run has the same process id."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/new").touch()
    (tmp_path / f".place.{os.getpid()}").mkdir()
    (tmp_path / f".place.{os.getpid()}/half").touch()
    trees.copy_defaults(tmp_path / "source", tmp_path, "place", True)
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["new"]


def test_unfinished_folder_of_a_killed_run_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folders.folders(layout, Folders("t", "w", "u"), lambda _: None)
    (tmp_path / "somebodys").touch()
    assert facts(layout, ASK, []).place.others == ("somebodys",)


def test_a_release_runs_its_own_agent(tmp_path: Path) -> None:
    """Another client's submit replaces the one in state/."""
    layout = at(tmp_path)
    layout.state.mkdir()
    manifest = ReleaseManifest(free_memory=60)
    for agent in ("first", "second"):
        (layout.state / "agents" / agent).mkdir(parents=True)
        link(layout.agent, f"agents/{agent}")
        releases.release(layout, Release("t", "w", "u", replace(manifest, id=agent)), lambda _: None)
    assert [(layout.releases / name / "agent").resolve().name for name in ("first", "second")] == ["first", "second"]
    manifest = ReleaseManifest(id="one")
    releases.release(layout, Release("t", "w", "u", manifest), lambda _: None)
    assert layout.manifest("one") == manifest
    assert not os.path.lexists(layout.releases / "one/agent")


def test_agent_clears_the_callers_environment(tmp_path: Path) -> None:
    """All its child processes get only the rest; the messages that it matches are English."""
    code = "import os, subprocess; from agent import main; main.main(['nonsense']); subprocess.run('env', env=None)"
    hostile = {"LD_DEBUG_OUTPUT": "/tmp/x", "PYTHONPATH": "/nowhere", "SYSTEMD_PAGER": "evil", "LC_ALL": "de_DE.UTF-8"}
    kept = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "https_proxy": "http://p:1", "UV_INDEX_URL": "x"}
    request = json.dumps({"site": vars(at(tmp_path).site)})
    done = subprocess.run(
        [sys.executable, "-c", code], input=request, env=kept | hostile, capture_output=True, text=True, check=True,
        cwd=files.CHECKOUT,
    )  # fmt: skip
    said = dict(line.partition("=")[::2] for line in done.stdout.splitlines()[1:])
    assert said == kept | {"LC_ALL": "C.UTF-8"}


def test_deletion_limits_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.deletion.AT_ONCE", 10)
    for number in range(105):
        (tmp_path / f"wide/{number}").mkdir(parents=True)
    late = SafeDeleter(seconds=0)
    late.delete(tmp_path / "wide")
    assert "deleting it takes more than 0 s" in late.stuck[0]
    sweep = SafeDeleter()
    sweep.delete(tmp_path / "wide")
    assert sweep.stuck == []
    assert not (tmp_path / "wide").exists()


# --- locks ---------------------------------------------------------------------------------------------------------

HOLD = """
import fcntl, os, sys, time
if int(sys.argv[1]):
    os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)
file = os.open(sys.argv[2], os.O_RDONLY)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def shared_place() -> Iterator[Path]:
    """A folder that every user can traverse, as `state/`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        yield Path(place)


@contextmanager
def held(path: Path, *, by_nobody: bool) -> Iterator[None]:
    words = [sys.executable, "-I", "-S", "-c", HOLD, str(int(by_nobody)), str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.kill()


@pytest.mark.needs("root")
def test_other_users_cannot_hold_a_lock(shared_place: Path) -> None:
    path = shared_place / "lock"
    with flock(path):
        assert mode(path) == 0o600
        assert not free(path)
    path.chmod(0o644)  # as an older Hearth created it
    with held(path, by_nobody=True):
        assert free(path)
        with flock(path):
            assert mode(path) == 0o600
            assert not free(path)
            with pytest.raises(AgentError, match="another process has locked"), flock(path, wait=0.1):
                pass
    assert [each.name for each in shared_place.iterdir()] == ["lock"]


def test_locks_of_older_versions_are_respected(shared_place: Path) -> None:
    path = shared_place / "lock"
    path.touch(0o644)
    with held(path, by_nobody=False):
        assert not free(path)
        with pytest.raises(AgentError, match="another process has locked"), flock(path, wait=0.1):
            pass
    with flock(path):
        assert mode(path) == 0o600


@pytest.mark.process
def test_locks_are_renewed_by_one_at_a_time(shared_place: Path) -> None:
    path, count = shared_place / "lock", shared_place / "count"
    path.touch(0o644)
    count.write_text("0")
    code = (
        "import sys; from pathlib import Path; from agent.locks import flock\nwith flock(Path(sys.argv[1]), wait=60):\n"
    )
    code += (
        "    count = Path(sys.argv[2]); n = int(count.read_text()); count.write_text(''); count.write_text(str(n + 1))"
    )
    words = [sys.executable, "-c", code, str(path), str(count)]
    processes = [subprocess.Popen(words, cwd=files.CHECKOUT) for _ in range(8)]
    assert [each.wait(60) for each in processes] == [0] * 8
    assert count.read_text() == "8"


def test_drafts_of_dead_processes_and_old_drafts_are_removed(tmp_path: Path) -> None:
    """A draft of a run killed moments before used to survive the run that resumed it."""
    with subprocess.Popen(["true"]) as ended:
        pass
    names = {"alive": f".pending.json.{os.getpid()}", "old": f".site.json.{os.getpid()}", "other": ".current.back"}
    names |= {"ended": f".pending.json.{ended.pid}", "no number of a process": f".pending.json.{10**30}"}
    for name in names.values():
        (tmp_path / name).touch()
    os.utime(tmp_path / names["old"], (0, 0))
    agent_files.remove_drafts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["alive"], names["other"]}
