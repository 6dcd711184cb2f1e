"""Kernels: building, listing and inspecting wheels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Confirmation, Output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from core.manifest import Manifest
    from kernels.matrix import Request

_BUILD_HELP = {
    "arch": "compute capabilities: 12.1, '8.9;12.0', 9.0a, '8.9+PTX' (default: TORCH_CUDA_ARCH_LIST or local GPUs)",
    "fat": "one wheel for all archs of a platform, instead of one for each",
    "kernel": "only these recipes, comma-separated (default: all but those with `default = false`)",
    "stack": "a stack of config/stacks.toml (default: the one marked `default` there)",
    "python": "Python versions, comma-separated, such as 3.12,3.11 (default: the one that runs Hearth)",
    "platform": "linux_x86_64 or linux_aarch64 (default: from config/archs.toml)",
    "profile": "a build profile, such as diffusion or full; recipes without it use their default",
    "jobs": "parallel compile jobs (default: CPU count, limited by free memory and MAX_JOBS)",
    "force": "rebuild even if the wheel already exists",
    "host": "build on this host, without root, and fetch the wheels; several, comma-separated, share the builds",
    "dry-run": "list the builds only: identifier, key, state, and what this machine lacks for each; installs nothing",
}


@command(help=_BUILD_HELP)
def build_kernels(
    _: Context,
    arch: str = "",
    fat: bool = False,
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

    Cross-compiles when the target platform differs from this machine. Existing wheels are not rebuilt.

        inv build-kernels --arch 12.1                   # all kernels for a DGX Spark
        inv build-kernels --arch '8.9;12.0' --dry-run   # list the builds for two GPUs, and the existing wheels
        inv build-kernels --arch '8.9;12.0' --fat       # one wheel for both
        inv build-kernels --arch 12.1 --host spark      # on the Spark itself
        inv build-kernels --arch '8.9;12.0' --host local,tower   # share the builds with another machine
    """
    from core import manifest, workspace
    from core.errors import UsageError
    from kernels import build, listing, matrix, toolchain

    request = matrix.Request(
        arch=arch, fat=fat, kernel=kernel, stack=stack, python=python, platform=platform, profile=profile, jobs=jobs
    )
    if dry_run:
        if host:
            console.say(f"a dry run does not contact {host}: keys, states and what is missing are of this machine")
            if not arch:
                raise UsageError("usage", "a dry run does not ask a host for its GPU", hint="give it with --arch")
        plan = listing.summary(*matrix.select(request, toolchain.look))
        console.show(plan, listing.rows(plan), as_json=out.json)
        return
    found = _on_hosts(host, request, force=force) if host else build.build_asked(request, force=force)
    console.show(found, manifest.rows(found), as_json=out.json)
    if out.json:  # it has all of this; another machine's --host reads it, and prints the commands of its own wheelhouse
        return
    for note in manifest.unproven(found):
        console.say(note)
    house = workspace.current().wheelhouse
    commands = dict.fromkeys(map(house.install_command, found))
    console.say("\n  ".join(["to install into the active environment:", *commands]))


def _on_hosts(listed: str, request: Request, *, force: bool) -> list[Manifest]:
    """Build a request on a host, or divide it among several; `local` is this machine."""
    from dataclasses import asdict

    from deploy import remote_build  # slow to import, and rarely needed
    from kernels import build, matrix

    def one(name: str, part: Mapping[str, Any]) -> list[Manifest]:
        if name == "local":
            return build.build_asked(matrix.Request(**part), force=force)
        return remote_build.build(name, part, force=force)

    names = list(dict.fromkeys(each.strip() for each in listed.split(",") if each.strip()))
    if len(names) == 1:
        return remote_build.build(names[0], asdict(request), force=force)
    return remote_build.distribute(names, [asdict(each) for each in matrix.split(request)], one)


@command(
    help={
        "python": "an interpreter with torch whose backends are measured, such as ComfyUI's "
        "(default: the wheelhouse's kernels with their torch)",
        "recording": "show a recording instead of measuring",
        "plot": "write a plot to this .svg or .png file, too; needs matplotlib: uv sync --group plot",
    }
)
def bench_kernels(_: Context, python: str = "", recording: str = "", plot: str = "", *, out: Output) -> None:
    """Measure the error, speed and memory of each attention backend on this GPU, with the shapes of real models.

    Shows which correct backend is the fastest. Stop ComfyUI first: it takes time and memory of the GPU. Without a GPU,
    shows a recording of another one.

        inv bench-kernels
        inv bench-kernels --python /opt/comfyui/current/env/bin/python --plot kernels.svg
        inv bench-kernels --recording bench/recordings/h200.jsonl
    """
    from pathlib import Path

    from core import figure
    from kernels import bench

    if plot:
        figure.check(Path(plot), "plot")  # before minutes of measuring
    found = bench.look(python, recording)
    console.show(found, bench.rows(found), as_json=out.json)
    if plot:
        bench.plot(found, Path(plot))


@command(
    help={
        "prune": "delete wheels that a newer wheel of the current recipe replaces; keep all others",
        "serve": "serve the wheelhouse to installers on this machine until Ctrl-C",
        "port": "the port of --serve; 0: any free one (default: 8199)",
    }
)
def wheels(
    _: Context, prune: bool = False, serve: bool = False, port: str = "8199", *, how: Confirmation, out: Output
) -> int:
    """List the wheels in the wheelhouse, and verify each against its manifest.

    Exit code 1 if the hash of a wheel differs from its manifest.

        inv wheels
        inv wheels --prune --dry-run   # show which wheels newer ones replace
        inv wheels --serve             # prints the command that installs each wheel, here or over SSH
    """
    from core import workspace
    from kernels import server, store

    house = workspace.current().wheelhouse
    if not how.dry_run:
        house.arrange()
    if serve:
        server.serve(house, port)
        return 0
    changes = prune and store.prune(how)
    found = house.verify()
    console.show(store.summary(found), store.rows(found), as_json=out.json)
    return int(any(entry.error for entry in found)) or how.code(changes=changes)


@command(optional=["clear"], help={"clear": "delete these directories, comma-separated; without a name: all"})
def cache(_: Context, clear: str = "", *, how: Confirmation, out: Output) -> int:
    """List the directories of the cache: size and content.

    What is deleted is made or downloaded again when it is needed. Builds and deploys that are running are waited for.

        inv cache
        inv cache --clear objects,sources --dry-run
        inv cache --clear
    """
    from core import cache as caches

    found = caches.directories()
    if clear:
        found = caches.choose(found, "all" if isinstance(clear, bool) else clear)
        if found and not how.dry_run:
            how.require(f"delete {', '.join(each.name for each in found)}, {caches.total(found)}?")
            caches.clear(found)
            found = caches.directories()
    console.show(found, caches.rows(found), as_json=out.json)
    return how.code(changes=bool(clear and found))


@command(help={"path": "a wheel file"})
def inspect_wheel(_: Context, path: str, *, out: Output) -> None:
    """Show the compiled modules of a wheel: machine code, symbols, libraries, C library version.

    Works for any wheel, including those that Hearth did not build.

        inv inspect-wheel dist/flash_attn.whl
    """
    from pathlib import Path

    from kernels import inspection

    found = inspection.describe_wheel(Path(path))
    console.show(found, inspection.rows(found), as_json=out.json)


@command(name="list", default=True)
def list_kernels(_: Context, *, out: Output) -> None:
    """List the kernel recipes: versions, build profiles, and supported archs for each stack.

    Gives the reason for each arch that a recipe does not support.

        inv kernels
    """
    from kernels import listing, recipe

    found = listing.support()
    console.show(found, listing.support_rows(found), as_json=out.json)
    for name, error in recipe.known()[1].items():
        console.say(f"the recipe of {name} is not valid: {error}")


@command(help={"name": "a kernel recipe", "replace": "replace pins that differ, such as those of the previous version"})
def pin(_: Context, name: str, replace: bool = False, *, out: Output) -> None:
    """Fetch the sources of a kernel recipe, show what they contain, and write their hashes into recipe.toml.

    Runs the recipe's `generate` scripts, and pins what they write. Look at the source before you build it.

        inv kernels.pin my-kernel
        inv kernels.pin my-kernel --replace   # after a change of its version
    """
    from kernels import pin as pins
    from kernels import recipe as recipes

    found = [each for recipe in recipes.find_recipes(name) for each in pins.pin(recipe, replace=replace)]
    console.show(found, pins.rows(found), as_json=out.json)
