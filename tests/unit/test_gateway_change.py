"""Changing a gateway with a scripted systemd and the real HAProxy: it serves, or the previous one serves again."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.change import gateway as change
from agent.files import AgentError, recorded
from agent.layout import Layout
from agent.look.gateway import current, installed, previous
from agent.schema.change import Gateway as Step
from agent.schema.installed import InstalledGateway
from agent.schema.requests import GatewaySecret
from agent.serve import gateway as kept
from agent.serve import systemd
from deploy.gateways import Gateway, Person
from deploy.host import Host, Hosts
from gateway.haproxy import Places, configuration
from tests.gateway import basic, free_port

pytestmark = [pytest.mark.process, pytest.mark.needs("haproxy", "openssl", "nft", "unshare")]

SYSTEMCTL = """#!/bin/sh
echo "$*" >>{place}/systemctl.log
stop() {{ [ ! -f {place}/pid ] || kill $(cat {place}/pid) 2>/dev/null; rm -f {place}/pid; }}
case $1 in
restart|reload-or-restart)
    if grep -q broken {place}/units/s-gateway.service; then stop; exit 1; fi
    if [ $1 = reload-or-restart ] && [ -f {place}/pid ]; then exec kill -USR2 $(cat {place}/pid); fi
    stop
    haproxy -W -D -p {place}/pid -f {place}/gateway/current/haproxy.cfg -f {place}/gateway/secrets/users.cfg 2>/dev/null
    ;;
disable) stop;;
esac
"""


@dataclass
class Served:
    """A host with people and a certificate."""

    layout: Layout
    place: Path
    port: int

    def wanted(
        self, *, unit: str = "unit", names: tuple[str, ...] = ("127.0.0.1",), extra: str = ""
    ) -> InstalledGateway:
        found = Gateway(host="a", names=names, listen="127.0.0.1", port=self.port, users={"anna": Person()}, hold="5s")
        secrets = str(kept.folder_of(self.layout))
        places = Places(secrets, str(self.place), f"{secrets}/certificate.pem")
        text = configuration("home", found, Hosts(hosts={"a": Host(address="a", port=free_port())}), places)
        return InstalledGateway(unit, text + extra, {"1": ("nobody", "no-such-user")})

    def apply(self, wanted: InstalledGateway, certificate: str = "") -> None:
        names = ("127.0.0.1", "spark.local")
        step = Step("t", "w", "u", wanted, "127.0.0.1", self.port, names, certificate)
        change.gateway(self.layout, step, lambda _: None)

    def code(self, host: str = "127.0.0.1", headers: Mapping[str, str] | None = None) -> int:
        """The status of a request: 401 without a login, 403 with one, 421 for an unknown name; 0 if nothing serves."""
        tls = ssl.create_default_context(cafile=str(kept.folder_of(self.layout) / "ca.pem"))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=tls)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/manager", headers={"Host": host, **(headers or {})})
                return connection.getresponse().status
            except (ConnectionRefusedError, ConnectionResetError):  # or it is just ending
                return 0

    def commands(self) -> list[str]:
        return (self.place / "systemctl.log").read_text().splitlines()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    layout = Layout({"prefix": str(tmp_path), "service": "s", "scope": "system", "user": "", "address": "", "port": 1})
    layout.state.mkdir()
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(systemd, "UNITS", tmp_path / "units")
    monkeypatch.setattr(change, "_make_user", lambda: None)
    monkeypatch.setattr(change, "SECONDS", 5)
    (tmp_path / "bin").mkdir()
    for name, text in (("systemctl", SYSTEMCTL.format(place=tmp_path)), ("journalctl", "#!/bin/sh\necho a line\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/sbin:/usr/bin:/bin")
    yield Served(layout, tmp_path, free_port())
    subprocess.run([tmp_path / "bin" / "systemctl", "disable"], check=False)


def test_a_gateway_serves_after_its_first_deploy(host: Served) -> None:
    wanted = host.wanted()
    host.apply(wanted)
    assert host.code() == 401
    assert installed(host.layout) == wanted
    assert not (host.layout.state / "gateway-before.json").exists()


def test_another_configuration_is_loaded_without_a_restart(host: Served) -> None:
    host.apply(host.wanted())
    master = (host.place / "pid").read_text()
    assert host.code("spark.local") == 421
    host.apply(host.wanted(names=("127.0.0.1", "spark.local")))
    end = time.monotonic() + 60
    while host.code("spark.local") != 401 and time.monotonic() < end:
        time.sleep(0.2)
    assert (host.code("spark.local"), host.code()) == (401, 401)
    assert (host.place / "pid").read_text() == master
    assert host.commands()[-1] == "reload-or-restart s-gateway.service"
    assert len(list((host.place / "gateway/releases").iterdir())) == 2


def test_the_release_before_is_kept_for_a_rollback(host: Served) -> None:
    texts = [host.wanted(extra=f"\n# {i}\n") for i in range(3)]
    for each in texts:
        host.apply(each)
        host.apply(each)  # again: the one before stays
    assert recorded(previous(host.layout) / "step.json", Step).gateway == texts[1]
    assert len(list((host.place / "gateway/releases").iterdir())) == 2
    with pytest.raises(AgentError):
        host.apply(host.wanted(extra="\nnonsense\n"))
    assert recorded(previous(host.layout) / "step.json", Step).gateway == texts[1]


def test_the_firewall_lets_named_users_and_services_through(host: Served) -> None:
    """A user that does not exist yet is no error; as soon as it does, the rules are others."""
    host.apply(host.wanted())
    text = (current(host.layout) / "firewall.nft").read_text()
    assert "dport 1 meta skuid != { 0, 65534, 61184-65519 } reject" in text
    done = subprocess.run(["unshare", "-rn", "nft", "-f", current(host.layout) / "firewall.nft"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("extra", ["\nbackend comfyui\n", "\nnonsense\n"])
def test_a_configuration_that_haproxy_refuses_changes_nothing(host: Served, extra: str) -> None:
    before = host.wanted()
    host.apply(before)
    link = current(host.layout).readlink()
    with pytest.raises(AgentError) as caught:
        host.apply(host.wanted(extra=extra))
    assert caught.value.report["cause"]
    assert (host.code(), installed(host.layout), current(host.layout).readlink()) == (401, before, link)


def test_a_unit_that_does_not_start_is_replaced_by_the_previous_one(host: Served) -> None:
    before = host.wanted()
    host.apply(before)
    with pytest.raises(AgentError) as caught:
        host.apply(host.wanted(unit="broken", names=("spark.local",)))
    assert caught.value.report["log"] == ["a line"]
    assert (host.code(), installed(host.layout)) == (401, before)


def test_a_first_deploy_that_fails_leaves_nothing(host: Served) -> None:
    with pytest.raises(AgentError):
        host.apply(host.wanted(unit="broken"))
    assert (host.code(), installed(host.layout)) == (0, InstalledGateway())
    assert list((host.place / "units").iterdir()) == []


def test_an_interrupted_change_restores_the_gateway_before_it(host: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt is killed after the switch; the second, which resumes it, fails."""
    before = host.wanted()
    host.apply(before)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(change, "_await_answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        host.apply(host.wanted(names=("spark.local",)))
    assert installed(host.layout) != before
    with pytest.raises(AgentError):
        host.apply(host.wanted(unit="broken"))
    assert (host.code(), installed(host.layout)) == (401, before)


def test_people_are_known_to_a_gateway_in_service_at_once(host: Served) -> None:
    host.apply(host.wanted())
    assert host.code(headers=basic("anna", "secret")) == 401
    kept.gateway(host.layout, GatewaySecret("password", "a@b", "anna", "secret"))
    end = time.monotonic() + 120
    while host.code(headers=basic("anna", "secret")) != 403:
        assert time.monotonic() < end
        time.sleep(0.5)  # a limit on failed logins counts these requests
    kept.gateway(host.layout, GatewaySecret("remove", "a@b", "anna"))
    while host.code(headers=basic("anna", "secret")) not in (401, 429):
        assert time.monotonic() < end
        time.sleep(0.5)


def test_a_given_certificate_is_used(host: Served) -> None:
    host.apply(host.wanted())
    given = host.place / "given.pem"
    given.write_bytes((kept.folder_of(host.layout) / "certificate.pem").read_bytes())
    kept.certify(kept.folder_of(host.layout), ["other.local"])
    host.apply(host.wanted(names=("127.0.0.1", "spark.local")), str(given))
    assert (kept.folder_of(host.layout) / "certificate.pem").read_bytes() == given.read_bytes()
    with pytest.raises(AgentError):
        host.apply(host.wanted(), "/nowhere.pem")
    given.write_text("no certificate")
    with pytest.raises(AgentError):
        host.apply(host.wanted(), str(given))


def test_a_removed_gateway_leaves_people_and_certificate(host: Served) -> None:
    host.apply(host.wanted())
    change.put(host.layout, InstalledGateway())
    assert (host.code(), installed(host.layout)) == (0, InstalledGateway())
    assert json.loads((kept.folder_of(host.layout) / "people.json").read_text()) == {}
    host.apply(host.wanted())
    assert host.code() == 401
