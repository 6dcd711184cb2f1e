"""Operating hosts: status of one and of twenty, and the doctor. Writes docs/benchmarks-ops.md.

uv run python -m bench.ops

As root, with debootstrap and systemd-container. The twenty hosts are twenty sshd on one Debian booted by
systemd-nspawn, each with its own port and prefix: its two cores do the work of twenty machines.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.kernels import machine as this_machine
from core import files, workspace
from tests.host.fleet import PREFIX, Fleet, fresh
from tests.host.machine import free_port

HOSTS, RUNS = 20, 7


def timed(fleet: Fleet, *words: str, codes: tuple[int, ...] = (0,)) -> float:
    """Median wall seconds of a command, including Python's start."""
    env = {name: value for name, value in fleet.environment().items() if name != "PYTHONDONTWRITEBYTECODE"}
    spent: list[float] = []
    for _ in range(RUNS + 1):
        started = time.monotonic()
        done = subprocess.run(fleet.command(*words), cwd=files.CHECKOUT, env=env, capture_output=True, text=True)
        spent.append(time.monotonic() - started)
        if done.returncode not in codes:
            raise SystemExit(f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return statistics.median(spent[1:])  # the first compiles Python's bytecode and sends the agent


def multiply(fleet: Fleet) -> None:
    """Start twenty sshd on the machine, each with a prefix of the same release, its parts shared by hard links."""
    machine = fleet.machine
    ports = [free_port() for _ in range(HOSTS)]
    for number, port in enumerate(ports):
        machine.run(f"systemd-run --quiet --unit=sshd-{number} /usr/sbin/sshd -D -p {port} -o PidFile=none")
        if number:
            machine.run(f"cp -al {PREFIX} /opt/host{number} && rm -rf /opt/host{number}/state/verified.json")
    named = "".join(
        f'[hosts.host{number}]\naddress = "host{number}"\nprofile = "cpu"\nport = {machine.port}\n'
        + (f'prefix = "/opt/host{number}"\n' if number else "")
        for number in range(HOSTS)
    )
    listed = ", ".join(f'"host{number}"' for number in range(HOSTS))
    fleet.configure(f"{named}[groups]\nall = [{listed}]\n")
    config = (machine.place / "ssh_config").read_text()
    known = (machine.place / "known_hosts").read_text().split("]:")[1].partition(" ")[2]
    with (machine.place / "known_hosts").open("a") as hosts:
        hosts.writelines(f"[127.0.0.1]:{port} {known}" for port in ports)
    for number, port in enumerate(ports):
        block = re.sub(r"^Host .*", f"Host host{number}", config, flags=re.MULTILINE)
        config_path = machine.place / "ssh_config"
        with config_path.open("a") as text:
            text.write("\n" + re.sub(r"Port \d+", f"Port {port}", block))


def main() -> None:
    """Run everything and write the page."""
    with (
        tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=workspace.current().cache) as name,
        fresh(Path(name), "bench", Fleet) as fleet,
    ):
        fleet.machine.boot()
        done = fleet.deploy()
        if done.returncode:
            raise SystemExit(done.stderr)
        one = timed(fleet, "status", "--host", "spark")
        doctor = timed(fleet, "doctor", "--host", "spark", codes=(0, 1))
        multiply(fleet)
        # only one of the twenty prefixes has the service: its absence is drift on the others, and reported like any
        # other
        many = timed(fleet, "status", "--group", "all", codes=(0, 1))
    page = PAGE.format(
        date=datetime.now(UTC).date(), machine=this_machine(), one=one, doctor=doctor, many=many, hosts=HOSTS, runs=RUNS
    )
    place = files.CHECKOUT / "docs/benchmarks-ops.md"
    _, heading, others = place.read_text().partition("\n## ")  # other benchmarks' sections
    place.write_text(page + heading + others)
    sys.stdout.write(page)


PAGE = """\
# Benchmarks of operating hosts

Written by `uv run python -m bench.ops`, in one run, on {date}, on {machine}.
The host is a Debian 12 booted by systemd-nspawn on the same machine, reached over SSH at 127.0.0.1, with the real
ComfyUI 0.30.0 on a CPU. Medians of {runs} runs of the whole command.

| | target, s | s |
| --- | ---: | ---: |
| `inv status`, one host | 1.0 | {one:.2f} |
| `inv status`, {hosts} hosts ({hosts} sshd and prefixes on that one machine) | 3.0 | {many:.2f} |
| `inv doctor`, one host | 3.0 | {doctor:.2f} |
"""

if __name__ == "__main__":
    main()
