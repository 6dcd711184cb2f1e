"""A gateway while ComfyUI restarts or a host is lost: the real HAProxy, in front of stand-ins for ComfyUI."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.layout import Layout
from agent.serve import balance
from agent.serve import gateway as kept
from deploy.gateways import Limits, Person
from tests.gateway import closed, running

pytestmark = [pytest.mark.process, pytest.mark.needs("haproxy", "openssl")]


def test_no_request_fails_while_comfyui_restarts(tmp_path: Path) -> None:
    """GETs and prompts arrive all the time; ComfyUI breaks off what it was doing and is away for 3 s, twice."""
    with running(tmp_path, limits=Limits(requests=100_000, prompts=100_000)) as (gateway, (comfy,)):
        comfy.delay = 0.05  # so that some are being answered at that moment
        ended = False

        def client(method: str, path: str, body: bytes | None) -> list[int]:
            codes = []
            while not ended:
                codes.append(gateway.ask(method, path, "ben", body=body).status)
            return codes

        async def session() -> list[list[int]]:
            nonlocal ended
            kinds = [("GET", "/queue", None), ("POST", "/prompt", b'{"prompt": {}}')]
            clients = [asyncio.ensure_future(asyncio.to_thread(client, *kinds[i % 2])) for i in range(8)]
            for _ in range(2):
                await asyncio.sleep(1)
                comfy.stop()
                await asyncio.sleep(3)
                comfy.start()
            await asyncio.sleep(2)
            ended = True
            return await asyncio.gather(*clients)

        codes = [code for each in asyncio.run(asyncio.wait_for(session(), 120)) for code in each]
        assert set(codes) == {200}
        assert len(codes) > 50


def test_without_any_comfyui_there_is_a_page_and_no_hang(tmp_path: Path) -> None:
    edit = {"inter 5s fastinter 2s downinter 2s": "inter 500ms", "timeout queue 10s": "timeout queue 1s"}
    with running(tmp_path, hold="5s", edit=edit) as (gateway, (comfy,)):
        comfy.stop()
        held = gateway.ask("GET", "/", "ben", seconds=30)
        now = gateway.ask("GET", "/", "ben", seconds=5)
        assert [held.status, now.status] == [503, 503]
        assert b"does not answer" in now.body
        comfy.start()
        end = time.monotonic() + 30
        while gateway.ask("GET", "/", "ben").status != 200:
            assert time.monotonic() < end


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A layout whose gateway has its socket in the test's folder, and a systemd that notes what it is told."""
    for name, status in (("systemctl", 1), ("systemd-run", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >{tmp_path}/{name}.log\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "s-gateway").symlink_to(tmp_path)
    monkeypatch.setattr(balance, "RUN", tmp_path)
    return Layout({"prefix": str(tmp_path), "service": "s", "scope": "system", "user": "", "address": "", "port": 1})


@pytest.mark.parametrize("edit", [{}, {"expire 8h peers tables": "expire 8h"}], ids=["handed-over", "late"])
def test_each_person_stays_on_one_host_also_after_a_reload(
    tmp_path: Path, layout: Layout, edit: dict[str, str]
) -> None:
    """Also if the old process has not yet handed over its table to the new one."""
    with running(tmp_path, hosts=2, edit=edit) as (gateway, _):

        def assigned(people: list[str]) -> dict[str, set[int]]:
            return {who: {gateway.ask("GET", "/", who).json["port"] for _ in range(6)} for who in people}

        first = assigned(["anna", "ben", "cleo"])
        assert all(len(ports) == 1 for ports in first.values())
        for _ in range(2):
            kept.remember(layout)
            gateway.reload()
            assert assigned(["ben", "cleo", "anna"]) == first


def test_people_of_a_lost_host_get_another(tmp_path: Path) -> None:
    edit = {"inter 5s fastinter 2s downinter 2s": "inter 500ms"}
    with running(tmp_path, hosts=2, hold="5s", edit=edit) as (gateway, hosts):
        first = gateway.ask("GET", "/", "ben").json["port"]
        next(each for each in hosts if each.port == first).stop()
        assert gateway.ask("GET", "/", "ben").json["port"] != first  # after it waited for the lost one
        assert gateway.ask("GET", "/", "ben", seconds=5).json["port"] != first


def test_a_host_lost_during_a_job_ends_its_websocket_and_its_people_go_on(tmp_path: Path) -> None:
    """The page opens its websocket again, and asks the other host for the job, which does not know it."""
    edit = {"inter 5s fastinter 2s downinter 2s": "inter 500ms"}
    with running(tmp_path, hosts=2, hold="5s", edit=edit) as (gateway, hosts):

        async def session() -> tuple[bytes, int]:
            reader, writer = await gateway.websocket("ben")
            (lost,) = [each for each in hosts if each.sockets]
            await asyncio.to_thread(gateway.ask, "POST", "/prompt", "ben", body=b'{"prompt": {}}')
            await asyncio.to_thread(lost.stop)
            ended = await reader.read()
            await closed(writer)
            _, again = await gateway.websocket("ben")
            await closed(again)
            return ended, next(i for i, each in enumerate(hosts) if each is not lost)

        ended, other = asyncio.run(asyncio.wait_for(session(), 60))
        assert (ended, hosts[other].sockets) == (b"", 1)


def test_a_person_with_a_host_gets_no_other_while_it_is_down(tmp_path: Path) -> None:
    """Otherwise separate hosts would isolate nobody."""
    edit = {"inter 5s fastinter 2s downinter 2s": "inter 500ms", "timeout queue 10s": "timeout queue 1s"}
    people = {"ben": Person(host="h1"), "anna": Person(host="h0")}
    with running(tmp_path, hosts=2, hold="5s", edit=edit, users=people) as (gateway, (one, two)):
        assert gateway.ask("GET", "/", "ben").json["port"] == two.port
        two.stop()
        assert [gateway.ask("GET", "/", "ben").status for _ in range(2)] == [503, 503]
        assert gateway.ask("GET", "/", "anna").json["port"] == one.port
        assert len(one.requests) == 1


def states(layout: Layout) -> dict[str, str]:
    return {each.name: each.state for each in balance.servers(layout)}


def test_people_leave_a_host_before_it_is_replaced(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First only new people go elsewhere: whoever is there sees the jobs end. The last host keeps its people."""
    with running(tmp_path, hosts=2) as (gateway, hosts):
        first = gateway.ask("GET", "/", "ben").json["port"]
        name = f"h{[each.port for each in hosts].index(first)}"
        other = "h1" if name == "h0" else "h0"
        assert balance.set_state(layout, name, "drain", 60).done
        assert gateway.ask("GET", "/", "ben").json["port"] == first
        assert {gateway.ask("GET", "/", who).json["port"] for who in ("anna", "cleo")} != {first}
        assert balance.set_state(layout, name, "maint", 60).done
        assert gateway.ask("GET", "/", "ben").json["port"] != first
        assert states(layout) == {name: "MAINT", other: "UP"}
        monkeypatch.setattr(balance, "PATIENCE", 0)
        for state in ("drain", "maint"):
            assert not balance.set_state(layout, other, state, 60).done
        assert balance.set_state(layout, name, "ready", 60).done
        assert states(layout) == {name: "UP", other: "UP"}
        assert not balance.set_state(layout, "h9", "drain", 60).done
    assert balance.servers(layout) == []
    assert not balance.set_state(layout, name, "drain", 60).done


def test_a_host_is_back_when_nobody_asks_for_it_any_more(tmp_path: Path, layout: Layout) -> None:
    """systemd tells HAProxy then: a deploy that is killed tells nobody."""
    with running(tmp_path, hosts=2):
        assert balance.set_state(layout, "h1", "maint", 60).done
        assert states(layout) == {"h0": "UP", "h1": "MAINT"}
        words = (tmp_path / "systemd-run.log").read_text().split("\0")
        assert "--on-active=60" in words
        subprocess.run(words[words.index(sys.executable) : -1], check=True, timeout=60)
        assert states(layout) == {"h0": "UP", "h1": "UP"}
        balance.set_state(layout, "h1", "ready", 60)
        assert (tmp_path / "systemctl.log").read_text() == "stop\0s-gateway-h1.timer\0"


def test_no_request_fails_or_waits_while_two_hosts_are_replaced_in_turn(tmp_path: Path, layout: Layout) -> None:
    with running(tmp_path, hosts=2, limits=Limits(requests=100_000, prompts=100_000)) as (gateway, hosts):
        ended = False

        def client(who: str) -> list[int]:
            codes = []
            while not ended:
                codes.append(gateway.ask("POST", "/prompt", who, body=b'{"prompt": {}}').status)
            return codes

        async def session() -> list[list[int]]:
            nonlocal ended
            clients = [asyncio.ensure_future(asyncio.to_thread(client, who)) for who in ("anna", "ben", "cleo") * 2]
            for i, each in enumerate(hosts):
                for state in ("drain", "maint"):
                    assert balance.set_state(layout, f"h{i}", state, 60).done
                await asyncio.sleep(0.5)  # what was being answered ends
                each.stop()
                before = len(hosts[1 - i].requests)
                while len(hosts[1 - i].requests) < before + 20:
                    await asyncio.sleep(0.05)
                each.start()
                assert balance.set_state(layout, f"h{i}", "ready", 60).done
            ended = True
            return await asyncio.gather(*clients)

        codes = [code for each in asyncio.run(asyncio.wait_for(session(), 120)) for code in each]
        assert set(codes) == {200}
