"""The wheels of the wheelhouse that match the current recipes."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import msgspec
from packaging.version import InvalidVersion, Version

from core import console, workspace
from core.arch import known_archs, parse_list
from core.console import counted
from core.errors import HearthError
from core.stack import Platform, find_stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.flags import Confirmation
    from core.manifest import Manifest
    from core.wheelhouse import Entry
    from kernels.matrix import Build


def find(build: Build) -> Manifest | None:
    """The manifest of the wheel with this build's key; None when it has to be built."""
    return workspace.current().wheelhouse.find(build.index, build.wheel_pattern, build.key)


def superseded(found: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """The wheels that newer ones replace, with those: verified, equal in purpose, and of the current recipe.

    Other wheels are kept: nothing shows that they are not wanted.
    """
    groups: dict[tuple[str, ...], list[tuple[tuple[Version, Version, int], Entry]]] = {}
    for each in found:
        one = each.manifest
        if each.error and each.wheel.exists():
            continue  # the manifest describes another file than this
        with suppress(InvalidVersion):
            purpose = (one.kernel, one.stack, one.arch, one.python, one.platform, one.profile)
            groups.setdefault(purpose, []).append((_age(each), each))
    replaced: list[tuple[Entry, Entry]] = []
    for group in (group for group in groups.values() if len(group) > 1):
        current = [(age, each) for age, each in group if not each.error and _is_current(each.manifest)]
        newest, by = max(current, key=itemgetter(0), default=(None, None))
        replaced += [(each, by) for age, each in group if newest and by and age < newest]
    return replaced


def prune(how: Confirmation) -> bool:
    """Delete superseded wheels, if that is confirmed; a dry run only names them. Returns whether there are any."""
    here = workspace.current()
    with nullcontext() if how.dry_run else here.building():
        replaced = superseded(here.wheelhouse.verify())
        for old, new in replaced:
            console.say(f"{old.manifest.file} is replaced by {new.manifest.file}")
        if not replaced:
            console.say("nothing to prune")
        elif not how.dry_run:
            how.require(f"delete {len(replaced)} of {counted(len(here.wheelhouse.wheels()), 'wheel')}?")
            here.wheelhouse.delete(old for old, _ in replaced)
    return bool(replaced)


def _age(entry: Entry) -> tuple[Version, Version, int]:
    made = entry.wheel.with_name(f"{entry.wheel.name}.json").stat().st_mtime_ns
    torch = Version(entry.manifest.torch.lstrip(">=").partition(",")[0])  # a range names the oldest first
    return Version(entry.manifest.version.partition("+")[0]), torch, made


def _is_current(manifest: Manifest) -> bool:
    """Whether the current recipe describes this wheel. Compilers do not count: other machines built some wheels."""
    from kernels import matrix
    from kernels.recipe import find_recipes, for_stack
    from kernels.toolchain import Toolchain

    try:
        stack = find_stack(manifest.stack)
        recipe = for_stack(find_recipes(manifest.kernel), stack)
        group = parse_list(manifest.arch, known_archs())
        if any(matrix.refusal(recipe, arch, stack) for arch in group):
            return False
        python = matrix.python_for(recipe, stack, manifest.python)
        chain = Toolchain(stack, Platform.parse(manifest.platform), python, "", "", "", "", "", ())
        inputs = matrix.Build(recipe, matrix.canonical(recipe, group), manifest.profile, chain).inputs
    except (HearthError, OSError):
        return False
    return _recipe_inputs(inputs) == _recipe_inputs(manifest.inputs)


def _recipe_inputs(inputs: dict[str, Any]) -> str:
    """The inputs without the toolchain: a wheel built on a host had that machine's compiler."""
    return json.dumps({**inputs, "toolchain": {}, "zlib": "", "writers": []}, sort_keys=True)


def summary(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """The wheelhouse for JSON: each manifest, with its wheel's path and problem."""
    return [{"error": entry.error, "path": str(entry.wheel), **msgspec.to_builtins(entry.manifest)} for entry in found]


def rows(found: Sequence[Entry]) -> list[str]:
    """A table of the wheelhouse; the hash of a "verified" wheel matches its manifest."""
    cells = [
        (
            each.manifest.file,
            each.manifest.key[:16],
            each.manifest.imported.result,
            each.manifest.smoke.result,
            each.error or "verified",
        )
        for each in found
    ]
    empty = ["the wheelhouse is empty; build wheels with: inv build-kernels --arch 12.1"]
    return console.table(("wheel", "key", "import", "GPU", "state"), cells) if found else empty
