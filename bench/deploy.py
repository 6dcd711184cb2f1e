"""Deploys against peers, side by side on one host in one run: writes docs/benchmarks-deploy.md.

    uv run python -m bench.deploy

As root, with debootstrap and systemd-container: the host is a Debian booted by systemd-nspawn, reached over SSH at
127.0.0.1. ansible-core and pyinfra are installed from the index into an environment of their own.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.kernels import machine as this_machine
from core import files
from tests.host.fleet import PREFIX, Fleet
from tests.host.machine import Machine, free_port

PEERS = Path(__file__).with_name("peers")
RUNS = 7


@dataclass(frozen=True)
class Revision:
    """A deploy of a new ComfyUI revision with the same environment: seconds, what was sent, seconds without service."""

    wall: float
    sent: str
    outage: float


def timed(argv: list[str], cwd: Path, env: dict[str, str]) -> float:
    """Wall seconds of a command; fails loudly when it fails.

    Python may cache what it compiles, whatever this shell says: that is how people run all three.
    """
    env = {name: value for name, value in env.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.monotonic()
    done = subprocess.run(argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
    return time.monotonic() - started


def first_deploy(place: Path, *, warm: bool) -> tuple[Fleet, float]:
    """A machine of its own with ComfyUI deployed to it, and how long that took; `warm`: uv's downloads are there."""
    machine = Machine(place / "machine", prefix=PREFIX, downloads=warm)
    fleet = Fleet(machine, place)
    fleet.configure()
    machine.boot()
    return fleet, timed(fleet.command("deploy", "--host", "spark"), files.CHECKOUT, fleet.environment())


def converged(fleet: Fleet, work: Path) -> dict[str, float]:
    """Median seconds of a run that changes nothing, in turns: Hearth, pyinfra, Ansible."""
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
    commands = {
        "hearth": fleet.command("deploy", "--host", "spark"),
        "pyinfra": [str(tools / "bin/pyinfra"), "-y", str(work / "inventory.py"), str(PEERS / "pyinfra_deploy.py")],
        "ansible": [str(tools / "bin/ansible-playbook"), "-i", str(inventory), *extra, str(PEERS / "playbook.yml")],
    }
    fleet.machine.run("apt-get update -qq && apt-get install -qq -y python3-venv acl")
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(RUNS + 1):
        for name in ("ansible", "pyinfra", "hearth"):  # Ansible first: its first run makes what pyinfra finds
            cwd = files.CHECKOUT if name == "hearth" else work
            spent = timed(commands[name], cwd, fleet.environment())
            if turn:  # the first turn converges
                seconds[name].append(spent)
    return {name: statistics.median(each) for name, each in seconds.items()}


def new_revision(fleet: Fleet) -> Revision:
    """Deploy a ComfyUI with one changed file while somebody asks for it a hundred times a second."""
    app = fleet.comfyui("revision", {"nodes.py": (r"\A", "# another revision\n")})
    gaps: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        last = time.monotonic()
        while not stop.is_set():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{fleet.machine.port}/queue", timeout=1):
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()
            except OSError:
                pass
            time.sleep(0.01)

    watcher = threading.Thread(target=ask)
    watcher.start()
    started = time.monotonic()
    done = fleet.deploy(HEARTH_APP=str(app))
    wall = time.monotonic() - started
    stop.set()
    watcher.join()
    if done.returncode:
        raise SystemExit(done.stderr)
    found = re.search(r"sending \d+ files, (.+)", done.stderr)
    return Revision(wall, found[1] if found else "nothing", max(gaps))


def main() -> None:
    """Run everything and write the page."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=files.cache()) as name:
        work = Path(name)
        (work / "warm").mkdir()
        (work / "cold").mkdir()
        cold_fleet, cold = first_deploy(work / "cold", warm=False)
        cold_fleet.machine.discard()
        fleet, warm = first_deploy(work / "warm", warm=True)
        try:
            idle = converged(fleet, work)
            revision = new_revision(fleet)
        finally:
            fleet.machine.discard()
    page = PAGE.format(
        date=datetime.now(UTC).date(),
        machine=this_machine(),
        idle=idle,
        ansible=idle["hearth"] / idle["ansible"],
        pyinfra=idle["hearth"] / idle["pyinfra"],
        revision=revision,
        cold=cold,
        warm=warm,
        runs=RUNS,
    )
    (files.CHECKOUT / "docs/benchmarks-deploy.md").write_text(page)
    print(page)


PAGE = """\
# Benchmarks of deploys

Written by `uv run python -m bench.deploy`, in one run, on {date}, on {machine}.
The host is a Debian 12 booted by systemd-nspawn on the same machine, reached over SSH at 127.0.0.1. Ratios hold on
other machines; seconds do not.

## A run with nothing to do (median of {runs}, in turns)

The peers keep a service of the same shape (packages, user, folders, source, environment, unit, answer), with three
small packages in its environment: `bench/peers/`. Hearth looks through every file of what it deployed.

| | s | Hearth / it |
| --- | ---: | ---: |
| `inv deploy` | {idle[hearth]:.2f} | |
| pyinfra 3.10 | {idle[pyinfra]:.2f} | {pyinfra:.2f} |
| ansible-core 2.19 | {idle[ansible]:.2f} | {ansible:.2f} |

## ComfyUI 0.30.0 on a CPU, Python 3.11

| | |
| --- | ---: |
| first deploy, nothing downloaded before, s | {cold:.0f} |
| first deploy, uv's downloads there, s | {warm:.0f} |
| a new revision (one file), the same environment, s | {revision.wall:.1f} |
| sent for it | {revision.sent} |
| longest time without an answer meanwhile, s | {revision.outage:.1f} |
"""

if __name__ == "__main__":
    main()
