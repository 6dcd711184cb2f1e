"""The metrics exporter's memory and CPU use. Writes its section of docs/benchmarks-ops.md.

uv run python -m bench.exporter

As root, with debootstrap and systemd-container.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.kernels import machine as this_machine
from core import files, workspace
from tests.host.fleet import Fleet, fresh
from tests.host.machine import free_port
from tests.host.test_gpu import driver
from tests.host.test_metrics import UNIT, scrape, submit

SCRAPES, APART, INTERVAL = 40, 1.1, 15.0
"""Scrapes per series, the seconds between them (answers are cached for one second), Prometheus's interval."""


def spent(fleet: Fleet) -> tuple[float, float]:
    """CPU seconds of the exporter and its child processes, and its peak memory in MB."""
    place = f"/proc/$(systemctl show {UNIT} --property=MainPID --value)"
    stat, status = fleet.machine.run(f"cat {place}/stat; echo ---; cat {place}/status").split("---")
    ticks = sum(map(int, stat.rpartition(")")[2].split()[11:15]))  # utime, stime, cutime, cstime: proc(5)
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak
    return ticks / os.sysconf("SC_CLK_TCK"), int(peak[1]) * 1024 / 1e6


def series(fleet: Fleet, port: int, *, jobs: bool) -> tuple[float, float, float]:
    """CPU seconds per scrape, peak memory in MB, and median seconds per scrape."""
    before, _ = spent(fleet)
    taken: list[float] = []
    for _ in range(SCRAPES):
        if jobs:
            submit(fleet, "bench/one")
        time.sleep(APART)
        started = time.monotonic()
        scrape(port)
        taken.append(time.monotonic() - started)
    after, peak = spent(fleet)
    return (after - before) / SCRAPES, peak, statistics.median(taken)


def section(fleet: Fleet) -> str:
    """The exporter's section of the page, measured on a host with the real ComfyUI."""
    port = free_port()
    fleet.configure(f"metrics_port = {port}\n")
    done = fleet.deploy()
    if done.returncode:
        raise SystemExit(done.stderr)
    with driver(fleet, "rtx-4070"):
        scrape(port)  # the first scrape opens the driver's library
        idle = series(fleet, port, jobs=False)
        busy = series(fleet, port, jobs=True)
    rows = [
        f"| {name} | {peak:.1f} | {cpu * 1000:.1f} | {cpu / INTERVAL:.2%} | {wall * 1000:.0f} |"
        for name, (cpu, peak, wall) in (("idle", idle), ("a job ends before each scrape", busy))
    ]
    return SECTION.format(
        date=datetime.now(UTC).date(), machine=this_machine(), rows="\n".join(rows), scrapes=SCRAPES, apart=APART
    )


def main() -> None:
    """Measure, and replace the section."""
    with (
        tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=workspace.current().cache) as name,
        fresh(Path(name), "bench", Fleet) as fleet,
    ):
        fleet.machine.boot()
        text = section(fleet)
    place = files.CHECKOUT / "docs/benchmarks-ops.md"
    place.write_text(place.read_text().partition(HEADING)[0] + text)
    sys.stdout.write(text)


HEADING = "\n## The exporter\n"

SECTION = (
    HEADING
    + """
Measured by `uv run python -m bench.exporter` on {date}, on {machine}, on that host. {scrapes} scrapes,
{apart} s apart. The CPU time of a scrape, including the `systemctl` that it starts, divided by 15 s, is the share of a
core when Prometheus scrapes every 15 s. Memory is the peak resident set of the process. The targets were 30 MB and
0.5 %. The driver's library is a small one of the tests; NVIDIA's needs more memory, which was not measured.

| ComfyUI | Memory, MB | CPU per scrape, ms | Share of a core | Response time, ms |
| --- | ---: | ---: | ---: | ---: |
{rows}
"""
)

if __name__ == "__main__":
    main()
