"""Kernels and locks: what is built, kept and pinned."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core.command import command
from core.flags import Output

_BUILD_HELP = {
    "arch": "compute capabilities: 12.1, '8.9;12.0', 9.0a, '8.9+PTX' (default: TORCH_CUDA_ARCH_LIST, else this GPU's)",
    "kernel": "only these recipes, comma-separated (default: all)",
    "stack": "cu124 or cu130 (default: as config/archs.toml says)",
    "python": "Python versions, comma-separated: 3.12,3.11 builds both (default: as config/archs.toml says)",
    "platform": "linux_x86_64 or linux_aarch64 (default: as config/archs.toml says)",
    "profile": "such as inference or full; a recipe without that profile is built as usual (default: the recipe's)",
    "jobs": "compiles at once (default: as many as there are cores, or fewer where free memory is short)",
    "force": "compile everything again, also what the wheelhouse has",
    "host": "build there, natively and without root, and bring the wheels back; it needs what a build needs here",
    "dry-run": "only list what would be built, one line each: identifier, key, state",
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
    """Build kernel wheels for a GPU into wheelhouse/.

    Cross-built where the GPU is another machine's. What the wheelhouse has already is not built again.

        inv build-kernels --arch 12.1                   # all kernels for a DGX Spark
        inv build-kernels --arch '8.9;12.0' --dry-run   # what would be built for two GPUs, and what is there already
        inv build-kernels --arch 8.9 --stack cu124      # for drivers older than 580; needs a CUDA 12.4 compiler
        inv build-kernels --arch 12.1 --host spark      # on the Spark itself
    """
    from dataclasses import asdict

    from kernels import build, report
    from kernels.matrix import Request, select

    asked = Request(arch=arch, kernel=kernel, stack=stack, python=python, platform=platform, profile=profile, jobs=jobs)
    if host:
        from deploy import remote_build  # slow to import, and seldom needed

        found = remote_build.build(host, asdict(asked), force=force, dry_run=dry_run)
    elif dry_run:
        report.plan(*select(asked), as_json=out.json)
    else:
        found = build.build_asked(asked, force=force)
    if not dry_run:
        report.wheels(found, as_json=out.json)


@command(help={"prune": "delete wheels that no recipe asks for any more, and say why"})
def wheels(_: Context, prune: bool = False, *, out: Output) -> int:
    """List the wheelhouse, each wheel verified against its manifest.

    Every wheel is hashed again; exit code 1 when one is not what was inspected.

        inv wheels
        inv wheels --prune   # and drop what no recipe asks for
    """
    from core import workspace
    from kernels import report, store

    if prune:
        report.pruned(store.prune())
    return report.wheelhouse(workspace.current().wheelhouse.verify(), as_json=out.json)


@command(help={"path": "a wheel file"})
def inspect_wheel(_: Context, path: str, *, out: Output) -> None:
    """Show what a kernel wheel holds: machine code, symbols, C library.

    Also the needed libraries, and versions of the C library. Of any wheel, also one that Hearth did not build.

        inv inspect-wheel dist/flash_attn.whl
    """
    from pathlib import Path

    from kernels import report

    report.one_wheel(Path(path), as_json=out.json)


@command()
def kernels(_: Context, *, out: Output) -> None:
    """List the kernel recipes: versions, archs and stacks, and why not the others.

    A line for each stack, with the profiles that a recipe has.

        inv kernels
    """
    from kernels import report

    report.recipes(as_json=out.json)
