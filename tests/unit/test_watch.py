"""Watching users' jobs after a deploy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest

from agent.look import jobs as agent_jobs
from agent.schema.live import Job
from core.errors import BusyError, ConnectError, HostError
from deploy import connection, deploy, host_rules, watch
from deploy.change import Change, Outcome
from deploy.facts import Facts
from deploy.host import Target
from deploy.plan import Options
from tests.errors import raises
from tests.plans import FRESH, inputs, settled, spark

OUTCOME = Outcome("spark", "new", "old", changed=True)
OPTIONS = Options(watch=3600)


def some(count: int, seconds: float = 2, *, failed: int = 0, workflow: str = "w", cached: int = 0) -> list[Job]:
    """Jobs of a workflow; the first ones failed."""
    return [
        Job(f"{workflow}{at}", "error" if at < failed else "success", 9, 0, 0, seconds, cached, workflow=workflow)
        for at in range(count)
    ]


@pytest.mark.parametrize(("before", "after", "found"), [
    (some(10), some(10), ""),
    (some(10), some(10, failed=1), ""),
    (some(10), some(10, failed=2), "failed"),
    (some(10, failed=1), some(10, failed=2), ""),
    (some(10, failed=8), some(10, failed=10), "failed"),
    (some(10), some(4, failed=4), ""),
    (some(4), some(10, failed=10), ""),
    (some(10), some(10, 4.1), "took 4.1 s"),
    (some(10), some(10, 3.1), "took 3.1 s"),
    (some(10, 20), some(10, 29), ""),
    (some(10, 0.1), some(10, 0.9), ""),
    (some(10), some(2, 60), ""),
    (some(2), some(10, 60), ""),
    (some(10), some(10, 60, workflow="other"), ""),
    (some(10, 0.1, cached=9) + some(3, 20), some(10, 20), ""),
    (some(10), some(2, 60) + some(4, 2), ""),
    ([], some(10, 60, failed=9), ""),
])  # fmt: skip
def test_what_counts_as_worse(before: list[Job], after: list[Job], found: str) -> None:
    assert (found in watch.worse(before, after)) if found else (watch.worse(before, after) == "")


class Agent:
    """A host's agent: its answers to `jobs` in turn, then a ComfyUI that has done nothing."""

    def __init__(self, *answers: list[Job] | Exception, facts: Facts | None = None) -> None:
        self.answers = list(answers)
        self.facts = facts or replace(settled(), current="new")

    def call(self, verb: str, **_: Any) -> Any:
        assert verb == "jobs"
        answer = self.answers.pop(0) if self.answers else []
        if isinstance(answer, Exception):
            raise answer
        return [asdict(each) for each in answer]


SILENT = HostError("step-failed", "ComfyUI is not running")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the host's agent, and the time by a clock that only waiting moves."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def put(agent: Agent) -> Agent:
        @contextmanager
        def connect(*_: Any) -> Iterator[Agent]:
            yield agent

        monkeypatch.setattr(connection, "connect", connect)
        monkeypatch.setattr(watch, "look", lambda *_: agent.facts)
        return agent

    return put


def test_jobs_are_watched_until_the_end(at: Any, capsys: pytest.CaptureFixture[str]) -> None:
    at(Agent(some(3), SILENT, some(6)))
    assert watch.watch(spark(), OUTCOME, some(10), OPTIONS) == ""
    assert "6 jobs with release new, not worse than before" in capsys.readouterr().err


def test_jobs_of_all_looks_count_together(at: Any) -> None:
    """ComfyUI was restarted in between, and has a new history."""
    at(Agent(some(3, failed=2), some(3, failed=2, workflow="v")))
    assert watch.watch(spark(), OUTCOME, some(10), OPTIONS) == "67% of 6 jobs failed, before 0% of 10"


def test_health_checks_running_and_interrupted_jobs_do_not_count() -> None:
    good, *rest = some(4)
    others = [replace(rest[0], workflow=""), replace(rest[1], status="running"), replace(rest[2], status="interrupted")]
    assert watch.finished(Agent([good, *others])) == [good]  # type: ignore[arg-type]


def test_a_comfyui_that_keeps_dying_is_worse(at: Any) -> None:
    dying = replace(settled(), current="new", service=replace(settled().service, restarts=2))
    agent = at(Agent(some(1), SILENT, facts=dying))
    assert watch.watch(spark(), OUTCOME, [], OPTIONS) == "ComfyUI died 2 times"
    assert agent.answers == []


def test_another_deploy_ends_the_watch(at: Any) -> None:
    at(Agent(some(10, failed=10), facts=replace(settled(), current="newer")))
    assert watch.watch(spark(), OUTCOME, some(10), OPTIONS) == ""


def test_ctrl_c_ends_only_the_watch(at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    at(Agent())
    monkeypatch.setattr(time, "sleep", interrupt)
    assert watch.watch(spark(), OUTCOME, [], OPTIONS) == ""


def test_a_lost_connection_ends_the_watch_with_an_error(at: Any) -> None:
    at(Agent(ConnectError("unreachable", "the connection was lost")))
    with raises("unreachable") as caught:
        watch.watch(spark(), OUTCOME, [], OPTIONS)
    assert "release new stays in service" in caught.value.what


BUSY = BusyError("drain", "ComfyUI is still working after 60 s")


@pytest.mark.parametrize(("why", "fails"), [("", None), ("all jobs failed", None), ("all jobs failed", BUSY)])
def test_a_worse_release_is_rolled_back(monkeypatch: pytest.MonkeyPatch, why: str, fails: Exception | None) -> None:
    """The jobs before are those that the old release had before the change."""
    agent = Agent(some(2), some(9))
    seen: list[Any] = []

    def carry_out(asked: Change, *_: object) -> Outcome:
        for _turn in range(2):  # planned, and checked afterwards
            asked.plan(agent, spark(), FRESH)  # type: ignore[arg-type]
        return OUTCOME

    def rollback(name: str, to: str, options: Options) -> list[Outcome]:
        seen.append((name, to, options.ask, options.trial))
        if fails:
            raise fails
        return []

    def watching(_: Target, __: Outcome, before: list[Job], ___: Options) -> str:
        seen.append(len(before))
        return why

    monkeypatch.setattr(deploy, "find_target", lambda _: spark())
    monkeypatch.setattr(deploy, "gather", lambda _: inputs())
    monkeypatch.setattr(deploy, "carry_out", carry_out)
    monkeypatch.setattr(deploy, "rollback", rollback)
    monkeypatch.setattr(watch, "watch", watching)
    options = Options(watch=60, ask=True)
    if why:
        with raises("worse") as caught:
            deploy.deploy("spark", options, agree=lambda: None)
        assert caught.value.exit_code == 66
        assert ("is in service again" in caught.value.cause) is (fails is None)
        assert seen == [2, ("spark", "old", False, "no")]
    else:
        assert deploy.deploy("spark", options, agree=lambda: None) is OUTCOME
        assert seen == [2]


@pytest.mark.parametrize(("outcome", "trial"), [
    (replace(OUTCOME, base="new"), "yes"),
    (replace(OUTCOME, base=""), "yes"),
    (OUTCOME, "only"),
])  # fmt: skip
def test_nothing_is_watched_without_another_release(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, trial: str
) -> None:
    monkeypatch.setattr(deploy, "find_target", lambda _: spark())
    monkeypatch.setattr(deploy, "gather", lambda _: inputs())
    monkeypatch.setattr(deploy, "carry_out", lambda *_: outcome)
    assert deploy.deploy("spark", Options(watch=60, trial=trial), agree=lambda: None) is outcome


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86_400)])
def test_durations(text: str, seconds: int) -> None:
    assert host_rules.duration(text) == seconds
    for wrong in ("", "30", "0m", "m", f"-{text}", f"{text} "):
        with raises("usage"):
            host_rules.duration(wrong)


def entry(**inputs: Any) -> dict[str, Any]:
    return {"prompt": [1, "x", {"1": {"class_type": "KSampler", "inputs": {"steps": 20, "seed": 1, **inputs}}}]}


def test_jobs_of_the_same_workflow_have_the_same_hash() -> None:
    def hashed(**inputs: Any) -> str:
        return agent_jobs._over("x", entry(**inputs)).workflow

    assert hashed() == hashed(seed=2) == hashed(text="a red cat") == hashed(text="two dogs", filename_prefix="mine")
    assert len({hashed(), hashed(steps=30), hashed(model="a.safetensors"), hashed(latent=["2", 0])}) == 4
    assert hashed(filename_prefix="hearth-gate/proof") == ""
    assert agent_jobs._over("x", {"prompt": [1, "x", {"1": {}}]}).workflow == ""
