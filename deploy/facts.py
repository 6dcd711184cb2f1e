"""The facts of a host, and its releases by name."""

from __future__ import annotations

from typing import Any

from agent.schema.facts import Facts, Gpu, MountState, Place, Process, Service
from core.errors import UnknownNameError, near

__all__ = ["Facts", "Gpu", "MountState", "Place", "Process", "Service", "named"]


def named(facts: Facts, name: str) -> dict[str, Any]:
    """The manifest of a release that a host keeps, by its id, `current` or `previous` (the target of a rollback).

    Raises UnknownNameError.
    """
    before = next((each for each in facts.proven if each != facts.current), "")
    words = {word: meant for word, meant in (("current", facts.current), ("previous", before)) if meant}
    found = facts.release(words.get(name, name))
    if found is None:
        known = [*words, *(each["id"] for each in facts.releases)]
        hint = near(name, known) if known else "nothing is deployed there yet: inv deploy"
        raise UnknownNameError(f"{facts.hostname} keeps no release {name!r}", hint=hint)
    return found
