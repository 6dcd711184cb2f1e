"""Lists of `inv build-kernels --dry-run` and `inv kernels`: the builds of a request, and the archs of recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core import arch as archs
from core import console, workspace
from core.stack import stacks
from kernels import matrix
from kernels import recipe as recipes_of
from kernels import toolchain as toolchains

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kernels.matrix import Build, Skipped


def summary(builds: Sequence[Build], skipped: Sequence[Skipped]) -> list[dict[str, Any]]:
    """Each build with its key, its state, and what this machine lacks for it, for a dry run.

    The key is None if the toolchain is incomplete. A skipped build has a reason and no key.
    """
    wheelhouse = workspace.current().wheelhouse
    found: list[dict[str, Any]] = []
    for each in builds:
        unpinned = each.recipe.unpinned
        key = None if each.toolchain.missing or unpinned else each.key
        exists = key is not None and wheelhouse.find(each.index, each.wheel_pattern, key) is not None
        state = "in the wheelhouse" if exists else "to build"
        state = f"not pinned: run inv kernels.pin {each.recipe.name}" if unpinned else state
        lacks = [] if exists else toolchains.lacking(each.toolchain, each.recipe)
        found.append({"identifier": each.identifier, "key": key, "state": state, "lacks": lacks})
    return found + [
        {"identifier": each.identifier, "key": None, "state": "skipped", "reason": each.reason} for each in skipped
    ]


def rows(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of `summary`, then what each build lacks."""
    cells = []
    for each in found:
        state = f"skipped: {each['reason']}" if "reason" in each else each["state"]
        key = (each["key"] or ("-" if "reason" in each else "unknown"))[:16]
        cells.append((each["identifier"], key, state))
    lacks: dict[str, list[str]] = {}
    for each in found:
        for text in each.get("lacks", ()):
            lacks.setdefault(text, []).append(each["identifier"])
    every = sum("reason" not in each for each in found)
    lines = [f"{text}: {'all builds' if len(names) == every else ', '.join(names)}" for text, names in lacks.items()]
    return [*console.table(("build", "key", "state"), cells), *lines]


def support() -> list[dict[str, str]]:
    """Every recipe crossed with every stack: the archs that it supports, and why it does not support the others."""
    found: list[dict[str, str]] = []
    for same in recipes_of.recipes().values():
        for stack in stacks().values():
            recipe = recipes_of.for_stack(same, stack)
            refused = {arch: matrix.refusal(recipe, archs.Arch.parse(arch), stack) for arch in archs.known_archs()}
            reasons: dict[str, list[str]] = {}
            for arch, error in refused.items():
                if error is not None:
                    reasons.setdefault(error.cause, []).append(arch)
            found.append(
                {
                    "kernel": recipe.name,
                    "version": recipe.version,
                    "stack": stack.name,
                    "archs": " ".join(arch for arch, error in refused.items() if error is None),
                    "profiles": " ".join(recipe.profiles) or "-",
                    "why not": "; ".join(f"{' '.join(archs)}: {cause}" for cause, archs in reasons.items()),
                }
            )
    return found


def support_rows(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A table of `support`, then the reasons."""
    headings = ("kernel", "version", "stack", "archs", "profiles")
    yield from console.table(headings, ([each[heading] for heading in headings] for each in found))
    yield from sorted(
        {f"{each['kernel']} on {each['stack']} does not support {each['why not']}" for each in found if each["why not"]}
    )
