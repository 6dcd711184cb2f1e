"""The common flow for changing hosts: refused, shown, confirmed, applied, and checked afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from invoke.context import Context
from invoke.exceptions import Exit

from agent.schema.change import Erase, Serve, Step, packed
from core.command import command
from core.errors import RefusedError
from core.flags import Output
from deploy import adopt, change, connection, deploy, host
from deploy.change import Change
from deploy.facts import Facts
from deploy.host import Host, Hosts, Target
from deploy.outcome import rows
from deploy.plan import Options, Plan
from deploy.refusals import Refusal, refused
from lock.preview import Preview
from tests.errors import raises
from tests.plans import FRESH, RUNNING, inputs, settled, spark
from tests.unit.test_adopt import folder, proposed, unit

STEP = Serve("start comfyui", "it is not active", "stop comfyui")
DONE = {"event": "end", "error": {}}
OFFLINE = {"event": "end", "error": {"kind": "offline", "what": "no index", "cause": "", "hint": ""}}


class Machine:
    """A host whose agent returns these facts in turn (the last one repeatedly) and ends runs as given."""

    unpacked = True

    def __init__(self, *facts: Facts, ends: tuple[dict[str, Any], ...] = (DONE,)) -> None:
        self.facts, self.ends = list(facts), list(ends)
        self.submitted: list[dict[str, Any]] = []

    def call(self, verb: str, **values: Any) -> Any:
        if verb == "submit":
            return self.submitted.append(values["plan"])
        assert verb == "facts"
        return msgspec.to_builtins(self.facts.pop(0) if len(self.facts) > 1 else self.facts[0])

    def stream(self, verb: str, **values: Any) -> Iterator[dict[str, Any]]:
        assert (verb, values) == ("follow", {"run": self.submitted[-1]["run"]})
        yield {"event": "note", "text": "noted"}
        yield self.ends.pop(0)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces every host by a Machine."""

    def put(machine: Machine) -> Machine:
        @contextmanager
        def connect(*_: Any) -> Iterator[Machine]:
            yield machine

        def named(name: str) -> Target:
            return spark() if name in ("", "spark") else Target(name, spark().host, "dgx-spark", spark().profile, {})

        monkeypatch.setattr(connection, "connect", connect)
        for module in (change, adopt):
            monkeypatch.setattr(module, "find_target", named)
        listed = Hosts(hosts={name: Host(address=name) for name in ("spark", "box")})
        monkeypatch.setattr(host, "hosts", lambda: listed)
        return machine

    return put


def planner(*plans: Plan) -> Any:
    left = list(plans)
    return lambda *_: left.pop(0)


def some(*steps: Step, refusals: tuple[Refusal, ...] = ()) -> Plan:
    return Plan.of(settled(), steps, refusals)


@pytest.mark.parametrize(("step", "unpacked"), [(STEP, True), (Erase("erase", "asked for", "impossible"), False)])
def test_while_a_plan_deletes_the_unpacked_agent_the_archive_runs(at: Any, step: Step, unpacked: bool) -> None:
    machine = at(Machine(settled()))
    change.change_each(["spark"], Change(action="nuke", plan=planner(some(step), some())), Options())
    assert machine.unpacked == unpacked


def test_a_change_is_applied_and_converges(at: Any) -> None:
    machine = at(Machine(settled()))
    (found,) = change.change_each(["spark"], Change(action="start", plan=planner(some(STEP), some())), Options())
    assert (found.changed, found.steps, found.notes) == (True, ("start comfyui",), ("noted",))
    (body,) = machine.submitted
    assert (body["action"], body["steps"]) == ("start", (packed(STEP),))


@pytest.mark.parametrize("left", [some(STEP), some(refusals=(Refusal("busy", "start comfyui", "wait"),))])
def test_remaining_steps_are_reported(at: Any, left: Plan) -> None:
    at(Machine(settled()))
    with raises("not-converged") as caught:
        change.change_each(["spark"], Change(action="start", plan=planner(some(STEP), left)), Options())
    assert caught.value.cause == "start comfyui"


def test_convergence_check_uses_the_given_plan(at: Any) -> None:
    at(Machine(settled(), ends=(DONE, DONE)))
    checked = Change(action="restart", plan=planner(some(STEP)), check=planner(some()))
    unchecked = Change(action="drop-caches", plan=planner(some(STEP)), unchecked="the cache fills again")
    for each in (checked, unchecked):
        (found,) = change.change_each(["spark"], each, Options())
        assert found.changed


def test_dry_run_no_steps_and_no_confirmation_apply_nothing(at: Any) -> None:
    machine = at(Machine(settled()))

    def no() -> None:
        raise refused("nothing was changed", [Refusal("unconfirmed", "not confirmed", "say yes")])

    for plan, options in ((some(STEP), Options(dry_run=True)), (some(), Options())):
        (found,) = change.change_each(["spark"], Change(action="stop", plan=planner(plan)), options, agree=no)
        assert found.changed is bool(plan.steps)
    with raises("refused"):
        change.change_each(["spark"], Change(action="stop", plan=planner(some(STEP))), Options(), agree=no)
    assert not machine.submitted


def test_dry_run_previews_what_breaks_even_if_it_is_refused(at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    at(Machine(FRESH))
    made = Preview(old="1.0", new="1.1", migrations=("0007",))
    refusal = Refusal("wrong-flag", "no flag --a", "omit it")

    def run(dry: bool, *refusals: Refusal) -> Any:
        planned = Change(action="deploy", plan=planner(some(STEP, refusals=refusals)), preview=lambda *_: made)
        if not dry:
            planned = replace(planned, check=planner(some()))
        return change.carry_out(planned, spark(), Options(dry_run=dry), lambda: None)

    outcome = run(True)
    assert outcome.preview is made
    assert [row for row in rows([outcome], dry_run=True) if "0007" in row]
    assert msgspec.to_builtins(outcome)["preview"]["migrations"] == ("0007",)
    assert run(False).preview is None
    capsys.readouterr()
    with raises("refused") as caught:
        run(True, refusal)
    assert caught.value.previews == {"spark": made}
    assert "0007" in capsys.readouterr().err


def test_offline_host_is_sent_the_packages(at: Any) -> None:
    at(Machine(settled(), ends=(OFFLINE, DONE)))
    plans = [some(STEP), some(STEP), some()]
    (found,) = change.change_each(["spark"], Change(action="deploy", plan=planner(*plans), inputs=inputs()), Options())
    assert found.changed
    at(Machine(settled(), ends=(OFFLINE,)))
    with raises("offline"):
        change.change_each(["spark"], Change(action="stop", plan=planner(some(STEP))), Options())


BUSY, TAKEN = Refusal("busy", "b", "wait"), Refusal("port-taken", "p", "stop it")


def test_refusals_are_data_of_errors_and_group_errors(at: Any) -> None:
    machine = at(Machine(settled()))
    with raises("refused") as one:
        change.change_each(
            ["spark"], Change(action="stop", plan=planner(some(STEP, refusals=(BUSY, TAKEN)))), Options()
        )
    assert [(each.host, each.kind) for each in one.value.refusals] == [("spark", "busy"), ("spark", "port-taken")]
    with raises("group") as several:
        plan = planner(some(refusals=(BUSY,)))
        change.change_each(["box", "spark"], Change(action="stop", plan=plan), Options())
    assert [(each.host, each.kind) for each in several.value.refusals] == [("box", "busy")]
    with raises("group") as several:
        made = Preview(old="1", new="2")
        planned = Change(action="deploy", plan=planner(some(refusals=(BUSY,))), preview=lambda *_: made)
        change.change_each(["box", "spark"], planned, Options(dry_run=True))
    assert several.value.previews == {"box": made}
    with raises("group") as several:
        plans = [some(STEP), some(refusals=(BUSY,))]
        planned = Change(action="deploy", plan=planner(*plans), preview=lambda *_: made)
        change.change_each(["box", "spark"], planned, Options(dry_run=True))
    assert several.value.previews == {"box": made, "spark": made}
    assert not machine.submitted


@pytest.mark.parametrize("as_json", [True, False])
def test_a_refused_change_prints_its_refusals_as_json(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    @command()
    def example(_: Context, *, out: Output) -> None:
        assert out.json is as_json
        error = refused("nothing was changed", [TAKEN], host="spark")
        error.previews = {"spark": Preview(old="1", new="2", migrations=("0007",))}
        raise error

    with pytest.raises(Exit) as ended:
        example(Context(), json=as_json)
    assert ended.value.code == RefusedError.exit_code
    told = capsys.readouterr()
    assert "error[refused]: nothing was changed\n  cause: p\n  next:  stop it\n" in told.err
    if as_json:
        answer = json.loads(told.out)
        assert answer.pop("previews")["spark"]["migrations"] == ["0007"]
        assert answer == {
            "error": "nothing was changed",
            "kind": "refused",
            "refusals": [{"host": "spark", "kind": "port-taken", "what": "p", "remedy": "stop it", "build": []}],
        }
    else:
        assert told.out == ""


def test_a_rollback_converges_on_the_release_that_it_chose(at: Any) -> None:
    """Afterwards, the release that it left is the previous one."""
    old = settled()
    new = replace(old, current="newer", proven=("newer", old.current))
    back = replace(old, proven=(old.current, "newer"))
    machine = at(Machine(new, back))
    (found,) = deploy.rollback("spark", "", Options())
    assert (found.base, found.release, found.changed) == ("newer", old.current, True)
    assert machine.submitted[0]["steps"][0]["to"] == old.current
    failed = replace(back, service=replace(RUNNING, enabled=False))
    at(Machine(new, failed))
    with raises("not-converged"):
        deploy.rollback("spark", "", Options())
    at(Machine(new))
    (tried,) = deploy.rollback("spark", "", Options(trial="only"))
    assert tried.state == f"release {old.current} passed its trial; newer stays in service"


def test_an_adoption_converges_when_its_units_are_set_aside(at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that already exist in the data stay in place and do not require another move."""
    before = proposed(units=[unit()], folders={"models": folder("models")})
    left = proposed(units=[unit(aside=True)], folders={"models": folder("models")})
    asked: list[str] = []

    def surveyed(*proposals: Any) -> None:
        pending = list(proposals)

        def propose(*words: Any) -> Any:
            asked.append(words[3])
            return pending.pop(0)

        monkeypatch.setattr(adopt, "_propose", propose)

    surveyed(before, left)
    machine = at(Machine(settled()))
    _, found = adopt.adopt("spark", "", "rename", Options(), apply=True, undo=False)
    assert found is not None
    assert [step["kind"] for step in machine.submitted[0]["steps"]] == ["retire", "adopt"]
    assert asked == ["", "/opt/comfyui/ComfyUI"]
    surveyed(before, before)
    at(Machine(settled()))
    with raises("not-converged"):
        adopt.adopt("spark", "", "rename", Options(), apply=True, undo=False)


def test_undoing_an_adoption_converges_and_needs_one(at: Any) -> None:
    at(Machine(replace(FRESH, adopted=True), FRESH))
    _, found = adopt.adopt("spark", "", "rename", Options(), apply=False, undo=True)
    assert found is not None
    assert found.changed
    at(Machine(replace(FRESH, adopted=True)))
    with raises("not-converged"):
        adopt.adopt("spark", "", "rename", Options(), apply=False, undo=True)
    at(Machine(FRESH))
    with raises("no-installation"):
        adopt.adopt("spark", "", "rename", Options(), apply=False, undo=True)
