"""Fetching and resolving all known custom nodes: writes docs/benchmarks-nodes.md.

uv run python -m bench.nodes

git daemon serves the repositories on this machine, behind a relay with 100 Mbit/s and 20 or 40 ms each way
(`bench/link.py`; not every kernel has netem). Their histories are fetched from upstream once, into Hearth's cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.kernels import machine as this_machine
from bench.repositories import served
from core import files, workspace
from core.stack import find_stack
from lock import nodes, requirements, resolution
from lock.application import application
from lock.requirements import LockedList

DELAYS = (0.020, 0.040)
FETCH = """
import sys, time
from lock import nodes
known, started = nodes.catalogue().nodes, time.monotonic()
nodes.fetch(known, parallel=int(sys.argv[1]))
print(time.monotonic() - started)
"""

SUBMODULES = {"ultimate-upscale": "https://github.com/Coyote-A/ultimate-upscale-for-automatic1111"}
"""The submodules of some nodes, which are fetched, too."""


def repositories() -> dict[str, str]:
    """The addresses of all repositories, by name."""
    return {name: node.url for name, node in nodes.catalogue().nodes.items()} | SUBMODULES


def mirrors(place: Path) -> None:
    """A bare mirror of each repository below `place`, by name."""
    kept = workspace.current().cache / "bench-mirrors"
    kept.mkdir(parents=True, exist_ok=True)
    for name, url in repositories().items():
        asked = subprocess.run(["git", "ls-remote", "--get-url", url], capture_output=True, text=True, check=True)
        here = Path(asked.stdout.strip().removeprefix("file://"))  # the user's mirror, by url.<mirror>.insteadOf
        if not here.is_dir():
            here = kept / f"{name}.git"
            if not here.exists():
                subprocess.run(["git", "clone", "--quiet", "--mirror", url, here], check=True)
        (place / name).symlink_to(here)


def fetched(environment: dict[str, str], parallel: int) -> float:
    """Seconds to fetch all nodes into an empty cache, with that many in parallel."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-") as cache:
        done = subprocess.run(
            [sys.executable, "-c", FETCH, str(parallel)],
            cwd=files.CHECKOUT,
            env={**environment, "HEARTH_CACHE": cache},
            check=True,
            capture_output=True,
            text=True,
        )
        return float(done.stdout)


def cloned(environment: dict[str, str]) -> float:
    """Seconds to clone all nodes with their histories one after another, as people do by hand."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-") as place:
        started = time.monotonic()
        for name, node in nodes.catalogue().nodes.items():
            subprocess.run(
                ["git", "clone", "--quiet", node.url, f"{place}/{name}"],
                env=environment,
                check=False,
                stderr=subprocess.DEVNULL,
            )
        return time.monotonic() - started


def resolved() -> float:
    """Seconds to resolve one list from scratch, with uv's cache of the index."""
    app, known = application(), nodes.catalogue()
    asked = requirements.requirement_inputs(app, known)
    started, empty = time.monotonic(), LockedList(find_stack().name, "linux_x86_64", "3.12", "")
    with tempfile.TemporaryDirectory(prefix="hearth-bench-") as place:
        resolution.Resolver(Path(place), asked, known, find_stack(), empty).compiled()
    return time.monotonic() - started


def checked() -> float:
    """Seconds of `inv lock --check` without changes."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "invoke", "lock", "--check"], cwd=files.CHECKOUT, check=True, stderr=subprocess.DEVNULL
    )
    return time.monotonic() - started


def row(place: Path, delay: float) -> str:
    """One line of the table: a link's delay, and the three methods over it."""
    with served(place, repositories(), delay) as link:
        together, single = (min(fetched(link, count) for _ in range(3)) for count in (nodes.PARALLEL, 1))
        by_hand = cloned(link)
    others = " | ".join(f"{each:.1f} s, {each / together:.1f} times" for each in (single, by_hand))
    return f"| {delay * 1000:.0f} ms | {together:.1f} s | {others} |"


def main() -> None:
    """Run everything and write the page."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-") as name:
        place = Path(name)
        mirrors(place)
        rows = [row(place, delay) for delay in DELAYS]
    page = PAGE.format(
        date=datetime.now(UTC).date(),
        machine=this_machine(),
        count=len(nodes.catalogue().nodes),
        parallel=nodes.PARALLEL,
        rows="\n".join(rows),
        resolve=resolved(),
        check=min(checked() for _ in range(3)),
    )
    (files.CHECKOUT / "docs/benchmarks-nodes.md").write_text(page)
    print(page)


PAGE = """\
# Benchmarks of custom nodes

Written by `uv run python -m bench.nodes`, in one run, on {date}, on {machine}.
{count} repositories, served from the same machine over a link of 100 Mbit/s with a delay in each direction
(`bench/link.py`), so the server uses the same cores. The fastest of three runs; one run of `git clone`.

| delay | {parallel} at a time, one commit each | one commit each, sequentially | `git clone`, sequentially |
| ---: | ---: | ---: | ---: |
{rows}

| | s |
| --- | ---: |
| ComfyUI and {count} nodes resolved, one list, index metadata cached | {resolve:.1f} |
| `inv lock --check`, no changes | {check:.2f} |
"""

if __name__ == "__main__":
    main()
