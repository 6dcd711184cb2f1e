"""The report of a proposed update: a line of summary, Markdown for a pull request, and the data for JSON."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from core import console
from core.console import counted
from lock import preview
from lock.preview import COMFYUI, Preview
from lock.updates import update
from lock.updates.proposal import Proposal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """The trial of a proposed update on a host.

    `times` are the seconds of workflows with the proposed and with the active release, by name. `error` says why the
    trial failed or could not be made, and `kind` is its kind. `tried` is false if the update does not change the host.
    """

    host: str
    tried: bool = True
    preview: Preview | None = None
    times: dict[str, tuple[float, float]] = {}
    notes: tuple[str, ...] = ()
    error: str = ""
    kind: str = ""

    @property
    def faster(self) -> int | None:
        """How many percent less time the workflows take; None if they are too short to compare."""
        new, old = (sum(each[side] for each in self.times.values()) for side in (0, 1))
        return round(100 * (1 - new / old)) if old >= COMPARABLE else None


COMPARABLE = 2.0
"""Seconds from which times are compared; trials report them in tenths."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A proposed update. `branch` is empty if nothing is newer; `commit` has `base` as its parent.

    `failures` are the upstreams that did not answer, with the reasons.
    """

    summary: str
    branch: str
    commit: str
    base: str
    changed: bool
    proposal: Proposal
    trial: Trial | None = None
    failures: dict[str, str] = {}


def summary(made: Proposal, trial: Trial | None, failures: Iterable[str]) -> str:
    """A line such as `ComfyUI 0.46.0: 41 of 41 workflows pass, 3 % faster, 2 unused node types removed`."""
    facts = [*_facts(_preview(made, trial)), *(_tried(trial) if trial else ())]
    facts += [f"{counted(unread, 'upstream')} did not answer"] if (unread := len([*failures])) else []
    moves = [f"{each.name} {each.new}" for each in made.moves if each.part == "comfyui"]
    for part, what in (("nodes", "custom node"), ("stack", "stack package"), ("tool", "tool package")):
        count = sum(each.part == part for each in made.moves)
        moves += [counted(count, what)] * bool(count)
    return ": ".join(filter(None, (", ".join(moves) or "nothing is newer", ", ".join(facts))))


def _preview(made: Proposal, trial: Trial | None) -> Preview | None:
    """What is known of breakage: the preview of a host also covers the workflows that are saved on it."""
    return (trial.preview if trial else None) or made.preview


def _facts(found: Preview | None) -> Iterator[str]:
    if found is None:
        return
    read = [each for each in found.workflows if not each.error]
    if read:
        yield f"{sum(not each.breaks for each in read)} of {counted(len(read), 'workflow')} pass"
    if unread := len(found.workflows) - len(read):
        yield f"{counted(unread, 'workflow')} cannot be read"
    used = {one.type for each in read for one in each.findings}
    removed = {each.type for each in found.types.get(COMFYUI, ()) if each.kind == "removed"}
    if unused := len(removed - used):
        yield f"{counted(unused, 'unused node type')} removed"
    if found.broken:
        yield f"{counted(len(found.broken), 'broken custom node')}"
    if unfit := {*found.unfit, *(host for host, each in found.drivers.items() if each.fits is False)}:
        yield f"{counted(len(unfit), 'host')} cannot run it"


def _tried(trial: Trial) -> Iterator[str]:
    if trial.error:
        yield f"the trial on {trial.host} failed"
    elif not trial.tried:
        yield f"{trial.host} does not change"
    else:
        yield f"the trial on {trial.host} passed"
        if trial.faster is not None:
            yield f"{abs(trial.faster)} % {'faster' if trial.faster >= 0 else 'slower'}"


LENGTH = 60_000
"""Maximum characters of a report in Markdown; GitHub accepts 65,536 in a pull request."""


def markdown(made: Report) -> str:
    """The report for a pull request. Text of others is in fenced blocks, where it is neither a link nor a mention."""
    parts = [f"# {_plain(made.summary)}\n"]
    if made.branch:
        parts.append(f"`inv update --propose` made this branch, `{made.branch}`. Nothing was deployed.\n")
    if trial := made.trial:
        lines = [trial.error] if trial.error else [*trial.notes] or [*_tried(trial)]
        parts += [f"## Trial on {_plain(trial.host)}\n", *_fenced(lines)]
        parts += ["## What breaks on it\n", *_fenced(preview.rows(trial.preview))] if trial.preview else []
    if made.failures:
        parts += ["## Not examined\n", *_fenced(f"{name}: {why}" for name, why in made.failures.items())]
    parts += ["## What changes\n", *_fenced(update.rows(made.proposal))]
    if made.branch:
        parts.append("After the merge: `inv deploy`. To go back: `inv rollback`, and revert the commit.\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Text of others in a heading: without Markdown's and GitHub's characters."""
    return re.sub(r"[^\w .,:%()/+-]", "?", console.line(text), flags=re.ASCII)


def _fenced(lines: Iterable[str]) -> Iterator[str]:
    """Lines in a block that none of them can end; only the first ones if there are too many."""
    left, kept, rest = LENGTH // 4, list[str](), 0
    for each in lines:
        left -= len(line := console.line(each)[:1000]) + 1
        if left > 0:
            kept.append(line)
        else:
            rest += 1
    fence = "`" * max([3, *(len(each) + 1 for text in kept for each in re.findall("`+", text))])
    yield "\n".join([f"{fence}text", *kept, fence, *[f"\n{rest} more lines: report.json"] * bool(rest), ""])
