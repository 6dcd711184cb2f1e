"""Gateways in hosts.toml: parsed with the hosts, and refused where they would not protect anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import gateways, host
from tests.errors import raises

HOSTS = """
[hosts.spark]
address = "spark"
profile = "cpu"
[hosts.box]
address = "box"
profile = "cpu"
listen = "192.168.1.20"
[hosts.lap]
address = "lap"
profile = "cpu"
[hosts.cloud]
address = "cloud"
profile = "cpu"
scope = "user"
[groups]
home = ["spark", "box"]
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hosts.toml"
    monkeypatch.setenv("HEARTH_HOSTS", str(path))
    return path


def gateway(written: Path, text: str) -> gateways.Gateway:
    written.write_text(f"{HOSTS}\n[gateways.home]\n{text}")
    return host.hosts().gateways["home"]


LEAST = 'host = "spark"\nnames = ["spark.local"]\n'


def test_a_gateway_serves_its_own_host_by_default(written: Path) -> None:
    found = gateway(written, LEAST)
    known = host.hosts()
    assert gateways.members(found, known) == ["spark"]
    assert gateways.endpoint(found, known.hosts["spark"], known) == "127.0.0.1"
    assert host.target("spark").gateways == ("home",)
    assert host.target("box").gateways == ()


def test_groups_and_hosts_behind_a_gateway_are_each_there_once(written: Path) -> None:
    found = gateway(written, f'{LEAST}behind = ["box", "home"]')
    known = host.hosts()
    assert gateways.members(found, known) == ["box", "spark"]
    assert gateways.endpoint(found, known.hosts["box"], known) == "192.168.1.20"


BEN = '[hosts.ben]\naddress = "spark"\nprofile = "cpu"\nservice = "ben"\nprefix = "/opt/ben"\nport = 8288\n'


def test_other_entries_for_the_gateways_machine_are_reached_at_loopback(written: Path) -> None:
    """They isolate people from each other."""
    found = gateway(written, f'{LEAST}behind = ["spark", "ben"]\nusers.ben.host = "ben"\n{BEN}')
    known = host.hosts()
    assert gateways.endpoint(found, known.hosts["ben"], known) == "127.0.0.1"
    with raises("config", match="needs no login"):
        gateway(written, f'{LEAST}behind = ["spark", "ben"]\n{BEN}listen = "192.168.1.20"')
    with raises("config", match="login"):
        gateway(written, f'{LEAST}behind = ["spark", "ben"]\n{BEN}scope = "user"')
    gateway(written, f'{LEAST}behind = ["spark", "ben"]\n{BEN}scope = "user"\nuser = "ben"')


def test_a_port_that_trials_need_is_not_free_for_others(written: Path) -> None:
    with raises("config", match="28188"):
        gateway(written, f'{LEAST}behind = ["spark", "ben"]\n{BEN.replace("8288", "28188")}')
    with raises("config", match="28188"):
        gateway(written, f"{LEAST}port = 28188")
    assert gateways.trial_port(50_000) == 30_000


def test_people_are_named_as_they_like(written: Path) -> None:
    """Neither their names nor those of gateways are taken for the names of secrets."""
    found = gateway(written, f'{LEAST}users.pat = {{ role = "administrator" }}\nusers.dsn = {{}}')
    assert {name: person.role for name, person in found.users.items()} == {"pat": "administrator", "dsn": "user"}


@pytest.mark.parametrize("text", ['users.ben = { password = "x" }', 'token = "x"', 'limits.auth = "x"'])
def test_secrets_are_refused(written: Path, text: str) -> None:
    with raises("secret"):
        gateway(written, f"{LEAST}{text}")


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ('host = "spork"\nnames = ["a"]', "unknown-name", "spark"),
        ('host = "home"\nnames = ["a"]', "unknown-name", "home"),
        ('host = "cloud"\nnames = ["a"]', "config", "inv open"),
        (f'{LEAST}behind = ["spork"]', "unknown-name", "spark"),
        (f'{LEAST}behind = ["lap"]', "config", "does not reach"),
        ('host = "box"\nnames = ["a"]', "config", "needs no login"),
        ('host = "spark"', "config", "names"),
        ('host = "spark"\nnames = []', "config", "no names"),
        (f"{LEAST}port = 0", "config", "port"),
        (f"{LEAST}port = 8188", "config", "port"),
        (f'{LEAST}listen = "spark.local"', "config", "not an IP address"),
        (f'{LEAST}users.ben.host = "box"', "config", "not behind"),
        (f'{LEAST}users.ben.role = "root"', "config", "root"),
        (f"{LEAST}limits.requests = 0", "config", "requests"),
        (f'{LEAST}limits.upload = "100"', "config", "upload"),
        (f'{LEAST}hold = "1s"', "config", "hold"),
        (f'{LEAST}hold = "long"', "config", "hold"),
        (f"{LEAST}limits.promts = 3", "config", "prompts"),
    ],
)
def test_gateways_that_would_not_work_are_refused(written: Path, text: str, kind: str, said: str) -> None:
    with raises(kind) as raised:
        gateway(written, text)
    assert said in str(raised.value)


@pytest.mark.parametrize("name", ["Ben", "ben:x", "ben x", 'ben"', "ben\\n", "-ben", "", "b" * 33, "bén"])
def test_names_of_people_that_a_configuration_could_misread_are_refused(written: Path, name: str) -> None:
    with raises("config"):
        gateway(written, f'{LEAST}[gateways.home.users."{name}"]')


@pytest.mark.parametrize("name", ["*", "a b", "A", "https://a", "a:443", "a/b", "-a", "a..b", "fe80::1%eth0", ""])
def test_names_that_are_no_host_are_refused(written: Path, name: str) -> None:
    with raises("config"):
        gateway(written, f'host = "spark"\nnames = ["{name}"]')


@pytest.mark.parametrize("path", ["x.pem", "/a b", "/a\\nb", '/a\\"b', "/a/$b"])
def test_paths_that_a_configuration_could_misread_are_refused(written: Path, path: str) -> None:
    with raises("config"):
        gateway(written, f'{LEAST}certificate = "{path}"')


def test_two_gateways_on_one_host_are_refused(written: Path) -> None:
    with raises("config", match="already runs gateway home"):
        gateway(written, f'{LEAST}[gateways.two]\nhost = "spark"\nnames = ["b"]\nport = 444')
