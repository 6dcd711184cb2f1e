"""The front door: every `inv` task. Each parses, calls and prints; the work is in the subsystems."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.exceptions import Exit
from invoke.tasks import task

from core import console
from core.errors import HearthError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from invoke.context import Context


def command(**options: Any) -> Callable[[Callable[..., int | None]], Any]:
    """An invoke task that shows a HearthError without a traceback and exits with its code."""

    def wrap(body: Callable[..., int | None]) -> Any:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                status = body(*args, **kwargs)
            except HearthError as error:
                raise Exit(f"error: {error}", code=error.exit_code) from error
            except KeyboardInterrupt:
                raise Exit("interrupted; the same command goes on from here", code=130) from None
            except BrokenPipeError:
                raise Exit(code=0) from None
            if status:
                sys.exit(status)

        return task(**options)(run)

    return wrap


_BUILD_HELP = {
    "arch": "compute capabilities as in TORCH_CUDA_ARCH_LIST: 12.1, '8.9;12.0', 9.0a, '8.9+PTX'",
    "kernel": "only these recipes, comma-separated (default: all)",
    "stack": "cu124 or cu130 (default: the arch's)",
    "python": "Python versions, comma-separated: 3.12,3.11 (default: the arch's)",
    "platform": "linux_x86_64 or linux_aarch64 (default: the arch's)",
    "profile": "a recipe's profile, such as inference or full (default: the recipe's)",
    "jobs": "compiles at once (default: as many as cores and free memory allow)",
    "force": "build again even when the wheelhouse has it",
    "dry-run": "only list what would be built",
    "json": "print JSON",
}


@command(help=_BUILD_HELP)
def build_kernels(
    _: Context,
    arch: str = "",
    kernel: str = "",
    stack: str = "",
    python: str = "",
    platform: str = "",
    profile: str = "",
    jobs: str = "",
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Build kernel wheels for a GPU into wheelhouse/."""
    from kernels import report
    from kernels.build import build_kernels as build_all
    from kernels.matrix import Request, select

    if jobs and not (jobs.isdecimal() and int(jobs)):  # invoke's own int option answers with a traceback
        raise UsageError(f"--jobs {jobs} makes no sense", hint="give the number of compiles at once, or leave it out")
    request = Request(arch=arch, kernel=kernel, stack=stack, python=python, platform=platform, profile=profile)
    builds, skipped = select(request)
    if dry_run:
        report.plan(builds, skipped, as_json=json)
        return
    report.say_skipped(skipped)
    report.wheels(build_all(builds, jobs=int(jobs) if jobs else None, force=force), as_json=json)


@command(help={"prune": "delete wheels that no recipe asks for any more", "json": "print JSON"})
def wheels(_: Context, prune: bool = False, json: bool = False) -> int:
    """List the wheelhouse, each wheel verified against its manifest."""
    from kernels import report, store

    if prune:
        report.pruned(store.prune())
    return report.wheelhouse(store.entries(), as_json=json)


@command(positional=["path"], help={"path": "a wheel file", "json": "print JSON"})
def inspect_wheel(_: Context, path: str, json: bool = False) -> None:
    """Show what a kernel wheel holds: machine code, symbols, C library."""
    from pathlib import Path

    from kernels import report

    report.one_wheel(Path(path), as_json=json)


@command(help={"json": "print JSON"})
def kernels(_: Context, json: bool = False) -> None:
    """List the kernel recipes: versions, archs and stacks, and why not the others."""
    from kernels import report

    report.recipes(as_json=json)


@command(help={"check": "fail when a lock is stale, change nothing"})
def lock(_: Context, check: bool = False) -> None:
    """Renew what is locked: uv.lock (tool, stacks, CUDA compiler) and ComfyUI's environments."""
    from core import lockfile
    from deploy import environment

    lockfile.renew(check=check)
    for name in environment.compile_all(check=check):
        console.say(f"{name} is compiled anew")
    console.say("the locks are current" if check else "the locks are renewed")


ns = Collection(build_kernels, wheels, inspect_wheel, kernels, lock)
