"""Deploys against other tools, side by side on one host in one run: writes docs/benchmarks-deploy.md.

uv run python -m bench.deploy [--before CHECKOUT] [--runs N]

As root, with debootstrap and systemd-container. The host is a Debian booted by systemd-nspawn, reached over SSH at
127.0.0.1. ansible-core and pyinfra are installed from the index into a separate environment. `--before` also measures
the `inv` of another checkout (such as a worktree of an older commit after `uv sync`) on a separate host, and adds it
to the page.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bench.kernels import machine as this_machine
from core import files, workspace
from tests.host.fleet import PREFIX, Fleet
from tests.host.machine import Machine, free_port
from tests.host.test_deploy import broken

PEERS = Path(__file__).with_name("peers")
RUNS = 7
UPDATES = 3
GATE = 30
"""Seconds until a release that does not answer fails the health gate. A profile's value would only take longer."""


@dataclass
class Watch:
    """A client that polls ComfyUI a hundred times a second; `gap` is the longest outage in seconds."""

    gap: float = 0.0


@dataclass
class Side:
    """One checkout's `inv`, a host that it deployed to, and the measured seconds."""

    name: str
    fleet: Fleet
    cold: float
    warm: float
    idle: float = 0.0
    sent: str = ""
    updates: list[float] = field(default_factory=list)
    outages: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    broken: dict[str, float] = field(default_factory=dict)


@contextmanager
def watched(fleet: Fleet) -> Iterator[Watch]:
    """Poll ComfyUI while the context lasts; it must answer at the start and at the end."""
    watch, stop = Watch(), threading.Event()

    def asked() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{fleet.machine.port}/queue", timeout=1):
                return True
        except OSError:
            return False

    def ask() -> None:
        last = time.monotonic()
        answered = False
        while not (answered and stop.is_set()):
            if answered := asked():
                watch.gap = max(watch.gap, time.monotonic() - last)
                last = time.monotonic()
            time.sleep(0.01)

    assert fleet.answers()
    watcher = threading.Thread(target=ask)
    watcher.start()
    try:
        yield watch
    finally:
        stop.set()
        watcher.join()


def timed(argv: list[str], cwd: Path, env: dict[str, str]) -> float:
    """Wall seconds of a command; raises if it fails.

    Python may cache bytecode, regardless of this shell's settings, since people run all three tools that way.
    """
    env = {name: value for name, value in env.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.monotonic()
    done = subprocess.run(argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - started


def host(place: Path, checkout: Path, downloads: Path | None) -> Fleet:
    """A machine, not booted, for a checkout's `inv`; shares uv's cache in `downloads`."""
    place.mkdir()
    if downloads:
        os.environ["UV_CACHE_DIR"] = str(downloads)
    try:
        fleet = Fleet(Machine(place / "machine", prefix=PREFIX, downloads=downloads is not None), place)
    finally:
        os.environ.pop("UV_CACHE_DIR", None)
    fleet.checkout = checkout
    if checkout != files.CHECKOUT:
        fleet.python = str(checkout / ".venv/bin/python")
    fleet.configure()
    return fleet


def first_deploy(fleet: Fleet) -> float:
    """The seconds of a first deploy."""
    fleet.machine.boot()
    return timed(fleet.command("deploy", "--host", "spark"), fleet.checkout, fleet.environment())


def side(stack: ExitStack, name: str, work: Path, checkout: Path) -> Side:
    """Two first deploys, the second with the downloads of the first; its host remains."""
    fresh = host(work / f"{name}-cold", checkout, None)
    stack.callback(fresh.machine.discard)
    cold = first_deploy(fresh)
    fleet = host(work / f"{name}-warm", checkout, fresh.machine.disk / f"upper{PREFIX}/state/cache/uv")
    stack.callback(fleet.machine.discard)
    fresh.machine.discard()
    return Side(name, fleet, cold, first_deploy(fleet))


def idle(sides: list[Side], work: Path, runs: int) -> dict[str, float]:
    """Median seconds of a run without changes, in turns: Ansible, pyinfra, and each side's `inv`."""
    fleet = sides[-1].fleet
    tools = work / "peers"
    subprocess.run(["uv", "venv", "-q", "-p", "3.11", tools], check=True)
    packages = ["ansible-core==2.19.4", "pyinfra==3.10"]
    subprocess.run(["uv", "pip", "install", "-q", "-p", tools / "bin/python", *packages], check=True)
    source = work / "source.tar.gz"
    (work / "ComfyUI").mkdir()
    (work / "ComfyUI/main.py").write_text("print()\n")
    subprocess.run(["tar", "-C", work, "-czf", source, "ComfyUI"], check=True)
    port, config = str(free_port()), fleet.machine.place / "ssh_config"
    inventory = work / "inventory.ini"
    inventory.write_text(
        f"[all]\nspark ansible_ssh_common_args='-F {config}' ansible_python_interpreter=/usr/bin/python3"
    )
    data = {"ssh_config_file": str(config), "service_port": port}
    (work / "inventory.py").write_text(f"hosts = [('spark', {data!r})]\n")
    extra = ["-e", f"service_port={port}", "-e", f"source={source}"]
    # Ansible first: its first run creates the files that pyinfra then finds
    playbook = [str(tools / "bin/ansible-playbook"), "-i", str(inventory), *extra, str(PEERS / "playbook.yml")]
    pyinfra = [str(tools / "bin/pyinfra"), "-y", str(work / "inventory.py"), str(PEERS / "pyinfra_deploy.py")]
    commands = {"ansible": (playbook, work, fleet), "pyinfra": (pyinfra, work, fleet)}
    for each in sides:
        commands[each.name] = (each.fleet.command("deploy", "--host", "spark"), each.fleet.checkout, each.fleet)
    fleet.machine.run("apt-get update -qq && apt-get install -qq -y python3-venv acl")
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, (argv, cwd, owner) in commands.items():
            spent = timed(argv, cwd, owner.environment())
            if turn:  # the first turn converges
                seconds[name].append(spent)
    return {name: statistics.median(each) for name, each in seconds.items()}


def update(one: Side) -> None:
    """In turns, restart ComfyUI and deploy one with a changed file; measures the downtime of each."""
    for number in range(UPDATES):
        with watched(one.fleet) as watch:
            one.fleet.machine.run("systemctl restart comfyui")
        one.restarts.append(watch.gap)
        app = one.fleet.comfyui(f"revision-{number}", {"nodes.py": (r"\A", f"# revision {number}\n")})
        started = time.monotonic()
        with watched(one.fleet) as watch:
            done = one.fleet.deploy(HEARTH_APP=str(app))
            one.updates.append(time.monotonic() - started)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = re.search(r"sending \d+ files, (.+)", done.stderr)
        one.sent = found[1] if found else "nothing"
        one.outages.append(watch.gap)


def breaks(one: Side) -> None:
    """Deploy a release that does not start; measures the downtime until the previous release is back."""
    one.fleet.configure(f"[hosts.spark.override]\nstart_seconds = {GATE}\n")
    for name, line in BROKEN.items():
        app = one.fleet.comfyui(name, broken(line))
        with watched(one.fleet) as watch:
            done = one.fleet.deploy(HEARTH_APP=str(app))
        if done.returncode != 66:
            raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        one.broken[name] = watch.gap


BROKEN = {"exits": "import sys; sys.exit(5)", "hangs": "import time; time.sleep(1000)"}
"""Lines at the start of ComfyUI's main.py."""


def main() -> None:
    """Run everything and write the page."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, measured beside this one")
    parser.add_argument("--runs", type=int, default=RUNS, help="turns of the run with nothing to do")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=workspace.current().cache) as name,
        ExitStack() as stack,
    ):
        work = Path(name)
        checkouts = {"before": options.before.resolve()} if options.before else {}
        sides = [side(stack, name, work, path) for name, path in {**checkouts, "now": files.CHECKOUT}.items()]
        seconds = idle(sides, work, options.runs)
        for one in sides:
            update(one)
            breaks(one)
        text = page(sides, seconds, options.runs)
        (files.CHECKOUT / "docs/benchmarks-deploy.md").write_text(text)
        print(text)


def table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A Markdown table: each row has a label and a number per column."""
    lines = [["", *head], ["---", *["---:"] * len(head)], *([label, *values] for label, values in rows)]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines)


def page(sides: list[Side], seconds: dict[str, float], runs: int) -> str:
    """docs/benchmarks-deploy.md."""
    titles = {"pyinfra": "pyinfra 3.10", "ansible": "ansible-core 2.19", "now": "`inv deploy`"}
    titles["before"] = "`inv deploy`, before"
    peers = [
        (titles[name], [f"{seconds[name]:.2f}", "" if name == "now" else f"{seconds['now'] / seconds[name]:.2f}"])
        for name in titles
        if name in seconds
    ]

    def row(label: str, value: Callable[[Side], float]) -> tuple[str, list[str]]:
        return label, [f"{value(one):.1f}" for one in sides]

    def median(value: Callable[[Side], list[float]]) -> Callable[[Side], float]:
        return lambda one: statistics.median(value(one))

    downtime = [
        row("ComfyUI restarted (`systemctl restart`), s", median(lambda one: one.restarts)),
        row("update to a healthy release, s", median(lambda one: one.outages)),
        row(f"update to a release that exits immediately, s ({GATE} s to start)", lambda one: one.broken["exits"]),
        row(f"update to a release that never answers, s ({GATE} s to start)", lambda one: one.broken["hangs"]),
    ]
    duration = [
        row("first deploy, empty cache, s", lambda one: one.cold),
        row("first deploy, uv's cache filled, s", lambda one: one.warm),
        row("a new revision (one file), the same environment, s", median(lambda one: one.updates)),
        ("sent for that update", [one.sent for one in sides]),
    ]
    head = [one.name if len(sides) > 1 else "" for one in sides]
    return PAGE.format(
        date=datetime.now(UTC).date(),
        machine=this_machine(),
        runs=runs,
        updates=UPDATES,
        peers=table(["s", "Hearth / tool"], peers),
        downtime=table(head, downtime),
        duration=table(head, duration),
    )


PAGE = """\
# Benchmarks of deploys

Written by `uv run python -m bench.deploy`, in one run, on {date}, on {machine}.
The host is a Debian 12 booted by systemd-nspawn on the same machine, reached over SSH at 127.0.0.1. Ratios are
comparable on other machines; seconds are not. "Before" is the `inv` of an older commit (`--before CHECKOUT`), in the
same run on a host of the same kind.

## A deploy without changes (median of {runs}, alternating)

The other tools manage a service of the same shape (packages, user, folders, source, environment, unit, answer), with
three small packages in its environment: `bench/peers/`. Hearth checks every file that it deployed.

{peers}

## Downtime (ComfyUI 0.30.0 on a CPU)

The longest time between two answers while a client asks a hundred times a second. Restart and healthy update alternate,
and the median of {updates} is shown. During a trial, two ComfyUIs share the cores: tenths of a second are late answers
of a service that was not stopped.

{downtime}

## Duration (ComfyUI 0.30.0 on a CPU, Python 3.11)

{duration}
"""

if __name__ == "__main__":
    main()
