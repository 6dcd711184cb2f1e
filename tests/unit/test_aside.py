"""A gateway lets people use other hosts while a host's ComfyUI is replaced: what the client asks the agents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from agent.processes import wait_for
from agent.schema.change import CutOver, Delete, Step
from agent.schema.live import Job
from core.errors import ConnectError, HostError
from deploy import aside, connection, host
from deploy.plan import Options

HOSTS = """
[hosts.spark]
address = "spark"
profile = "cpu"
[hosts.box]
address = "box"
profile = "cpu"
listen = "192.168.1.20"
[gateways.home]
host = "spark"
names = ["spark.local"]
"""
CUT_OVER = CutOver("t", "w", "u", 60, False, "release", "yes")


class Agent:
    """Answers as an agent whose ComfyUI has a job for two looks; notes what it is asked."""

    def __init__(self, *, moves: bool = True, broken: bool = False) -> None:
        self.asked: list[str] = []
        self.looks, self.moves, self.broken = 0, moves, broken

    def call(self, verb: str, **values: Any) -> Any:
        if verb == "jobs":
            self.looks += 1
            return [asdict(Job("j", "running" if self.looks < 3 else "success", 1))]
        assert verb == "gateway-server"
        self.asked.append(f"{values['host']} {values['state']}")
        assert values["seconds"] > 2 * aside.RENEW
        if self.broken:
            raise HostError("step-failed", "the socket is gone")
        return {"done": self.moves}


def asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, agent: Agent, *, behind: str, step: Step = CUT_OVER, **options: Any
) -> list[str]:
    """What the gateway was asked; "change" is where the host is changed."""
    (tmp_path / "hosts.toml").write_text(HOSTS + behind)
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    monkeypatch.setattr(aside, "EVERY", 0)

    @contextmanager
    def connect(*_: Any) -> Iterator[Agent]:
        yield agent

    monkeypatch.setattr(connection, "connect", connect)
    with aside.aside(agent, host.target("box" if "box" in behind else "spark"), [step], Options(**options)):  # type: ignore[arg-type]
        agent.asked.append("change")
    return agent.asked


BOTH = 'behind = ["spark", "box"]'


def test_people_are_moved_when_the_jobs_have_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent = Agent()
    assert asked(monkeypatch, tmp_path, agent, behind=BOTH) == ["box drain", "box maint", "change", "box ready"]
    assert agent.looks == 3


def test_a_long_change_asks_for_its_host_again_before_the_gateway_puts_it_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    agent = Agent()
    asked(monkeypatch, tmp_path, agent, behind=BOTH)
    agent.asked.clear()
    monkeypatch.setattr(aside, "RENEW", 0)
    with aside.aside(agent, host.target("box"), [CUT_OVER], Options()):  # type: ignore[arg-type]
        assert wait_for(lambda: agent.asked.count("box maint") > 3, 60)
    assert agent.asked[-1] == "box ready"
    assert agent.asked.count("box ready") == 1


def test_a_failed_change_puts_the_host_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent = Agent()
    asked(monkeypatch, tmp_path, agent, behind=BOTH)
    agent.asked.clear()
    with pytest.raises(HostError), aside.aside(agent, host.target("box"), [CUT_OVER], Options()):  # type: ignore[arg-type]
        raise HostError("step-failed", "no")
    assert agent.asked == ["box drain", "box maint", "box ready"]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"behind": BOTH, "force": True}, ["box drain", "box maint", "change", "box ready"]),
        ({"behind": ""}, ["change"]),
        ({"behind": BOTH, "trial": "only"}, ["change"]),
        ({"behind": BOTH, "step": Delete("t", "w", "u", ("data",))}, ["change"]),
    ],
)
def test_only_a_restart_of_one_of_several_hosts_moves_people(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any], found: list[str]
) -> None:
    agent = Agent()
    assert asked(monkeypatch, tmp_path, agent, **values) == found
    assert agent.looks == (0 if "force" in values or "box drain" not in found else 3)


@pytest.mark.parametrize("agent", [Agent(moves=False), Agent(broken=True)])
def test_a_gateway_that_cannot_move_people_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, agent: Agent
) -> None:
    """Requests wait at the gateway instead."""
    assert asked(monkeypatch, tmp_path, agent, behind=BOTH) == ["box drain", "change"]


def test_a_gateway_that_does_not_answer_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent = Agent()
    asked(monkeypatch, tmp_path, agent, behind=BOTH)

    def refuse(*_: Any) -> None:
        raise ConnectError("unreachable", "no route")

    monkeypatch.setattr(connection, "connect", refuse)
    with aside.aside(agent, host.target("box"), [CUT_OVER], Options()):  # type: ignore[arg-type]
        agent.asked.append("changed")
    assert agent.asked[-1] == "changed"
