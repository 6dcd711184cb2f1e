"""Service managers: locks, the supervisor and its processes, the manager in charge. Real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from agent import processes
from agent.files import AgentError, link, read, read_text, write
from agent.layout import Layout
from agent.locks import flock, free, holders
from agent.look.gpu import process
from agent.processes import started, wait_for
from agent.schema.live import GpuState
from agent.serve import managers, systemd
from agent.serve.managers import manager_of
from agent.serve.supervised import Supervised
from agent.serve.systemd import Systemd
from core import files
from deploy import archive

pytestmark = pytest.mark.process


def make(place: Path, **values: Any) -> Layout:
    """Create a prefix with a release whose ComfyUI sleeps."""
    layout = Layout(
        {"prefix": str(place), "service": "s", "scope": "user", "user": "", "address": "", "port": 1, **values}
    )
    argv = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)"]
    write(layout.releases / "one/release.json", json.dumps({"id": "one", "argv": argv, "environment": {}}))
    write(layout.agent, archive.packed_agent())
    write(layout.state / "site.json", json.dumps(vars(layout.site)))
    link(layout.current, "releases/one")
    layout.data.mkdir()
    return layout


@contextmanager
def supervisor(layout: Layout) -> Iterator[subprocess.Popen[bytes]]:
    """A running supervisor of the layout; it and its ComfyUI end with the block."""
    argv = [sys.executable, "-I", str(layout.agent), "supervise", str(layout.state / "site.json")]
    with (layout.state / "agent.log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as one:
        try:
            assert wait_for(lambda: not free(Supervised(layout).lock), 20)
            yield one
        finally:
            one.terminate()
            with suppress(subprocess.TimeoutExpired):
                one.wait(20)
            one.kill()


def child(layout: Layout) -> int:
    """The process id of the supervised ComfyUI, once it exists."""
    assert wait_for(lambda: bool(Supervised(layout).status().pid), 20)
    return int(Supervised(layout).status().pid)


@pytest.fixture
def askers(tmp_path: Path) -> Iterator[Path]:
    """A lock file that two processes query continuously."""
    lock = tmp_path / "lock"
    lock.touch()
    code = "import sys; from pathlib import Path; from agent.locks import free\nlock = Path(sys.argv[1])\n"
    code += "print(free(lock), flush=True)\nwhile True: free(lock)"
    words = [sys.executable, "-c", code, str(lock)]
    with ExitStack() as stack:
        running = [subprocess.Popen(words, cwd=files.CHECKOUT, stdout=subprocess.PIPE) for _ in range(2)]
        for one in map(stack.enter_context, running):
            stack.callback(one.kill)
            assert one.stdout
            assert one.stdout.readline() == b"True\n"
        yield lock
        assert [one.poll() for one in running] == [None, None]


def test_checking_a_lock_does_not_block_it(askers: Path) -> None:
    for _ in range(300):
        with flock(askers):
            pass
        time.sleep(0.001)


def test_concurrent_lock_checks_ignore_each_other(askers: Path) -> None:
    assert all(free(askers) for _ in range(5000))
    with flock(askers):
        assert not free(askers)
        with pytest.raises(AgentError, match="another process has locked"), flock(askers):
            pass


def test_checking_a_lock_creates_no_file(tmp_path: Path) -> None:
    assert free(tmp_path / "state/lock")
    assert not list(tmp_path.iterdir())


def test_deleted_lock_file_is_locked_again(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from agent.locks import flock\n"
    code += "with flock(Path(sys.argv[1]), wait=True): print('mine', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(lock)]
    with ExitStack() as stack:
        with flock(lock):
            words = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": files.CHECKOUT}
            other = stack.enter_context(subprocess.Popen(argv, **words))  # type: ignore[call-overload]
            time.sleep(0.5)
            lock.unlink()
        assert other.stdout.readline() == b"mine\n"
        assert not free(lock)
        other.stdin.close()


def test_failed_supervisor_start_shows_its_output(tmp_path: Path) -> None:
    layout = make(tmp_path)
    write(layout.agent, "import sys; sys.exit('there is no room')")
    with pytest.raises(AgentError, match="did not start") as raised:
        Supervised(layout).start()
    assert raised.value.report["cause"] == "there is no room"


def test_start_and_stop_during_status_queries(tmp_path: Path) -> None:
    """As `status`, `follow` and `facts` do: a query at the wrong moment used to keep the supervisor from starting."""
    layout = make(tmp_path)
    code = "import json, sys; from agent.layout import Layout; from agent.serve.supervised import Supervised\n"
    code += "one = Supervised(Layout(json.loads(sys.argv[1])))\nwhile True: one.status()"
    argv = [sys.executable, "-c", code, json.dumps(vars(layout.site))]
    with subprocess.Popen(argv, cwd=files.CHECKOUT) as asker:
        try:
            code = "import json, sys; from agent.layout import Layout; from agent.serve.supervised import Supervised\n"
            code += "one = Supervised(Layout(json.loads(sys.argv[1])))\nfor _ in range(3): one.start(); one.stop()"
            subprocess.run([sys.executable, "-c", code, json.dumps(vars(layout.site))], cwd=files.CHECKOUT, check=True)
        finally:
            asker.kill()
    assert "another process has locked" not in (layout.state / "agent.log").read_text()


def test_comfyui_ends_with_a_killed_supervisor(tmp_path: Path) -> None:
    layout = make(tmp_path)
    manager = Supervised(layout)
    with supervisor(layout) as one:
        pid = child(layout)
        one.kill()
        one.wait()
        assert wait_for(lambda: not started(pid), 5)
        assert (manager.status().active, manager.status().pid) == (False, 0)
        manager.stop()
    with supervisor(layout):
        assert child(layout) != pid
        manager.stop()
        assert not manager.status().active


def test_comfyui_ends_with_a_failed_supervisor(tmp_path: Path) -> None:
    layout = make(tmp_path)
    with supervisor(layout) as one:
        pid = child(layout)
        link(layout.current, "nowhere")
        os.kill(pid, signal.SIGKILL)  # restarted without a release to start
        assert one.wait(20) == 3
    assert not started(pid)


@pytest.mark.parametrize("ended", ["by a stop", "killed"])
def test_no_program_outlives_the_agent_that_runs_it(tmp_path: Path, ended: str) -> None:
    """A program that created an environment kept writing while the next command deleted it."""
    code = "import sys; from pathlib import Path; from agent.locks import flock; from agent.processes import run\n"
    code += "from agent.change.env import _run_long\n"
    code += "with flock(Path(sys.argv[1])): "
    code += "run(['sh', '-c', 'sleep 100 & wait'])" if ended == "by a stop" else "_run_long(['sleep', '100'])"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], cwd=files.CHECKOUT) as agent:
        assert wait_for(lambda: bool(processes.children(agent.pid)), 20)
        (program,) = processes.children(agent.pid)
        assert wait_for(lambda: b"sleep" in Path(f"/proc/{program}/cmdline").read_bytes(), 20)
        assert wait_for(lambda: ended == "killed" or bool(processes.children(program)), 20)
        left = {program, *processes.children(program)}
        if ended == "killed":
            agent.kill()
        else:
            (holder,) = holders(tmp_path / "lock")
            processes.end_with_programs(holder)
    assert wait_for(lambda: not any(started(each) for each in left), 5)


def test_stop_ignores_stale_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make(tmp_path, mounts={str(tmp_path / "pool"): "pool.mount"})  # the supervisor waits for it
    manager = Supervised(layout)
    with subprocess.Popen(["sleep", "100"]) as other:
        stale = {"pid": other.pid, "child": other.pid, "restarts": 0, "since": ""}
        newer = {**stale, "pid_started": "1 of another boot", "child_started": "1 of another boot"}
        try:
            for record in (stale, newer):
                write(manager.record, json.dumps(record))
                with supervisor(layout) as one:
                    assert manager.status().active
                    assert manager.status().pid == 0
                    manager.stop()
                    assert one.wait(5) == 0
            write(manager.record, json.dumps(newer))
            with flock(manager.lock):  # by a supervisor that cannot write its record
                assert manager.status().pid == 0
                monkeypatch.setattr("agent.serve.supervised.wait_for", lambda condition, _: condition())
                with pytest.raises(AgentError, match="the supervisor does not end") as raised:
                    manager.stop()
                assert "does not name it" in raised.value.report["cause"]
            assert other.poll() is None
        finally:
            other.kill()


def test_a_supervisor_of_an_older_hearth_can_be_stopped(tmp_path: Path) -> None:
    """It keeps running after an update; its record has no times."""
    layout = make(tmp_path)
    manager = Supervised(layout)
    with supervisor(layout) as one:
        pid = child(layout)
        old = {name: value for name, value in read(manager.record).items() if not name.endswith("_started")}
        write(manager.record, json.dumps(old))
        assert manager.status().pid == pid
        manager.stop()
        assert one.wait(5) == 0


def test_reused_pid_is_not_comfyui(tmp_path: Path) -> None:
    layout = make(tmp_path)
    with supervisor(layout):
        pid = child(layout)
        processes = [{**process(pid), "bytes": None, "kind": "compute"}]
        gpu = {**dict.fromkeys(each.name for each in fields(GpuState)), "processes": processes}
        assert managers.ours(layout, [gpu])[0].processes[0].comfyui is True
        record = read(Supervised(layout).record)
        write(Supervised(layout).record, json.dumps({**record, "child_started": "1 of another boot"}))
        assert managers.ours(layout, [gpu])[0].processes[0].comfyui is False


def test_supervisor_runs_on_a_full_disk(tmp_path: Path) -> None:
    layout = make(tmp_path)
    (Supervised(layout).record / "in the way").mkdir(parents=True)  # the rename fails
    with supervisor(layout) as one:
        assert wait_for(lambda: "up" in read_text(Supervised(layout).output), 20)
        assert one.poll() is None


# --- which manager -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets whether the user's systemd is reachable; `systemctl` does nothing, and lingering is enabled."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/systemctl").write_text("#!/bin/sh\n")
    (tmp_path / "bin/systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(managers, "login", lambda: str(tmp_path))  # systemd has a file of that name for lingering users
    yield lambda reached: monkeypatch.setattr(managers, "user_systemd", lambda: reached)


def test_supervised_prefix_stays_supervised(tmp_path: Path, asked_from: Any) -> None:
    layout = make(tmp_path / "prefix")
    asked_from(False)
    manager_of(layout).install()
    asked_from(True)
    assert manager_of(layout).name == "process"
    manager_of(layout).uninstall()
    assert manager_of(layout).name == "systemd-user"


@pytest.mark.parametrize("older", [False, True])
def test_user_systemd_prefix_is_never_supervised(tmp_path: Path, asked_from: Any, older: bool) -> None:
    layout = make(tmp_path / "prefix")
    asked_from(True)
    manager_of(layout).install()
    if older:  # an older Hearth recorded nothing: the unit tells
        layout.choice.unlink()
    asked_from(False)  # from cron, or after lingering was disabled
    with pytest.raises(AgentError, match="does not answer") as raised:
        manager_of(layout)
    assert "loginctl enable-linger" in raised.value.report["hint"]
    asked_from(True)
    assert manager_of(layout).name == "systemd-user"
    manager_of(layout).uninstall()
    asked_from(False)
    assert manager_of(layout).name == "process"


def test_manager_installs_on_a_full_disk(tmp_path: Path, asked_from: Any) -> None:
    layout = make(tmp_path / "prefix")
    layout.choice.mkdir()  # it cannot be written
    asked_from(False)
    Supervised(layout).install()
    assert Supervised(layout).enabled.exists()


def test_the_logins_systemd_is_found_without_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = f"/run/user/{os.getuid()}"
    real = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: str(self) == runtime or real(self))
    for given in ("", "/run/user/12345"):  # cron sets none, su keeps another user's
        monkeypatch.setenv("XDG_RUNTIME_DIR", given)
        Systemd(make(tmp_path / f"prefix{given[-1:]}"))
        assert os.environ["XDG_RUNTIME_DIR"] == runtime


@pytest.mark.usefixtures("asked_from")
def test_apply_unit_uses_the_systems_python(tmp_path: Path) -> None:
    manager = Systemd(make(tmp_path / "prefix"))
    manager.start_apply()
    text = (manager.units / manager.apply_unit).read_text()
    assert sys.prefix != sys.base_prefix
    assert f"ExecStart={sys._base_executable} -I " in text  # type: ignore[attr-defined]


@pytest.mark.needs("root")
@pytest.mark.parametrize("fault", ["", "owner", "mode", "group", "folder", "link", "other link", "loop", "gone"])
def test_root_unit_refuses_a_replaceable_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A local deploy as root with uv's or pyenv's Python, which would run at each boot."""
    # below /root, because /tmp is world-writable
    with tempfile.TemporaryDirectory(dir="/root") as folder:
        home = Path(folder) / "home"
        (home / "bin").mkdir(parents=True)
        python = home / "bin/python3"
        shutil.copy("/usr/bin/python3", home / "real")
        python.symlink_to("../real")
        python.parent.chmod(0o755)
        if fault == "owner":
            os.chown(home / "real", 1234, 1234)
        elif fault in ("mode", "group"):
            (home / "real").chmod(0o757 if fault == "mode" else 0o775)
            os.chown(home / "real", 0, 1234)
        elif fault == "folder":
            os.chown(home, 1234, 1234)
        elif fault in ("link", "other link"):  # in another user's folder, on the path to one of root's
            theirs = Path(folder) / "theirs"
            theirs.mkdir()
            (theirs / "python3").symlink_to(home / "real")
            os.chown(theirs, 1234, 1234)
            python.unlink()
            python.symlink_to(theirs / "python3")
            if fault == "other link":
                os.chown(python, 1234, 1234, follow_symlinks=False)
                os.chown(theirs, 0, 0)
        elif fault in ("loop", "gone"):
            python.unlink()
            python.symlink_to(python if fault == "loop" else "nowhere")
        assert systemd.rooted(python) is not bool(fault)
        monkeypatch.setattr(sys, "_base_executable", str(python))
        monkeypatch.setattr(sys, "executable", str(python))
        layout = Layout({**vars(make(tmp_path / "prefix").site), "scope": "system"})
        assert systemd._python(layout) == ("/usr/bin/python3" if fault else str(python))
        monkeypatch.setattr(systemd, "rooted", lambda _: False)
        with pytest.raises(AgentError, match="would run as root at each boot"):
            systemd._python(layout)
        assert systemd._python(make(tmp_path / "other")) == str(python)  # the login's own
