"""Interruptions on a real host: after any of them, the old or the new release is in service.

Based on ostree's tests/inst/src/destructive.rs. `--faults` runs every kind at every step and at random times. At random
times the new release is the real ComfyUI, otherwise both are its stand-in.
"""

from __future__ import annotations

import glob
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen

import pytest

from agent.journal import events as lines
from tests.errors import kind_of
from tests.host import machine
from tests.host.fleet import Fleet, fresh, within
from tests.host.small import small

pytestmark = pytest.mark.host

STEPS = ["make app", "write release", "cut over", "prune"]
"""The beginnings of the step titles of a deploy that changes ComfyUI's tree."""

SEED = os.environ["HEARTH_SEED"]
"""The seed of the random times: different in each run, printed at its start (tests/conftest.py)."""

FIRST = ["create the system user", "create the folders", "make app", "send uv", "make env", "write release"]
"""The same for a first deploy, up to the cut-over."""


def kill_client(_: Fleet, client: int) -> None:
    """kill -9 the user's command."""
    os.kill(client, signal.SIGKILL)


def kill_agent(fleet: Fleet, _: int) -> None:
    """kill -9 the process that applies the plan on the host."""
    fleet.machine.run("systemctl kill --signal=KILL --kill-whom=all comfyui-apply", check=False)


def cut_connection(fleet: Fleet, _: int) -> None:
    """Simulate a lost network: kill sshd's session process."""
    fleet.machine.run("pkill -9 -f 'sshd: deployer'", check=False)


def cut_power(fleet: Fleet, _: int) -> None:
    """Kill everything on the host at once, then boot it."""
    fleet.machine.power_off()
    fleet.machine.boot()


MIGRATES = (
    'import sqlite3,sys,time; d=sqlite3.connect(sys.argv[sys.argv.index("--database-url")+1][10:]); '
    'd.execute("create table if not exists newer (x)"); d.commit(); time.sleep(1000)'
)
"""A line for ComfyUI's main.py: migrates the database as a newer version would, and never answers."""

KINDS: dict[str, Callable[[Fleet, int], None]] = {
    "client": kill_client,
    "agent": kill_agent,
    "connection": cut_connection,
    "power": cut_power,
}


def cases() -> Iterator[object]:
    """(kind, step or seconds): every kind at every step, and 24 random times; a few of them always run."""
    always = {("agent", "cut over"), ("power", "cut over"), ("client", "make app")}
    for kind in KINDS:
        for step in STEPS:
            marks = [] if (kind, step) in always else [pytest.mark.faults]
            yield pytest.param(kind, step, id=f"{kind}-{step.replace(' ', '-')}", marks=marks)
    chance = random.Random(SEED)
    for number in range(24):
        kind, seconds = chance.choice(sorted(KINDS)), round(chance.uniform(0, 20), 2)
        yield pytest.param(kind, seconds, id=f"{kind}-{seconds}s", marks=[pytest.mark.faults] if number else [])


@pytest.fixture(scope="module", autouse=True)
def _database(deployed: Fleet) -> None:
    """Before its stand-in, ComfyUI runs once, and makes its database."""


@pytest.fixture
def other(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Another healthy ComfyUI with a tree that is new to the host, so that every step has work to do."""
    name = re.sub(r"\W", "-", request.node.name)
    real = "when" in request.fixturenames and not isinstance(request.getfixturevalue("when"), str)
    app = fleet.comfyui(name, {"README.md": (r"\A", f"{name}\n")}) if real else small(fleet.place, name)
    yield app
    shutil.rmtree(app)


def journal(fleet: Fleet, since: float) -> list[dict[str, object]]:
    """The events of the run that started after `since`."""
    events: list[dict[str, object]] = []
    for path in (fleet.prefix / "state/runs").glob("*.jsonl"):
        with suppress(FileNotFoundError):  # pruned just now
            if path.stat().st_mtime >= since:
                events += lines(path.read_text())
    return events


def wait_for_step(fleet: Fleet, title: str, since: float) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if any(str(event.get("title", "")).startswith(title) for event in journal(fleet, since)):
            return
        time.sleep(0.003)
    raise AssertionError(f"step {title!r} never began: {journal(fleet, since)}")


def converge(fleet: Fleet, **env: str) -> None:
    """Deploy until nothing is left to do; waits for a run that resumes by itself."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        done = fleet.deploy("--no-trial", **env)
        if done.returncode == 0:
            break
        assert done.returncode in (63, 64), done.stderr  # a run is in progress
        fleet.inv("attach", "--host", "spark")
    again = fleet.deploy("--dry-run", **env)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(("kind", "when"), list(cases()))
def test_interrupted_deploy_leaves_old_or_new_release(
    healthy: Fleet, other: Path, kind: str, when: str | float
) -> None:
    old, data = healthy.current(), healthy.data()
    since = time.time()
    client = healthy.start("deploy", "--host", "spark", HEARTH_APP=str(other))
    if isinstance(when, str):
        wait_for_step(healthy, when, since - 1)
    else:
        time.sleep(when)
    KINDS[kind](healthy, client.pid)
    try:
        client.communicate(timeout=180)
    finally:
        client.kill()
    assert (healthy.prefix / "current").is_symlink()
    now = healthy.current()
    begun = [event["release"] for event in journal(healthy, since - 1) if event["event"] == "begin"]
    assert now in (old, *begun)
    assert healthy.answers(90)
    facts = healthy.facts()
    (release,) = (each for each in facts["releases"] if each["id"] == now)
    assert {facts["parts"][part] for part in release["parts"].values()} == {""}
    converge(healthy, HEARTH_APP=str(other))
    assert healthy.answers(1)
    assert healthy.data() == data


def test_two_deploys_at_once(healthy: Fleet, other: Path) -> None:
    """One wins; the other names the user and start time of the winner."""
    clients = [healthy.start("deploy", "--host", "spark", "--no-trial", HEARTH_APP=str(other)) for _ in range(2)]
    said = [client.communicate(timeout=180)[0] for client in clients]
    codes = sorted(client.returncode for client in clients)
    assert codes in ([0, 63], [0, 64]), said
    assert any("@" in text and "since 20" in text for text in said), said
    converge(healthy, HEARTH_APP=str(other))


def test_upload_survives_other_clients(healthy: Fleet) -> None:
    """Another client deploys, prunes and rolls back: the facts match the first client's again; its upload remains."""
    client, app = half_uploaded(healthy)
    flag = '[hosts.spark.override.flags]\n"--preview-size" = { value = "300", why = "a test" }\n'
    release = healthy.current()
    healthy.becomes(flag)  # an upload is abandoned after 60 s of silence
    other = healthy.current()
    back = healthy.inv("rollback", "--host", "spark", "--no-trial")
    assert back.returncode == 0, back.stderr
    os.kill(client.pid, signal.SIGCONT)
    said, _ = client.communicate(timeout=180)
    code = client.returncode
    if code in (69, 64):  # it took over a minute on a slow machine, or its files were pruned
        assert "it resumes" in said or "run the same command again" in said
        again = healthy.deploy("--no-trial", HEARTH_APP=str(app))
        code, said = again.returncode, again.stderr
    assert code == 0, said
    assert healthy.current() not in (release, other)


def test_an_upload_for_a_host_that_another_client_has_changed_is_refused(healthy: Fleet) -> None:
    client, _ = half_uploaded(healthy)
    healthy.becomes('[hosts.spark.override.flags]\n"--preview-size" = { value = "400", why = "a test" }\n')
    release = healthy.current()
    os.kill(client.pid, signal.SIGCONT)
    said, _ = client.communicate(timeout=180)
    assert client.returncode == 64, said
    assert "run the same command again" in said
    assert healthy.current() == release


def half_uploaded(fleet: Fleet) -> tuple[Popen[str], Path]:
    """A client, stopped by SIGSTOP while it uploads a ComfyUI with a large file; and that ComfyUI."""
    folder = small(fleet.place, f"large-{time.monotonic_ns()}")
    (folder / "src/large.bin").write_bytes(os.urandom(60_000_000))  # new to the host
    incoming, end = fleet.prefix / "state/incoming", time.monotonic() + 60
    before = set(incoming.glob("*.part"))
    client = fleet.start("deploy", "--host", "spark", "--no-trial", HEARTH_APP=str(folder))
    while not any(0 < path.stat().st_size < 50_000_000 for path in {*incoming.glob("*.part")} - before):
        assert time.monotonic() < end
        time.sleep(0.003)
    os.kill(client.pid, signal.SIGSTOP)
    return client, folder


@pytest.mark.parametrize("damage", ["truncate -s 1000", "truncate -s 0", "sed -i s/agent/tnega/"])
def test_a_damaged_agent_is_sent_again(deployed: Fleet, damage: str) -> None:
    """As after a broken upload or a full disk: the next command repairs it."""
    agents = f"/home/{machine.LOGIN}/.cache/hearth/agent-*"
    deployed.facts()  # sends it if it is missing
    deployed.machine.run(f"{damage} {agents}")
    try:
        done = deployed.inv("facts", "--host", "spark")
    finally:
        deployed.machine.run(f"rm -f {agents}")
    assert done.returncode == 0, done.stderr


def test_rollback_ignores_the_clock(healthy: Fleet) -> None:
    """The target is the previously active release, not the one with the newest files."""
    first = healthy.current()
    with clock_set_back(healthy, 2 * 86_400):
        healthy.becomes('[hosts.spark.override.flags]\n"--preview-size" = { value = "600", why = "a test" }\n')
        second = healthy.current()
        backdate(healthy, second, 2 * 86_400)
        healthy.becomes('[hosts.spark.override.flags]\n"--preview-size" = { value = "700", why = "a test" }\n')
        backdate(healthy, healthy.current(), 2 * 86_400)
    back = healthy.inv("rollback", "--host", "spark", "--no-trial")
    assert back.returncode == 0, back.stderr
    assert healthy.current() == second != first


@contextmanager
def clock_set_back(fleet: Fleet, seconds: int) -> Iterator[None]:
    """Give Python on the host, and so the agent, an earlier time: the clock is shared with this machine."""
    place = fleet.machine.root / "etc/python3.11/sitecustomize.py"
    was = place.read_text()
    place.write_text(
        f"{was}\nimport time\n"
        f"def back(real):\n    return lambda: real() - {seconds} * (10**9 if real.__name__.endswith('_ns') else 1)\n"
        "time.time, time.time_ns, now = back(time.time), back(time.time_ns), time.time\n"
        "def of(real):\n    return lambda seconds=None: real(time.time() if seconds is None else seconds)\n"
        "time.gmtime, time.localtime = of(time.gmtime), of(time.localtime)\n"
    )
    try:
        yield
    finally:
        place.write_text(was)


def backdate(fleet: Fleet, release: str, seconds: int) -> None:
    """Set a release's file times to the shifted clock."""
    for path in (fleet.prefix / "releases" / release).iterdir():
        then = path.lstat().st_mtime - seconds
        os.utime(path, (then, then), follow_symlinks=False)


def revert_cases() -> Iterator[object]:
    """When to kill the agent: at the n-th change since the switch, or at a random time after it; two always run."""
    chance = random.Random(f"revert {SEED}")
    for number in range(12):
        yield pytest.param(number, id=f"change-{number}", marks=[] if number == 4 else [pytest.mark.faults])
    for number in range(12):
        seconds = round(chance.uniform(0, 10), 2)
        yield pytest.param(seconds, id=f"{seconds}s", marks=[] if number == 0 else [pytest.mark.faults])


def progress(fleet: Fleet) -> tuple[object, ...]:
    """The state of a cut-over on the disk; it changes with each operation."""
    state, database = fleet.prefix / "state", fleet.prefix / "data/user/comfyui.db"
    records = {
        path: read(path) for path in (*state.glob("runs/*.jsonl"), *state.glob("*.json"), state / "history.jsonl")
    }
    copies = sorted(glob.glob(f"{state}/database-*/*"))  # noqa: PTH207  Path's fails for a folder that is gone by then
    return fleet.current(), records, copies, read(database)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def ended(fleet: Fleet) -> list[str]:
    """The history: one line per finished run."""
    return (fleet.prefix / "state/history.jsonl").read_text().splitlines()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def kill_applying(fleet: Fleet) -> None:
    """kill -9 the process that applies the plan, directly: ssh and systemctl would take too long."""
    namespace = f"/proc/{fleet.machine.first}/ns/pid"
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"apply" in words and (place / "ns/pid").samefile(namespace):
                os.kill(int(place.name), signal.SIGKILL)


@pytest.mark.parametrize("when", [*revert_cases()])
def test_kill_during_rollback_of_a_migrated_database(healthy: Fleet, when: float) -> None:
    """The health gate takes 3 s, so the times reach from the gate to the end of the revert."""
    old, tables, before = healthy.current(), healthy.database(), len(ended(healthy))
    healthy.configure("[hosts.spark.override]\nstart_seconds = 3\n")
    app = small(healthy.place, f"migrates-{when}", MIGRATES)
    client = healthy.start("deploy", "--host", "spark", "--no-trial", HEARTH_APP=str(app))
    wait_until(lambda: healthy.current() != old, 120)
    if isinstance(when, int):
        left, seen = when, progress(healthy)
        while left and client.poll() is None:
            if seen != (seen := progress(healthy)):
                left -= 1
    else:
        time.sleep(when)
    kill_applying(healthy)
    said, _ = client.communicate(timeout=180)
    assert client.returncode == 66, said
    assert within(60, lambda: not (healthy.prefix / "state/pending.json").exists())
    assert healthy.current() == old
    assert healthy.answers()
    assert healthy.database() == tables
    assert healthy.records() == set()
    (line,) = ended(healthy)[before:]
    assert json.loads(line)["result"] == "reverted"
    shutil.rmtree(app)


@pytest.mark.faults
def test_a_first_deploy_interrupted_at_every_step(tmp_path: Path) -> None:
    """The agent is killed at each step in turn; systemd restarts it each time, and it gets further."""
    with fresh(tmp_path, "first", Fleet, bare=True, downloads=True) as first:
        first.machine.boot()
        since = time.time()
        client = first.start("deploy", "--host", "spark")
        for step in FIRST:
            wait_for_step(first, step, since)
            kill_agent(first, client.pid)
        said, _ = client.communicate(timeout=600)
        assert client.returncode == 0, said
        converge(first)
        assert first.answers(1)


@pytest.mark.parametrize(("lacking", "said"), [("blocks", "free at /srv/blocks/c"), ("inodes", "inodes free at")])
def test_a_full_disk(deployed: Fleet, lacking: str, said: str) -> None:
    """A prefix on a small file system: refused in advance, or reported if it fills up during the run."""
    port = machine.free_port()
    deployed.configure()
    text = (deployed.place / "hosts.toml").read_text().replace(str(deployed.machine.port), str(port))
    (deployed.place / "hosts.toml").write_text(
        f'{text}prefix = "/srv/{lacking}/c"\nservice = "small"\nrun_as = "small-{lacking}"\n'
    )
    try:
        refused = deployed.deploy()
        app = deployed.comfyui(lacking, {})
        recipe = re.sub(r"^size = .*$", "size = -9_000_000_000", (app / "app.toml").read_text(), flags=re.MULTILINE)
        (app / "app.toml").write_text(re.sub(r"^files = .*$", "files = -36_000", recipe, flags=re.MULTILINE))
        full = deployed.deploy(HEARTH_APP=str(app))
    finally:
        deployed.configure()
    assert refused.returncode == 63
    assert said in refused.stderr
    assert (full.returncode, kind_of(full.stderr)) == (69, "disk-full"), full.stderr
    assert "then run the same command again" in full.stderr
    assert not (deployed.machine.place / f"disks/{lacking}/c/current").exists()
    assert deployed.answers(1)  # the other service on the same host
