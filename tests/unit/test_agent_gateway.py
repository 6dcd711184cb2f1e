"""What a gateway keeps on its host: people and certificates, with the real openssl and HAProxy."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.change import trial
from agent.change.trial import Trial
from agent.files import AgentError
from agent.layout import Layout
from agent.look import gateway as look
from agent.schema.change import CutOver
from agent.schema.gateway import Person
from agent.schema.manifest import ReleaseManifest
from agent.schema.requests import GatewaySecret
from agent.serve import gateway as kept
from agent.serve.systemd import Systemd
from deploy.gateways import Limits
from tests.gateway import Running, basic, free_port, running

pytestmark = [pytest.mark.process, pytest.mark.needs("openssl", "haproxy")]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})


def ask(layout: Layout, action: str, person: str = "", **values: Any) -> Any:
    return kept.gateway(layout, GatewaySecret(action, "a@b", person, **values))


def test_haproxy_accepts_the_people_that_were_added(layout: Layout, tmp_path: Path) -> None:
    ask(layout, "password", "anna", value='päss $6$ "x" \\ :%')
    token = ask(layout, "token", "ben").token
    assert kept.people(layout) == {"anna": Person(True, 0), "ben": Person(False, 1)}
    place = tmp_path / "gateway-files"
    place.mkdir()
    with running(place, limits=Limits(logins=100)) as (served, _):
        assert isinstance(served, Running)

        def code(headers: dict[str, str]) -> int:
            for name in ("users.cfg", "tokens.map"):
                (place / name).write_text((kept.folder_of(layout) / name).read_text())
            served.reload()
            return served.ask("GET", "/", headers=headers).status

        assert code(basic("anna", 'päss $6$ "x" \\ :%')) == 200
        assert code(basic("anna", "other")) == 401
        assert code({"Authorization": f"Bearer {token}"}) == 200
        ask(layout, "password", "anna", value="new one")
        assert code(basic("anna", 'päss $6$ "x" \\ :%')) == 401
        assert code(basic("anna", "new one")) == 200
        assert ask(layout, "remove", "ben").known
        assert code({"Authorization": f"Bearer {token}"}) == 401
        assert not ask(layout, "remove", "ben").known


def test_a_trial_runs_where_only_the_gateway_reaches_it(layout: Layout) -> None:
    assert Trial(layout).port() > 0
    layout.trial = free_port()
    assert Trial(layout).port() == layout.trial
    with socket.create_server(("127.0.0.1", layout.trial)), pytest.raises(AgentError) as raised:
        Trial(layout).port()
    assert (raised.value.report["kind"], str(layout.trial) in raised.value.report["what"]) == ("trial", True)


def test_a_trial_without_its_port_does_not_show_the_log_of_an_earlier_one(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.trial = free_port()
    layout.state.mkdir()
    (layout.state / "trial.log").write_text("earlier")
    monkeypatch.setattr(trial, "trial_of", lambda *_: Trial(layout))
    step = CutOver("", "", "", 60, False, "new", "yes")
    with socket.create_server(("127.0.0.1", layout.trial)), pytest.raises(AgentError) as raised:
        trial.run_trial(layout, Systemd(layout), ReleaseManifest(id="new"), print, step, layout.state)
    assert (raised.value.report["kind"], raised.value.report["log"]) == ("trial", [])


def test_no_secret_is_readable_or_recorded(layout: Layout) -> None:
    ask(layout, "password", "anna", value="tell-nobody")
    token = ask(layout, "token", "anna").token
    ask(layout, "certificate", names=["spark.local"])
    folder = kept.folder_of(layout)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "people.json": 0o600, "users.cfg": 0o640, "tokens.map": 0o640, "certificate.pem": 0o640, "ca.key": 0o600,
        "ca.pem": 0o644, "names.json": 0o644, "lock": 0o600,
    }  # fmt: skip
    for path in [*folder.iterdir(), layout.history]:
        assert "tell-nobody" not in path.read_text()
        assert token not in path.read_text()
    assert [json.loads(line)["action"] for line in layout.history.read_text().splitlines()] == [
        "gateway password anna",
        "gateway token anna",
    ]


@pytest.mark.parametrize("person", ["", "Anna", "anna\n    user root", "a b", "../x", "a" * 33])
def test_names_that_haproxy_would_misread_are_refused(layout: Layout, person: str) -> None:
    for action in ("password", "token", "remove"):
        with pytest.raises(AgentError):
            ask(layout, action, person, value="x")


@pytest.mark.parametrize("value", ["", "a\nb", "a\0b"])
def test_passwords_that_openssl_would_cut_are_refused(layout: Layout, value: str) -> None:
    with pytest.raises(AgentError):
        ask(layout, "password", "anna", value=value)
    assert not (kept.folder_of(layout) / "users.cfg").exists()


NAMES = [["spark.local", "192.168.1.20", "fd00::1"], ["spark.local"], ["192.168.1.20"]]


@pytest.mark.parametrize("names", NAMES)
def test_the_certificate_is_valid_for_the_names_and_made_once(layout: Layout, names: list[str]) -> None:
    first = ask(layout, "certificate", names=names)
    assert first.made
    folder = kept.folder_of(layout)
    for name in names:
        verify(folder / "ca.pem", folder / "certificate.pem", name)
    ssl.create_default_context(cadata=first.authority)
    assert ask(layout, "certificate", names=names) == replace(first, made=False)
    other = ask(layout, "certificate", names=[*names, "box.local"])
    assert other.made
    assert other.authority != first.authority


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("other", ["DNS:bank.example", "IP:10.0.0.1", "IP:fd00::2", "DNS:spark.local.example"])
def test_the_authority_cannot_sign_for_other_names(layout: Layout, names: list[str], other: str) -> None:
    """Whoever trusts it trusts it for this gateway only."""
    ask(layout, "certificate", names=names)
    folder = kept.folder_of(layout)
    words = ["openssl", "req", "-x509", "-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca.key", "-nodes", "-days", "9"]
    words += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", f"{folder}/k", "-out", f"{folder}/new"]
    subprocess.run([*words, "-subj", "/CN=x", "-addext", f"subjectAltName={other}"], check=True, capture_output=True)
    with pytest.raises(subprocess.CalledProcessError):
        verify(folder / "ca.pem", folder / "new", other.partition(":")[2])


def test_a_certificate_is_renewed_before_it_ends(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "DAYS", 29)
    first = ask(layout, "certificate", names=["spark.local"])
    served = kept.folder_of(layout) / "certificate.pem"
    assert kept.validity(served).renew
    monkeypatch.undo()
    renewed = ask(layout, "certificate", names=["spark.local"])
    assert (renewed.made, renewed.authority) == (True, first.authority)
    assert renewed.until != first.until


def test_what_is_wrong_with_a_certificate_is_known(layout: Layout, tmp_path: Path) -> None:
    """The answers of the real openssl: an old one, one for other names, and none."""
    ask(layout, "certificate", names=["spark.local", "192.168.1.20"])
    served = kept.folder_of(layout) / "certificate.pem"
    well = kept.validity(served, ["spark.local", "192.168.1.20"])
    assert (well.expired, well.renew, well.uncovered) == (False, False, ())
    assert kept.validity(served, ["spark.local", "box.local", "192.168.1.2"]).uncovered == ("box.local", "192.168.1.2")
    old = tmp_path / "old.pem"
    key = f"{tmp_path}/key"
    make = [
        "openssl",
        "req",
        "-new",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=x",
    ]
    make += ["-addext", "subjectAltName=DNS:*.home.local", "-keyout", key, "-out", f"{tmp_path}/request"]
    subprocess.run(make, check=True, capture_output=True)
    sign = ["openssl", "x509", "-req", "-in", f"{tmp_path}/request", "-signkey", key, "-days", "-1", "-out", str(old)]
    subprocess.run([*sign, "-copy_extensions", "copyall"], check=True, capture_output=True)
    found = kept.validity(old, ["spark.home.local", "spark"])
    assert (found.expired, found.renew, found.uncovered) == (True, True, ("spark",))
    assert kept.validity(tmp_path / "none.pem").until == ""


def test_a_certificate_that_was_renewed_is_noticed(layout: Layout, tmp_path: Path) -> None:
    ask(layout, "certificate", names=["spark.local"])
    given = tmp_path / "given.pem"
    given.write_bytes((kept.folder_of(layout) / "certificate.pem").read_bytes())
    port = free_port()

    def looked() -> Any:
        return look.gateway(layout, port, ["spark.local"], str(given))

    assert (looked().given.same, looked().given.uncovered, looked().holder) == (True, (), {})
    given.write_text("another")
    with socket.socket() as held:
        held.bind(("127.0.0.1", port))
        held.listen()
        assert (looked().given.same, looked().given.until) == (False, "")
        assert looked().holder["pid"] == os.getpid()


def verify(authority: Path, certificate: Path, name: str) -> None:
    kind = "-verify_ip" if ":" in name or name[0].isdigit() else "-verify_hostname"
    words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(authority), kind, name]
    subprocess.run([*words, str(certificate)], check=True, capture_output=True)
