"""The results of changing hosts, as the tasks print them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core import console
from core.console import counted
from lock import preview

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from deploy.change import Outcome


def rows(results: Sequence[Outcome], *, dry_run: bool) -> Iterator[str]:
    """A line per host: the changes of a dry run, or its state after the change."""
    for each in results:
        if dry_run:
            yield (
                f"{each.host}: {counted(len(each.steps), 'change')}" if each.changed else f"{each.host}: nothing to do"
            )
            yield from (f"  {row}" for row in preview.rows(each.preview)) if each.preview else ()
        elif each.state:
            yield f"{each.host}: {each.state}"
        elif each.changed:
            yield f"{each.host}: release {each.release} is in service{f' at {each.address}' * bool(each.address)}"
        else:
            yield f"{each.host}: nothing to do, release {each.release} is in service at {each.address}"


def history_rows(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of a host's runs, oldest first."""
    headings = ("when", "who", "what", "release", "result", "")
    cells = ("at", "who", "action", "release", "result", "error")
    return console.table(headings, ([each[name] for name in cells] for each in runs))
