"""What every change of a host refuses, whoever plans it; each flow's own refusals are tested with the flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from agent.schema.settings import Access, State
from deploy import adopt, plan
from deploy.facts import Facts
from deploy.host import Target
from deploy.plan import Options, Plan
from ops import access, lifecycle, memory, mps, tuning
from tests.plans import BUSY, inputs, reasons, running, spark, stopped
from tests.unit.test_adopt import proposed
from tests.unit.test_settings import OFF, ON, mps_state, state

Make = Callable[[Target, Facts], Plan]
ASKED = Options()

SERVICE: dict[str, Make] = {
    "deploy": lambda target, facts: plan.make(target, facts, inputs(), ASKED),
    "rollback": lambda target, facts: plan.back(target, facts, facts.proven[0], ASKED),
    **{
        name: lambda target, facts, make=make: make(target, facts, ASKED)  # type: ignore[misc]
        for name, (make, _) in lifecycle.ACTIONS.items()
        if name != "quarantine"  # it is needed at once: tests/unit/test_lifecycle.py
    },
}
SETTINGS: dict[str, Make] = {
    "tune": lambda target, facts: tuning.apply(target, facts, state(), ["swappiness"]),
    "tune --undo": lambda target, facts: tuning.undo(target, facts, state(applied=True), [], force=False),
    "mps on": lambda target, facts: mps.turn_on(target, facts, OFF, mps_state(now=None), {}, ASKED),
    "mps off": lambda target, facts: mps.turn_off(target, facts, ON, ASKED),
    "mps limit": lambda target, facts: mps.limit(target, facts, ON, mps_state(now=None), {}, ASKED),
    "gpu-access": lambda target, facts: access.keep(
        target, facts, State({}, {access.NAME: ()}), Access((), {}, (), {}), ASKED
    ),
}
OTHERS: dict[str, Make] = {
    "adopt": lambda target, facts: adopt.take_over(target, facts, proposed(), ASKED),
    "adopt --undo": lambda target, facts: adopt.put_back(target, replace(facts, adopted=True), ASKED),
    "drop-caches": lambda target, facts: memory.plan(target, facts, force=True),
}


def refused(make: Make, facts: Facts, **host: Any) -> list[str]:
    found = make(spark(**host), facts)
    assert not found.refusals or not found.steps
    return reasons(found)


@pytest.mark.parametrize("name", SERVICE)
def test_a_change_of_the_service_is_refused(name: str) -> None:
    facts = stopped() if name == "start" else running()
    assert refused(SERVICE[name], facts) == []
    for change, kind in (
        ({"busy": BUSY}, "busy"),
        ({"manager": "none"}, "no-systemd"),
        ({"current_error": {"what": "foreign", "hint": "move it"}}, "foreign-current"),
        ({"foreign_unit": "/etc/systemd/system/comfyui.service"}, "foreign-unit"),
    ):
        assert refused(SERVICE[name], replace(facts, **change)) == [kind]
    both = replace(facts, busy=BUSY, manager="none")
    assert refused(SERVICE[name], both) == ["busy", "no-systemd"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_change_of_the_machine_is_refused(name: str) -> None:
    assert refused(SETTINGS[name], running()) == []
    assert refused(SETTINGS[name], running(busy=BUSY)) == ["busy"]
    assert refused(SETTINGS[name], running(manager="none")) == ["no-systemd"]
    assert refused(SETTINGS[name], running(root=False)) == ["no-root"]
    assert refused(SETTINGS[name], running(), scope="user") == ["no-root"]


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_change_is_refused_while_another_is_under_way(name: str) -> None:
    assert refused(OTHERS[name], running()) == []
    assert refused(OTHERS[name], running(busy=BUSY)) == ["busy"]
