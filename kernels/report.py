"""Prints what the kernel tasks have to say, as tables or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from core import console, workspace
from core.arch import Arch, known_archs
from core.stack import stacks
from kernels import recipe as recipes_of
from kernels import store
from kernels.matrix import refusal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from core.manifest import Manifest
    from core.wheelhouse import Entry
    from kernels.matrix import Build, Skipped


def plan(builds: Sequence[Build], skipped: Sequence[Skipped], *, as_json: bool) -> None:
    """One line per build: identifier, key, in the wheelhouse or not, or why it is skipped."""
    states = [("in the wheelhouse" if store.find(build) else "to build") for build in builds]
    if as_json:
        console.data_json(
            [
                {"identifier": build.identifier, "key": build.key, "state": state}
                for build, state in zip(builds, states, strict=True)
            ]
            + [
                {"identifier": each.identifier, "key": None, "state": "skipped", "reason": each.error.what}
                for each in skipped
            ]
        )
        return
    rows = [(build.identifier, build.key[:16], state) for build, state in zip(builds, states, strict=True)]
    rows += [(each.identifier, "-", f"skipped: {each.error.what}") for each in skipped]
    console.table(("BUILD", "KEY", "STATE"), rows)


def wheels(manifests: Sequence[Manifest], *, as_json: bool) -> None:
    """The wheels a build left, with what was proven of each."""
    if as_json:
        console.data_json(msgspec.to_builtins(list(manifests)))
        return
    rows = [
        (
            manifest.file,
            console.size(manifest.size),
            ",".join(sorted({target for module in manifest.modules for target in module.sass})),
            manifest.glibc,
            manifest.imported.result,
            manifest.smoke.result,
        )
        for manifest in manifests
    ]
    console.table(("WHEEL", "SIZE", "SASS", "GLIBC", "IMPORT", "GPU"), rows)
    for manifest in manifests:
        for title, proof in (("import", manifest.imported), ("smoke test", manifest.smoke)):
            if proof.result != "passed":
                console.say(f"{manifest.identifier}: {title} not run: {proof.detail}")
    house = workspace.current().wheelhouse.folder
    console.say(f"in {house}; use it with: uv pip install --find-links {house.name} ...")


def wheelhouse(found: Sequence[Entry], *, as_json: bool) -> int:
    """The wheelhouse's content; returns 1 when a wheel is not what its manifest says."""
    if as_json:
        console.data_json(
            [{"fault": entry.fault, **msgspec.to_builtins(entry.manifest)} for entry in found],
        )
    elif found:
        console.table(
            ("WHEEL", "KEY", "IMPORT", "GPU", "STATE"),
            [
                (
                    entry.manifest.file,
                    entry.manifest.key[:16],
                    entry.manifest.imported.result,
                    entry.manifest.smoke.result,
                    entry.fault or "verified",
                )
                for entry in found
            ],
        )
    else:
        console.say("the wheelhouse is empty; fill it with: inv build-kernels --arch 12.1")
    return int(any(entry.fault for entry in found))


def pruned(gone: Sequence[tuple[Path, str]]) -> None:
    """What a prune deleted, and why."""
    for path, reason in gone:
        console.say(f"deleted {path.name}: {reason}")
    if not gone:
        console.say("nothing to prune")


def one_wheel(path: Path, *, as_json: bool) -> None:
    """What a single wheel file holds, read from the file itself."""
    from kernels.inspection import describe_wheel

    modules = describe_wheel(path)
    if as_json:
        console.data_json(msgspec.to_builtins(modules))
        return
    console.table(
        ("MODULE", "SASS", "PTX", "CUBINS", "UNDEFINED", "GLIBC", "GLIBCXX", "SIZE"),
        [
            (
                module.name,
                ",".join(module.sass) or "-",
                ",".join(module.ptx) or "-",
                str(module.cubins),
                str(module.undefined),
                module.glibc or "-",
                module.glibcxx or "-",
                console.size(module.size),
            )
            for module in modules
        ],
    )
    for module in modules:
        console.say(f"{module.name} needs {', '.join(module.needed)}")


def recipes(*, as_json: bool) -> None:
    """Every recipe crossed with every stack: the archs it can be built for, and why not the others."""
    rows: list[dict[str, str]] = []
    for recipe in recipes_of.recipes().values():
        for stack in stacks().values():
            refused = {arch: refusal(recipe, Arch.parse(arch), stack) for arch in known_archs()}
            reasons: dict[str, list[str]] = {}
            for arch, error in refused.items():
                if error is not None:
                    reasons.setdefault(error.cause, []).append(arch)
            rows.append(
                {
                    "kernel": recipe.name,
                    "version": recipe.version,
                    "stack": stack.name,
                    "archs": " ".join(arch for arch, error in refused.items() if error is None),
                    "profiles": " ".join(recipe.profiles) or "-",
                    "why not": "; ".join(f"{' '.join(archs)}: {cause}" for cause, archs in reasons.items()),
                }
            )
    if as_json:
        console.data_json(rows)
        return
    headings = ("kernel", "version", "stack", "archs", "profiles")
    console.table([heading.upper() for heading in headings], [[row[heading] for heading in headings] for row in rows])
    for reason in sorted({f"{row['stack']} not for {row['why not']}" for row in rows if row["why not"]}):
        console.say(reason)
