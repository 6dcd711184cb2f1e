"""Listing newer versions, and previewing an update: writes docs/benchmarks-update.md.

uv run python -m bench.update

Repositories made here stand for ComfyUI, the nodes and the kernels. git daemon serves them behind a relay with
100 Mbit/s and a round trip of 40 or 80 ms (`bench/link.py`). Packages come from the user's index.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import tomli

from bench.kernels import machine as this_machine
from bench.repositories import served
from core import files, source
from lock import interface, nodes
from lock.application import application
from tests.comfyui import older

if TYPE_CHECKING:
    from collections.abc import Mapping

DELAYS = (0.020, 0.040)
"""Seconds in each direction: a link of 40 ms may mean its round trip, or one direction."""

PARTS = ("comfyui", "nodes", "stack", "kernels", "tool", "all")
SEQUENTIAL = "all 1"
VERSIONS = 16
"""Versions of ComfyUI that are newer than the pinned one: 0.31.0 to 0.46.0."""

WORKFLOWS = 100

OUTDATED = """
import sys
from lock.updates import outdated
from lock.updates.proposal import Request
part, _, parallel = sys.argv[1].partition(" ")
outdated.PARALLEL = int(parallel or outdated.PARALLEL)
found, failures = outdated.outdated(Request(part))
assert found and not failures, failures
"""

PREVIEW = """
import json, sys
from pathlib import Path
from lock import preview, workflows
from lock.nodes import catalogue
old, new, *names = map(Path, json.loads(sys.argv[1]))
trees = {name: old.parent / name for name in catalogue().nodes}
before, after = (preview.Release(version=each.name, tree=each, nodes=trees, packages={}) for each in (old, new))
made = preview.preview(before, after, {}, workflows.collect([str(each) for each in names]))
assert made.types and len(made.workflows) == len(names), made
"""


def addresses() -> dict[str, str]:
    """The addresses of all repositories, by the name of the one that stands for it."""
    found = {name: node.url for name, node in nodes.catalogue().nodes.items()}
    for path in sorted((files.CHECKOUT / "recipes").glob("*/recipe.toml")):
        for each in tomli.loads(path.read_text())["source"]:
            found |= {f"kernel-{path.parent.name}": each["git"]} if "git" in each else {}
    return {**found, "comfyui": next(each.git for each in application().source if each.git)}


def git(place: Path, *words: str) -> None:
    """Run git in a repository."""
    identity = ("-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", place, *identity, *words], check=True, stdout=subprocess.DEVNULL)


def upstreams(place: Path) -> None:
    """A repository for each address; that of ComfyUI has the tags of newer versions."""
    place.mkdir()
    for name in addresses():
        here = place / name
        if name == "comfyui":
            shutil.copytree(source.fetch(application()), here)
        else:
            here.mkdir()
            (here / "__init__.py").write_text(name)
        git(here, "init", "--quiet")
        for setting in ("uploadpack.allowAnySHA1InWant", "uploadpack.allowFilter"):
            git(here, "config", setting, "true")
        for minor in range(VERSIONS + 1 if name == "comfyui" else 1):
            (here / "bench").write_text(f"{minor}")
            if minor:  # the pinned version requires a package that is known to be bad
                (here / "requirements.txt").write_text("numpy\n")
            git(here, "add", "--all", "--force")
            git(here, "commit", "--quiet", "-m", f"{minor}")
            git(here, "tag", f"v0.{30 + minor}.0")


def measured(code: str, argument: str, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of wall time and of CPU of a program and its children, without the servers."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-c", code, argument], cwd=files.CHECKOUT, env={**environment}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


def previewed(place: Path) -> list[tuple[float, float]]:
    """A preview between two trees with all nodes and the workflows: nothing read, all but the new ComfyUI, and all."""
    sources = place / "sources"
    sources.mkdir(parents=True)
    older(sources / "older")
    (sources / "pinned").symlink_to(source.fetch(application()))
    for name, tree in nodes.fetch(nodes.catalogue().nodes).items():
        (sources / name).symlink_to(tree)
    types = [*interface.read_cached(source.fetch(application())).types]
    paths = [sources / "older", sources / "pinned"]
    for number in range(WORKFLOWS):  # 50 steps each, every type of ComfyUI several times
        steps = {f"{at}": {"class_type": types[(number * 50 + at) % len(types)], "inputs": {}} for at in range(50)}
        paths.append(place / f"{number}.json")
        paths[-1].write_text(json.dumps(steps))
    arguments = json.dumps([str(each) for each in paths])
    runs: list[tuple[float, float]] = []
    for again in ("*", "pinned-*", "-"):
        for reading in (place / "interfaces").glob(again):
            reading.unlink()
        runs.append(measured(PREVIEW, arguments, {**os.environ, "HEARTH_CACHE": str(place)}))
    return runs


def listed(link: Mapping[str, str], part: str) -> tuple[float, float]:
    """The fastest of three lists of newer versions of a part, each with an empty cache; one if it is sequential."""
    runs: list[tuple[float, float]] = []
    for _ in range(1 if " " in part else 3):
        with tempfile.TemporaryDirectory(prefix="hearth-bench-") as cache:
            runs.append(measured(OUTDATED, part, {**link, "HEARTH_CACHE": cache}))
    return min(runs)


def main() -> None:
    """Run everything and write the page."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-") as name:
        place = Path(name)
        upstreams(place / "git")
        found: dict[str, list[tuple[float, float]]] = {}
        for delay in DELAYS:
            with served(place / "git", addresses(), delay) as link:
                for part in (*PARTS, SEQUENTIAL):
                    found.setdefault(part, []).append(listed(link, part))
        cold, usual, warm = previewed(place / "preview")
    titles = {**{part: f"`inv outdated {part}`" for part in PARTS}, SEQUENTIAL: "all, one request after another"}
    rows = [
        f"| {titles[part]} | {' | '.join(f'{wall:.1f} s' for wall, _ in runs)} | {runs[-1][1]:.1f} s |"
        for part, runs in found.items()
    ]
    page = PAGE.format(
        date=datetime.now(UTC).date(),
        machine=this_machine(),
        load=os.getloadavg()[0],
        trips=" | ".join(f"{delay * 2000:.0f} ms" for delay in DELAYS),
        count=len(nodes.catalogue().nodes),
        versions=VERSIONS,
        rows="\n".join(rows),
        workflows=WORKFLOWS,
        cold=cold,
        usual=usual,
        warm=warm,
    )
    (files.CHECKOUT / "docs/benchmarks-update.md").write_text(page)
    print(page)


PAGE = """\
# Benchmarks of updates

Written by `uv run python -m bench.update`, in one run, on {date}, on {machine}.
Other programs used the same cores: the load was {load:.0f}. The CPU time depends less on it.

## Newer versions

ComfyUI with {versions} newer versions, {count} nodes that all have a newer commit, the stacks, kernels and tool. git
daemon serves the repositories from the same machine over a link of 100 Mbit/s (`bench/link.py`). Packages come from
the package index, with its own latency. Each run starts with an empty cache of Hearth and the user's cache of uv; the
fastest of three, and one sequential run. CPU time includes git, uv and the program in place of ssh, not the servers.

| round trip | {trips} | CPU time |
| --- | ---: | ---: | ---: |
{rows}

## Preview

Between the pinned ComfyUI and a tree with a few changes, with {count} nodes and {workflows} workflows of 50 nodes.

| | wall time | CPU time |
| --- | ---: | ---: |
| nothing read before | {cold[0]:.1f} s | {cold[1]:.1f} s |
| all but the new ComfyUI read before, as after `inv update` | {usual[0]:.1f} s | {usual[1]:.1f} s |
| all read before | {warm[0]:.1f} s | {warm[1]:.1f} s |
"""

if __name__ == "__main__":
    main()
