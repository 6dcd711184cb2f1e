"""Kernels: what is built, kept and locked."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core import console
from tasks.command import command
from tasks.flags import Output

_BUILD_HELP = {
    "arch": "compute capabilities as in TORCH_CUDA_ARCH_LIST: 12.1, '8.9;12.0', 9.0a, '8.9+PTX'",
    "kernel": "only these recipes, comma-separated (default: all)",
    "stack": "cu124 or cu130 (default: the arch's)",
    "python": "Python versions, comma-separated: 3.12,3.11 (default: the arch's)",
    "platform": "linux_x86_64 or linux_aarch64 (default: the arch's)",
    "profile": "a recipe's profile, such as inference or full (default: the recipe's)",
    "jobs": "compiles at once (default: as many as cores and free memory allow)",
    "force": "build again even when the wheelhouse has it",
    "host": "build on this host, natively, and bring the wheels back",
    "dry-run": "only list what would be built",
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
    host: str = "",
    *,
    out: Output,
) -> None:
    """Build kernel wheels for a GPU into wheelhouse/."""
    from dataclasses import asdict

    from kernels import build, report
    from kernels.matrix import Request, select

    asked = Request(arch=arch, kernel=kernel, stack=stack, python=python, platform=platform, profile=profile, jobs=jobs)
    if host:
        from deploy import workshop  # slow to import, and seldom needed

        found = workshop.build(host, asdict(asked), force=force, dry_run=dry_run)
    elif dry_run:
        report.plan(*select(asked), as_json=out.json)
    else:
        found = build.build_asked(asked, force=force)
    if not dry_run:
        report.wheels(found, as_json=out.json)


@command(help={"prune": "delete wheels that no recipe asks for any more"})
def wheels(_: Context, prune: bool = False, *, out: Output) -> int:
    """List the wheelhouse, each wheel verified against its manifest."""
    from kernels import report, store

    if prune:
        report.pruned(store.prune())
    return report.wheelhouse(store.entries(), as_json=out.json)


@command(help={"path": "a wheel file"})
def inspect_wheel(_: Context, path: str, *, out: Output) -> None:
    """Show what a kernel wheel holds: machine code, symbols, C library."""
    from pathlib import Path

    from kernels import report

    report.one_wheel(Path(path), as_json=out.json)


@command()
def kernels(_: Context, *, out: Output) -> None:
    """List the kernel recipes: versions, archs and stacks, and why not the others."""
    from kernels import report

    report.recipes(as_json=out.json)


@command(help={"check": "fail when a lock is stale, change nothing"})
def lock(_: Context, check: bool = False) -> None:
    """Renew what is locked: uv.lock (tool, stacks, CUDA compiler) and ComfyUI's environments."""
    from core import lockfile
    from deploy import environment

    lockfile.renew(check=check)
    for name in environment.compile_all(check=check):
        console.say(f"{name} is compiled anew")
    console.say("the locks are current" if check else "the locks are renewed")
