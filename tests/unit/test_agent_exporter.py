"""Changing the exporter on a host, whose systemd is a script: restored as a whole, whatever ends the change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.change import exporter
from agent.files import Fault, Json
from agent.layout import Site
from agent.look.exporter import installed, unit_file
from agent.serve import services

SYSTEMCTL = """#!/bin/sh
echo "$*" >>{log}
[ "$1" != restart ] || ! grep -q broken {unit}
"""


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.text)  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    found = Site({"prefix": str(tmp_path), "service": "s", "scope": "system", "user": "", "address": "", "port": 1})
    found.state.mkdir()
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(services, "UNITS", tmp_path / "units")
    for name in ("systemctl", "journalctl"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SYSTEMCTL.format(log=tmp_path / "log", unit=unit_file(found)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(exporter, "SECONDS", 1)
    return found


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    found = HTTPServer(("127.0.0.1", 0), Metrics)
    found.text = b"hearth_comfyui_up 1.0\n"  # type: ignore[attr-defined]
    thread = threading.Thread(target=found.serve_forever, args=(0.05,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def wanted(port: int, unit: str = "[Unit]\n", agent: str = "a" * 16) -> Json:
    return {"agent": agent, "settings": {"port": port}, "unit": unit}


def change(site: Site, to: Json) -> None:
    exporter.exporter(site, {"exporter": to}, lambda _: None)


def units(site: Site) -> list[str]:
    return sorted(str(path.relative_to(site.prefix / "units")) for path in (site.prefix / "units").rglob("s-*"))


def test_it_is_installed_changed_and_removed(site: Site, server: HTTPServer) -> None:
    assert installed(site) == {}
    first = wanted(server.server_port)
    change(site, first)
    assert installed(site) == first
    assert units(site) == ["multi-user.target.wants/s-exporter.service", "s-exporter.service"]
    assert site.exporter_agent.readlink() == Path(f"agents/{'a' * 16}")
    second = wanted(server.server_port, "[Unit]\n# other\n", "b" * 16)
    change(site, second)
    change(site, second)  # a killed run is done again
    assert installed(site) == second
    change(site, {})
    assert (installed(site), units(site), list(site.state.iterdir())) == ({}, [], [])
    assert "stop s-exporter.service" in (site.prefix / "log").read_text()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("broken", ["does not start", "says nothing", "is not there"])
def test_one_that_does_not_answer_gives_way_to_the_one_before(
    site: Site, server: HTTPServer, before: bool, broken: str
) -> None:
    first = wanted(server.server_port) if before else {}
    change(site, first)
    with HTTPServer(("127.0.0.1", 0), Metrics) as other:
        other.text = b"up 1\n"  # type: ignore[attr-defined]
        threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
        bad = wanted(other.server_port, "# broken\n" if broken == "does not start" else "# new\n", "b" * 16)
        if broken == "is not there":
            bad["settings"]["port"] = 1
        refused = refuses(site, bad)
        other.shutdown()
    assert refused.endswith("; the previous one is restored" if before else "does not run")
    assert installed(site) == first
    assert not list(site.state.glob("exporter-before*"))


def refuses(site: Site, bad: Json) -> str:
    with pytest.raises(Fault, match="does not run") as raised:
        change(site, bad)
    return str(raised.value.report["what"])


def test_a_previous_one_that_does_not_answer_either_is_restored_and_said(site: Site, server: HTTPServer) -> None:
    first = wanted(server.server_port)
    change(site, first)
    server.text = b""  # type: ignore[attr-defined]
    assert refuses(site, wanted(1)).endswith("restored, and does not answer either")
    assert installed(site) == first


def test_a_killed_change_that_is_done_again_restores_what_was_there_first(
    site: Site, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = wanted(server.server_port)
    change(site, first)
    bad = wanted(1, "# new\n", "b" * 16)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "_await_answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            change(site, bad)
    assert installed(site) == bad
    with pytest.raises(Fault, match="previous one is restored"):
        change(site, bad)
    assert installed(site) == first


def test_an_older_hearths_link_into_its_release_is_replaced_and_not_written_through(
    site: Site, server: HTTPServer
) -> None:
    old = site.prefix / "old.service"
    old.write_text("old")
    unit_file(site).symlink_to(old)
    assert installed(site) == {}
    change(site, wanted(server.server_port))
    assert (old.read_text(), unit_file(site).is_symlink()) == ("old", False)
