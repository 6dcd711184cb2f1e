"""Memory of hosts, given back when somebody asks for it: ComfyUI's own, and the page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from core import console
from deploy import connection, refusals
from deploy.change import Change, change_each
from deploy.look import find_target
from deploy.plan import Plan, Step
from ops.gpu import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options


class OfGpu(msgspec.Struct, frozen=True):
    """What is used of a GPU's memory, and ComfyUI's part of that, in bytes."""

    index: int
    used: int | None
    comfyui: int


class Held(msgspec.Struct, frozen=True):
    """Who holds how much, in bytes: the GPUs, ComfyUI's process (`resident`), and what the machine has left."""

    gpus: tuple[OfGpu, ...]
    resident: int | None
    available: int


class Freed(msgspec.Struct, frozen=True):
    """What ComfyUI gave back; not `freed` while the `job` still runs that it waits for."""

    freed: bool
    job: str | None
    before: Held
    after: Held


def free(names: Sequence[str], wait: str, *, ask_sudo: bool = False, as_json: bool = False) -> int:
    """Have ComfyUI give its memory back on hosts, one after the other, and print what that gained.

    Returns 1 when a job still runs somewhere after `wait` seconds: it comes when that has ended.
    """
    patience = number("wait", wait, 0)
    found: dict[str, Freed] = {}
    for name in names:
        with connection.connect(find_target(name), ask_sudo) as agent:
            found[name] = msgspec.convert(agent.call("free-memory", wait=patience), Freed)
        if not as_json:
            for line in lines(name, found[name]):
                console.data(console.line(line))
    if as_json:
        console.data_json([{"host": name, **msgspec.to_builtins(each)} for name, each in found.items()])
    return int(not all(each.freed for each in found.values()))


def lines(name: str, found: Freed) -> list[str]:
    """What ComfyUI gave back on a host; its process's memory where no GPU tells any."""
    if not found.freed:
        return [f"{name}: job {found.job} runs; ComfyUI gives its memory back when that has ended"]
    of_gpus = [
        (f"GPU {old.index}", old.used, new.used)
        for old, new in zip(found.before.gpus, found.after.gpus, strict=False)
        if old.used is not None and new.used is not None
    ]
    told = of_gpus or [("ComfyUI's process", found.before.resident or 0, found.after.resident or 0)]
    return [f"{name}: {what}: {_gained(old, new)}" for what, old, new in told]


def _gained(old: int, new: int) -> str:
    change = f"{console.size(old - new)} less" if new <= old else f"{console.size(new - old)} more"
    return f"{console.size(old)} before, {console.size(new)} after ({change})"


def drop(names: Sequence[str], options: Options, *, as_json: bool = False) -> int:
    """Drop the page cache of hosts, and print what that gained; returns 2 on a dry run."""
    change = Change(
        action="drop-caches",
        plan=lambda _, target, facts: plan(target, facts, force=options.force),
        unchecked="the cache fills again at once",
    )
    results = change_each(names, change, options)
    if as_json:
        console.data_json([msgspec.to_builtins(each) for each in results])
    for each in () if as_json else results:
        text = "; ".join(each.notes) or "the page cache would be dropped"
        console.data(console.line(f"{each.host}: {text}"))
    return 2 if options.dry_run else 0


def plan(target: Target, facts: Facts, *, force: bool) -> Plan:
    """The plan that drops a host's page cache; it always has its one step."""
    why = "it competes with the GPU for the same memory" if not force else "asked for"
    undo = "nothing: files are read again from the disk"
    step = Step("drop-caches", "write unsaved data to disk, drop the page cache", why, undo)
    return Plan.of(facts, [step], refusals.undroppable(target, facts, force=force))
