"""Moves ComfyUI, nodes, stacks and the tool's packages to newer versions, in one change that can be undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from core import console, lockfile, workspace
from core.errors import HearthError, LockError, UsageError
from lock import application, nodes, preview, requirements, resolution
from lock.updates import node_updates, packages, releases, sizes, transaction
from lock.updates.proposal import Move, Proposal, Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lock.preview import Preview, Release

Failures = dict[str, Exception]

Look = Callable[["Release", "Release"], "Preview"]
"""Compares the release before an update and the one after it."""


def update(wanted: Request, *, dry_run: bool, look: Look | None = None) -> tuple[Proposal, Failures]:
    """Move to newer versions, resolve the locks, and write all files together; a dry run writes nothing.

    A node whose repository fails stays, and its error is returned. Raises LockError when no versions fit together,
    naming a ComfyUI that does; upstream errors; and RefusedError when a file was edited meanwhile. Then nothing is
    changed. `look` previews what breaks.
    """
    if wanted.part == "kernels":
        hint = "edit its recipe, then run inv kernels.pin NAME"
        raise UsageError("usage", "the sources of kernels are updated one by one", hint=hint)
    with transaction.changing():
        made, record, failures = proposed(wanted, look)
        if record.changes and not dry_run:
            transaction.switch(record)
    return made, failures


def proposed(wanted: Request, look: Look | None) -> tuple[Proposal, transaction.Record, Failures]:
    """An update with the new texts of the files, and the errors of nodes; needs `transaction.changing`."""
    made, record, failures = Proposal(), transaction.Record({}), Failures()
    before, after = _release(wanted, made) if look and wanted.part != "tool" else None, None
    with transaction.draft() as draft:
        if wanted.includes("comfyui"):
            releases.move(wanted, made)
        if wanted.includes("stack"):
            packages.move_stacks(wanted, made)
        if wanted.includes("tool"):
            packages.move_tool(wanted, made)
        if wanted.includes("nodes"):
            failures = _move_nodes(wanted, made)
        if made.moves:
            lockfile.renew(check=False)
            _resolve(wanted, made)
            if wanted.part != "tool":
                _measure(wanted, made)
            record = draft.record()
            after = _release(wanted, made) if before else None
    if look and before and after:  # outside the draft, which has no profiles, hosts and workflows
        with _warned(made):
            made.preview = look(before, after)
    here = workspace.current().checkout
    made.files += [each.removeprefix(f"{here}/") for each in record.changes]
    return made, record, failures


def _release(wanted: Request, made: Proposal) -> Release | None:
    """The ComfyUI that moves, with all nodes and its locked lists; None, and a warning, if it cannot be had."""
    with _warned(made):
        app = application.application(application.moving(wanted.channel))
        names = ((stack.name, each.value, python) for stack, each, python in requirements.combinations(app.version))
        lists = filter(None, (requirements.find(*name, app.path) for name in names))
        return preview.of_checkout(app, nodes.catalogue(), lists)
    return None


def _measure(wanted: Request, made: Proposal) -> None:
    """Write the sizes of what moved: of ComfyUI with its packages, and of stacks."""
    with _warned(made, "the size that a host needs was not measured, and stays as it was"):
        sizes.measure_application(application.application(application.moving(wanted.channel)))
        sizes.measure_stacks({each.name.partition(" ")[0] for each in made.moves if each.part == "stack"})


@contextmanager
def _warned(made: Proposal, what: str = "the preview is incomplete") -> Iterator[None]:
    """Turn errors of a preview or of a measurement into warnings: they never prevent an update."""
    try:
        yield
    except (HearthError, OSError, ValueError, RecursionError) as error:
        made.warnings.append(f"{what}: {getattr(error, 'what', error)}")


def _resolve(wanted: Request, made: Proposal) -> None:
    """Resolve the locked lists of a draft; an error names the newest ComfyUI that fits."""
    try:
        resolution.compile_all(check=False, newest=wanted.newest)
    except LockError as error:
        if moved := [each for each in made.moves if each.part == "comfyui"]:
            error.hint = f"{_fitting(wanted, moved[0])}. Or: {error.hint}"
        raise


def _move_nodes(wanted: Request, made: Proposal) -> Failures:
    changes, failures = node_updates.pin_latest([], dry_run=False, before=wanted.before)
    made.nodes += changes
    made.moves += [Move("nodes", each.name, each.old[:9], each.new[:9], each.date) for each in changes]
    return failures


TRIED = 4
"""How many older versions are tried when one cannot be resolved; a try takes half a minute."""


def _fitting(wanted: Request, failed: Move) -> str:
    """The newest ComfyUI between the pinned one and one that cannot be resolved, as a hint."""
    try:
        older = [*islice(releases.between(failed.old, failed.new, wanted), TRIED)]
    except HearthError as error:
        return f"older versions were not tried: {error.what}"
    for each in older:
        console.say(f"ComfyUI {failed.new} cannot be resolved; trying {each}")
        try:
            releases.move(Request("comfyui", each, wanted.before), Proposal())
            resolution.compile_all(check=False, newest=wanted.newest)
        except HearthError:
            continue
        return f"the newest version that fits: inv update comfyui --to {each}"
    return f"{', '.join(older)} cannot be resolved either" if older else "no good version is between them"


def rows(made: Proposal) -> Iterator[str]:
    """What moves, with the effects of nodes, the files, and why newer versions were skipped."""
    for each in made.moves:
        if each.part != "nodes":
            yield f"{each.name} {each.old} -> {each.new}{f' ({each.date})' if each.date else ''}"
            yield from (f"    {note}" for note in each.notes)
    yield from node_updates.rows(made.nodes) if made.nodes else ()
    yield from preview.rows(made.preview) if made.preview else ()
    yield from (f"skipped: {each}" for each in made.skipped)
    yield from (f"warning: {each}" for each in made.warnings)
    locks = [each for each in made.files if "locks/" in each]
    others = [each for each in made.files if each not in locks]
    others += [f"{len(locks)} locked list{'s' * (len(locks) > 1)}"] if locks else []
    yield f"changed files: {', '.join(others)}" if others else "nothing to update"
