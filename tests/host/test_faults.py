"""Interruptions on a real host: whatever is cut and whenever, what is in service is the old release or the new.

The idea is ostree's (tests/inst/src/destructive.rs). `--faults` runs every kind at every step and at random times.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.host import machine
from tests.host.fleet import Fleet, fresh

pytestmark = pytest.mark.host

STEPS = ["make app", "write release", "import torch", "cut over", "prune"]
"""The start of the title of each step of a deploy that changes ComfyUI's tree."""

FIRST = ["create the system user", "lay out", "make app", "send uv", "make env", "write release", "import torch"]
"""The same for a first deploy, up to the cut-over."""


def kill_client(_: Fleet, client: int) -> None:
    """kill -9 for the command that the user started."""
    import os
    import signal

    os.kill(client, signal.SIGKILL)


def kill_agent(fleet: Fleet, _: int) -> None:
    """kill -9 for whatever applies the plan on the host."""
    fleet.machine.run("systemctl kill --signal=KILL --kill-whom=all comfyui-apply", check=False)


def cut_connection(fleet: Fleet, _: int) -> None:
    """The network goes: sshd's process for the session is gone, at once."""
    fleet.machine.run("pkill -9 -f 'sshd: deployer'", check=False)


def cut_power(fleet: Fleet, _: int) -> None:
    """Everything on the host is gone at once; then it boots."""
    fleet.machine.power_off()
    fleet.machine.boot()


KINDS: dict[str, Callable[[Fleet, int], None]] = {
    "client": kill_client,
    "agent": kill_agent,
    "connection": cut_connection,
    "power": cut_power,
}


def cases() -> Iterator[object]:
    """(kind, step or seconds): every kind at every step, and 24 random times; a handful of them always runs."""
    always = {("agent", "cut over"), ("power", "cut over"), ("client", "make app"), ("connection", "import torch")}
    for kind in KINDS:
        for step in STEPS:
            marks = [] if (kind, step) in always else [pytest.mark.faults]
            yield pytest.param(kind, step, id=f"{kind}-{step.replace(' ', '-')}", marks=marks)
    chance = random.Random(3)
    for number in range(24):
        kind, seconds = chance.choice(sorted(KINDS)), round(chance.uniform(0, 20), 2)
        yield pytest.param(kind, seconds, id=f"{kind}-{seconds}s", marks=[pytest.mark.faults] if number else [])


@pytest.fixture
def other(deployed: Fleet, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Another ComfyUI to deploy, as healthy and of a tree that the host has not seen: every step has work to do."""
    name = re.sub(r"\W", "-", request.node.name)
    yield deployed.comfyui(name, {"README.md": (r"\A", f"{name}\n")})
    shutil.rmtree(deployed.place / "apps" / name)


def journal(fleet: Fleet, since: float) -> list[dict[str, object]]:
    """The events of the run that began after `since`."""
    events: list[dict[str, object]] = []
    for path in (fleet.prefix / "state/runs").glob("*.jsonl"):
        if path.stat().st_mtime >= since:
            for line in path.read_text().splitlines():
                try:
                    events.append(json.loads(line))
                except ValueError:
                    continue
    return events


def wait_for_step(fleet: Fleet, title: str, since: float) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if any(str(event.get("title", "")).startswith(title) for event in journal(fleet, since)):
            return
        time.sleep(0.003)
    raise AssertionError(f"step {title!r} never began: {journal(fleet, since)}")


def converge(fleet: Fleet, **env: str) -> None:
    """Deploy until nothing is left to do: a run that goes on by itself is waited for."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        done = fleet.deploy(**env)
        if done.returncode == 0:
            break
        assert done.returncode in (63, 64), done.stderr  # a change is under way
        fleet.inv("attach", "--host", "spark")
    again = fleet.deploy("--dry-run", **env)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(("kind", "when"), list(cases()))
def test_an_interrupted_deploy_leaves_the_old_release_or_the_new(
    steady: Fleet, other: Path, kind: str, when: str | float
) -> None:
    old, data = steady.current(), steady.data()
    since = time.time()
    client = steady.start("deploy", "--host", "spark", HEARTH_APP=str(other))
    if isinstance(when, str):
        wait_for_step(steady, when, since - 1)
    else:
        time.sleep(when)
    KINDS[kind](steady, client.pid)
    try:
        client.communicate(timeout=180)
    finally:
        client.kill()
    assert (steady.prefix / "current").is_symlink()
    now = steady.current()
    begun = [event["release"] for event in journal(steady, since - 1) if event["event"] == "begin"]
    assert now in (old, *begun)
    assert steady.answers(90)
    facts = steady.facts()
    (release,) = (each for each in facts["releases"] if each["id"] == now)
    assert {facts["parts"][part] for part in release["parts"].values()} == {""}
    converge(steady, HEARTH_APP=str(other))
    assert steady.answers(1)
    assert steady.data() == data


def test_two_deploys_at_once(steady: Fleet, other: Path) -> None:
    """One wins; the other says who is at it, and since when."""
    clients = [steady.start("deploy", "--host", "spark", HEARTH_APP=str(other)) for _ in range(2)]
    said = [client.communicate(timeout=180)[0] for client in clients]
    codes = sorted(client.returncode for client in clients)
    assert codes in ([0, 63], [0, 64]), said
    assert any("@" in text and "since 20" in text for text in said), said
    converge(steady, HEARTH_APP=str(other))


@pytest.mark.faults
def test_a_first_deploy_interrupted_at_every_step(tmp_path: Path) -> None:
    """The agent is killed at each step in turn; each time systemd starts it again, and it gets further."""
    with fresh(tmp_path, "first", Fleet) as first:
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
    """A prefix on a small file system: refused when that is known, told apart when it fills up on the way."""
    port = machine.free_port()
    text = (deployed.place / "hosts.toml").read_text().replace(str(deployed.machine.port), str(port))
    (deployed.place / "hosts.toml").write_text(f'{text}prefix = "/srv/{lacking}/c"\nservice = "small"\n')
    try:
        refused = deployed.deploy()
        app = deployed.comfyui(lacking, {})
        recipe = (app / "app.toml").read_text().replace("6_200_000_000", "-9_000_000_000").replace("66_000", "-10_000")
        (app / "app.toml").write_text(recipe)
        full = deployed.deploy(HEARTH_APP=str(app))
    finally:
        deployed.configure()
    assert refused.returncode == 63
    assert said in refused.stderr
    assert full.returncode == 42, full.stderr
    assert "then run the same command again" in full.stderr
    assert not (deployed.machine.place / f"disks/{lacking}/c/current").exists()
    assert deployed.answers(1)  # the other service on the same host
