"""Memory of hosts, given back when somebody asks for it: ComfyUI's own, and the page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from agent.schema import change
from agent.schema.live import Freed
from core import console
from deploy import connection, flow
from deploy.plan import Plan, Refusal
from ops.gpu import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options


def free(names: Sequence[str], wait: str, *, ask_sudo: bool = False, as_json: bool = False) -> int:
    """Have ComfyUI give its memory back on hosts, one after the other, and print what that gained.

    Returns 1 when a job still runs somewhere after `wait` seconds: it comes when that has ended.
    """
    patience = number("wait", wait, 0)
    found: dict[str, Freed] = {}
    for name in names:
        with connection.connect(flow.find_target(name), ask_sudo) as agent:
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
    results = flow.change(
        names, "drop-caches", lambda _, target, facts: plan(target, facts, force=options.force), options
    )
    if as_json:
        console.data_json([msgspec.to_builtins(each) for each in results])
    for each in () if as_json else results:
        text = "; ".join(each.notes) or "the page cache would be dropped"
        console.data(console.line(f"{each.host}: {text}"))
    return 2 if options.dry_run else 0


def plan(target: Target, facts: Facts, *, force: bool) -> Plan:
    """The plan that drops a host's page cache; it always has its one step."""
    refusals: list[Refusal] = []
    if not facts.current:
        refusals.append(Refusal("nothing is deployed", f"inv deploy --host {target.name}"))
    if not facts.root:
        by_hand = "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'"
        refusals.append(Refusal(f"only root may drop the page cache, and this is {facts.login}", f"there: {by_hand}"))
    if not force and not any(gpu.unified for gpu in facts.gpus):
        what = "no GPU there shares the machine's memory, so that the page cache takes nothing from one"
        refusals.append(Refusal(what, "leave it: what is cached need not be read again; or --force"))
    why = "it competes with the GPU for the same memory" if not force else "asked for"
    undo = "nothing: what is needed is read again, from the disk"
    steps = () if refusals else (change.DropCaches("write what is new to disk, drop the page cache", why, undo),)
    return Plan(facts.current, facts.current, steps=steps, refusals=tuple(refusals))
