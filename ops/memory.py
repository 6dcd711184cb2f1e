"""Frees memory on hosts: ComfyUI's models and results, and the page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.change import DropCaches
from agent.schema.live import Freed
from core import console
from core.errors import HearthError
from core.flags import number
from core.typed import convert
from deploy import connection, fleet, refusals
from deploy.change import Change, change_each
from deploy.look import find_target
from deploy.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from deploy.change import Outcome
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options


def free(names: Sequence[str], wait: str, *, ask_sudo: bool = False) -> list[fleet.Answer[Freed]]:
    """Have ComfyUI free its memory on hosts, one after the other; an error on one does not stop the others.

    Waits up to `wait` seconds for a running job; ComfyUI then frees the memory when the job ends. Raises UsageError.
    """
    patience = number("wait", wait)

    def one(name: str) -> fleet.Answer[Freed]:
        try:
            with connection.connect(find_target(name), ask_sudo) as agent:
                return fleet.Answer(name, convert(agent.call("free-memory", wait=patience), Freed))
        except HearthError as error:
            return fleet.Answer(name, None, error)

    return [one(name) for name in names]


def summary(found: Mapping[str, Freed]) -> list[dict[str, Any]]:
    """The freed memory by host, for JSON."""
    return [{"host": name, **msgspec.to_builtins(each)} for name, each in found.items()]


def rows(found: Mapping[str, Freed]) -> Iterator[str]:
    """The freed memory of each host, as reported by its GPUs, otherwise of ComfyUI's process."""
    for name, each in found.items():
        yield from lines(name, each)


def lines(name: str, found: Freed) -> list[str]:
    """The freed memory of a host's GPUs; of ComfyUI's process if no GPU reports memory."""
    if not found.freed:
        return [f"{name}: job {found.job} is running; ComfyUI frees its memory when the job ends"]
    of_gpus = [
        (f"GPU {old.index}", old.used, new.used)
        for old, new in zip(found.before.gpus, found.after.gpus, strict=False)
        if old.used is not None and new.used is not None
    ]
    listed = of_gpus or [("ComfyUI's process", found.before.resident or 0, found.after.resident or 0)]
    return [f"{name}: {what}: {_gained(old, new)}" for what, old, new in listed]


def _gained(old: int, new: int) -> str:
    change = f"{console.size(old - new)} less" if new <= old else f"{console.size(new - old)} more"
    return f"{console.size(old)} before, {console.size(new)} after ({change})"


def drop(names: Sequence[str], options: Options) -> list[Outcome]:
    """Drop the page cache of hosts."""
    change = Change(
        action="drop-caches",
        plan=lambda _, target, facts: plan(target, facts, force=options.force),
        unchecked="the cache fills again at once",
    )
    return change_each(names, change, options)


def dropped_rows(results: Sequence[Outcome]) -> Iterator[str]:
    """The memory that each host gained by dropping its page cache."""
    for each in results:
        yield f"{each.host}: {'; '.join(each.notes) or 'the page cache would be dropped'}"


def plan(target: Target, facts: Facts, *, force: bool) -> Plan:
    """The plan that drops a host's page cache; it always has its one step."""
    why = "it competes with the GPU for the same memory" if not force else "requested"
    undo = "nothing: the next reads come from the disk"
    step = DropCaches("write unsaved data to disk, drop the page cache", why, undo)
    return Plan.of(facts, [step], refusals.undroppable(target, facts, force=force))
