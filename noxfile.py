"""Checks, as CI runs them: `uv run nox -s verify`. Every session uses the environment that uv created."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["verify"]


@nox.session
def verify(session: nox.Session) -> None:
    """Everything that needs no GPU: checks, docs, unit tests, real kernels built and inspected, real hosts."""
    for name in ("lock", "lint", "types", "docs", "tests", "pythons"):
        session.notify(name)


@nox.session
def lock(session: nox.Session) -> None:
    """Check that `uv.lock` matches `pyproject.toml`."""
    session.run("inv", "lock", "--check")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: format and rules; import-linter: layers and cycles."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Strict mypy; the client's code also for macOS."""
    client = "core kernels lock deploy ops gateway tasks.py"
    darwin = f"mypy --platform darwin --cache-dir .mypy_cache/darwin --follow-imports silent {client}"
    session.run("bash", "-c", f"{darwin} & mypy; linux=$?; wait $! && exit $linux", external=True)  # each uses one core


CACHED = {"PYTHONDONTWRITEBYTECODE": None}
"""Containers often set it. Without bytecode, each of the processes that tests start compiles all that it imports."""


def workers(number: int) -> tuple[str, ...]:
    """Pytest's arguments to run this many files in parallel: more than there are cores, since tests wait.

    A file's tests share fixtures, such as a host. A crashed worker ends the run; xdist hangs if it replaces one.
    """
    return ("--numprocesses", str(number), "--max-worker-restart", "0", "--dist", "loadfile", "--no-loadscope-reorder")


@nox.session
def tests(session: nox.Session) -> None:
    """Every test that needs no GPU, five files in parallel: hosts boot, start and wait. The long ones run first.

    `-- --faults`: every fault of the crash matrix.
    """
    session.run("pytest", "-m", "not gpu", *workers(5), "--durations", "60", *session.posargs, env=CACHED)


QUICK = "not process and not installer and not toolchain and not gpu and not host"
PARALLEL = ("--override-ini", "testpaths=tests/unit", *workers(3))


@nox.session
def unit(session: nox.Session) -> None:
    """The tests that call functions."""
    session.run("pytest", "-m", QUICK, *PARALLEL, *session.posargs, env=CACHED)


@nox.session
def pythons(session: nox.Session) -> None:
    """The tests that call functions, on this machine's other Pythons; each has its environment in .nox/.

    What programs do to each other is shown once, in `tests`.
    """
    found = {version: _interpreter(version) for version in ("3.11", "3.12", "3.13", "3.14")}
    default = ".".join(platform.python_version_tuple()[:2])
    for version in sorted({*found} - {default}):
        if not (interpreter := found[version]):
            continue
        place = Path(".nox", f"unit-{version}").absolute()
        env = {**CACHED, "UV_PROJECT_ENVIRONMENT": str(place)}
        session.run("uv", "sync", "--quiet", "--frozen", "--python", interpreter, env=env)
        words = (str(place / "bin/python"), "-m", "pytest", "-m", QUICK, *PARALLEL, *session.posargs)
        session.run(*words, external=True, env=CACHED)
    ran = [version for version in found if found[version] or version == default]
    missing = [version for version in found if version not in ran]
    session.log(
        f"Unit tests ran on Python {', '.join(ran)} (default: {default}); missing: {', '.join(missing) or 'none'}"
    )


def _interpreter(version: str) -> str:
    """The path of a Python of this version: uv's, the system's or pyenv's; empty if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    if own := sorted(pyenv.glob(f"{version}.*/bin/python")):
        return str(own[-1])
    words = ["uv", "python", "find", "--no-project", "--system", "--no-python-downloads", version]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


@nox.session
def host(session: nox.Session) -> None:
    """Deploys to a booted Debian, as root. `-- --faults`: every interruption; `-- --spark`: an arm64 host."""
    session.run("pytest", "tests/host", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Build every kernel for the GPU of this machine and run the smoke tests on it."""
    session.run("pytest", "-m", "gpu", "tests/gpu", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as a website in site/; warnings and dead links are errors."""
    uv = ("uv", "run", "--isolated", "--only-group", "docs")  # so that the tool's environment stays unchanged
    session.run(*uv, "zensical", "build", "--strict", "--clean")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every kernel wheel for the given archs: `-- --arch 8.9`. The release workflow attaches them."""
    session.run("inv", "build-kernels", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare with upstream's own build (two hours) and other deploy tools. Writes docs/benchmarks*.md."""
    session.run("python", "-m", "bench.kernels", *session.posargs)
    session.run("python", "-m", "bench.deploy")
    session.run("python", "-m", "bench.nodes")
    session.run("python", "-m", "bench.ops")
    session.run("python", "-m", "bench.exporter")
    session.run("python", "-m", "bench.containers")
    session.run("python", "-m", "bench.gateway")
