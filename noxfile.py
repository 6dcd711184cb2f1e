"""Checks, as CI runs them: `uv run nox -s verify`. Every session uses the environment that uv has made."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["verify"]


@nox.session
def verify(session: nox.Session) -> None:
    """All that needs no GPU: lock, lint, types, unit tests, and real kernels built and inspected."""
    for name in ("lock", "lint", "types", "tests"):
        session.notify(name)


@nox.session
def lock(session: nox.Session) -> None:
    """`uv.lock` answers to `pyproject.toml`."""
    session.run("inv", "lock", "--check")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: format and rules; import-linter: layers and cycles."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Strict mypy."""
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Every test that needs no GPU, two files at once: hosts boot, start and wait. The long ones come first."""
    two = ("--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    session.run("pytest", "-m", "not gpu", *two, *session.posargs)


@nox.session
def unit(session: nox.Session) -> None:
    """Only the tests that compile nothing and boot nothing: seconds."""
    session.run("pytest", "-m", "not toolchain and not gpu and not host", *session.posargs)


@nox.session
def host(session: nox.Session) -> None:
    """Deploys to a booted Debian, as root. `-- --faults`: every interruption; `-- --spark`: an arm64 host."""
    session.run("pytest", "tests/host", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Build every kernel for the GPU of this machine and run the smoke tests on it."""
    session.run("pytest", "-m", "gpu", "tests/gpu", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Side by side against upstream's own build (two hours) and other deploy tools. Writes docs/benchmarks*.md."""
    session.run("python", "-m", "bench.kernels", *session.posargs)
    session.run("python", "-m", "bench.deploy")
    session.run("python", "-m", "bench.nodes")
    session.run("python", "-m", "bench.ops")
    session.run("python", "-m", "bench.exporter")
