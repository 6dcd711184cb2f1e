"""Changing the exporter on a host with a scripted systemd: fully restored, whatever interrupts the change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.change import exporter
from agent.files import AgentError
from agent.layout import Layout
from agent.look.exporter import installed, unit_file
from agent.schema.change import Exporter
from agent.schema.installed import ExporterSettings, InstalledExporter
from agent.schema.site import Site
from agent.serve import systemd

pytestmark = pytest.mark.process

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
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    found = Layout({"prefix": str(tmp_path), "service": "s", "scope": "system", "user": "", "address": "", "port": 1})
    found.state.mkdir()
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(systemd, "UNITS", tmp_path / "units")
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


def wanted(port: int, unit: str = "[Unit]\n", agent: str = "a" * 16) -> InstalledExporter:
    site = Site(prefix="", service="s", scope="system", user="", address="", port=1)
    return InstalledExporter(agent, ExporterSettings(site, port, cuda=False), unit)


def change(layout: Layout, to: InstalledExporter) -> None:
    exporter.exporter(layout, Exporter("t", "w", "u", to), lambda _: None)


def units(layout: Layout) -> list[str]:
    return sorted(str(path.relative_to(layout.prefix / "units")) for path in (layout.prefix / "units").rglob("s-*"))


def test_exporter_is_installed_changed_and_removed(layout: Layout, server: HTTPServer) -> None:
    assert installed(layout) == InstalledExporter()
    first = wanted(server.server_port)
    change(layout, first)
    assert installed(layout) == first
    assert units(layout) == ["multi-user.target.wants/s-exporter.service", "s-exporter.service"]
    assert layout.exporter_agent.readlink() == Path(f"agents/{'a' * 16}")
    second = wanted(server.server_port, "[Unit]\n# other\n", "b" * 16)
    change(layout, second)
    change(layout, second)  # a killed run is repeated
    assert installed(layout) == second
    change(layout, InstalledExporter())
    assert (installed(layout), units(layout), list(layout.state.iterdir())) == (InstalledExporter(), [], [])
    assert "stop s-exporter.service" in (layout.prefix / "log").read_text()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("broken", ["does not start", "says nothing", "does not exist"])
def test_unresponsive_exporter_is_rolled_back(layout: Layout, server: HTTPServer, before: bool, broken: str) -> None:
    first = wanted(server.server_port) if before else InstalledExporter()
    change(layout, first)
    with HTTPServer(("127.0.0.1", 0), Metrics) as other:
        other.text = b"up 1\n"  # type: ignore[attr-defined]
        threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
        port = 1 if broken == "does not exist" else other.server_port
        bad = wanted(port, "# broken\n" if broken == "does not start" else "# new\n", "b" * 16)
        refused = refuses(layout, bad)
        other.shutdown()
    assert refused.endswith("; the previous one is restored" if before else "does not run")
    assert installed(layout) == first
    assert not list(layout.state.glob("exporter-before*"))


def refuses(layout: Layout, bad: InstalledExporter) -> str:
    with pytest.raises(AgentError, match="does not run") as raised:
        change(layout, bad)
    return str(raised.value.report["what"])


def test_unresponsive_previous_exporter_is_restored_and_reported(layout: Layout, server: HTTPServer) -> None:
    first = wanted(server.server_port)
    change(layout, first)
    server.text = b""  # type: ignore[attr-defined]
    assert refuses(layout, wanted(1)).endswith("restored, but does not answer either")
    assert installed(layout) == first


def test_killed_exporter_change_restores_the_original(
    layout: Layout, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = wanted(server.server_port)
    change(layout, first)
    bad = wanted(1, "# new\n", "b" * 16)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "_await_answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            change(layout, bad)
    assert installed(layout) == bad
    with pytest.raises(AgentError, match="previous one is restored"):
        change(layout, bad)
    assert installed(layout) == first


def test_old_exporter_link_is_replaced_not_followed(layout: Layout, server: HTTPServer) -> None:
    old = layout.prefix / "old.service"
    old.write_text("old")
    unit_file(layout).symlink_to(old)
    assert installed(layout) == InstalledExporter()
    change(layout, wanted(server.server_port))
    assert (old.read_text(), unit_file(layout).is_symlink()) == ("old", False)
