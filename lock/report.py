"""Prints custom nodes, their updates and who provides a node type: tables and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from core import console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lock.node_updates import Change
    from lock.nodes import Catalogue


def _say(text: str) -> None:
    """Print a line that contains text of a repository."""
    console.data(console.line(text))


def nodes(catalogue: Catalogue, *, as_json: bool) -> None:
    """Known nodes with the sets that they are in, and those left out."""
    if as_json:
        console.data_json(msgspec.to_builtins(catalogue))
        return
    rows = []
    for name, node in catalogue.nodes.items():
        sets = ", ".join(each for each, members in catalogue.sets.items() if name in members)
        rows.append((name, node.commit[:9], sets or "-", "required" if node.required else "", node.why))
    console.table(("node", "commit", "sets", "", "why"), rows)
    for name, reason in catalogue.left_out.items():
        _say(f"left out: {name}: {reason}")


def changes(found: Sequence[Change], *, as_json: bool, dry_run: bool) -> int:
    """What updates of nodes bring; returns 2 when a dry run would change anything."""
    code = 2 if dry_run and found else 0
    if as_json:
        console.data_json([msgspec.to_builtins(each) for each in found])
        return code
    if not found:
        console.say("every node is at its latest commit")
    for each in found:
        console.data(f"{each.name} {each.old[:9]} -> {each.new[:9]}")
        for line in each.commits:
            _say(f"    {line}")
        for title, lines in (
            ("requirements", each.requirements),
            ("changed files that run at import", each.imported),
            ("what it could not do before", each.powers),
        ):
            for line in (f"  {title}:", *(f"    {line}" for line in lines)) if lines else ():
                _say(line)
    return code


def outdated(found: Mapping[str, tuple[str, str]], *, as_json: bool) -> None:
    """Nodes whose upstream has another commit."""
    if as_json:
        console.data_json({name: {"pinned": old, "latest": new} for name, (old, new) in found.items()})
    elif found:
        console.table(("node", "pinned", "latest"), [(name, old[:9], new[:9]) for name, (old, new) in found.items()])
    else:
        console.say("every node is at its latest commit")


def providers(found: Mapping[str, Sequence[str]], *, as_json: bool) -> int:
    """Which known nodes name the types of a workflow; returns 1 when there is a type that none names."""
    if as_json:
        console.data_json(dict(found))
    elif found:
        console.table(
            ("node type", "in"), [(each, ", ".join(names) or "no known node") for each, names in found.items()]
        )
    else:
        console.say("ComfyUI has every node of it")
    return int(any(not names for names in found.values()))
