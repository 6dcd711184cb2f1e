"""HAProxy's configuration: a pure function of the gateway, accepted by the real HAProxy without a warning."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.gateways import Gateway, Limits, Person
from deploy.host import Host, Hosts
from gateway.haproxy import Places, configuration
from gateway.unit import unit
from tests.gateway import check

HOSTS = Hosts(
    hosts={
        "a": Host(address="a"),
        "b": Host(address="b", listen="10.0.0.2"),
        "c": Host(address="c", listen="fd00::2,127.0.0.1", port=8189),
    }
)
PLACES = Places("/opt/comfyui/gateway", "/run/comfyui-gateway", "/opt/comfyui/gateway/certificate.pem")


def rendered(places: Places = PLACES, **values: Any) -> str:
    given = {"host": "a", "names": ("spark.local",), "users": {"anna": Person(role="administrator")}, **values}
    return configuration("home", Gateway(**given), HOSTS, places)


def lines(text: str, start: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(start)]


def test_the_order_of_people_and_names_changes_nothing() -> None:
    people = {"anna": Person(), "ben": Person(role="administrator"), "cleo": Person(host="b")}
    one = rendered(users=people, names=("a.local", "b.local"), behind=("a", "b"))
    two = rendered(users=dict(reversed(people.items())), names=("b.local", "a.local"), behind=("b", "a"))
    assert one == two
    assert one != rendered(users=people, names=("a.local",), behind=("a", "b"))


def test_each_host_is_reached_where_it_listens() -> None:
    assert lines(rendered(behind=("a", "b", "c")), "server ") == [
        "server a 127.0.0.1:8188",
        "server b 10.0.0.2:8188",
        "server c [fd00::2]:8189",
    ]


def test_only_with_several_hosts_people_are_assigned_to_one() -> None:
    assert lines(rendered(), "stick on") == []
    assert lines(rendered(behind=("a", "b")), "stick on") == ["stick on var(txn.user)"]


def test_a_person_with_a_host_never_gets_another() -> None:
    text = rendered(behind=("a", "b"), users={"ben": Person(host="b"), "anna": Person(host="b"), "cleo": Person()})
    assert lines(text, "use_backend") == ["use_backend only_b if { var(txn.user) -m str anna ben }"]
    assert lines(text[text.index("\nbackend only_b") :], "server ") == ["server b 10.0.0.2:8188"]


def test_requests_are_held_as_long_as_a_host_counts_as_up() -> None:
    text = rendered(hold="2m")
    assert lines(text, "retries") == ["retries 120"]
    assert " inter 5s " in text
    assert " fall 24 " in text


@pytest.mark.needs("haproxy", "openssl")
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"users": {}},
        {"users": {"ben": Person()}},
        {"behind": ("a", "b", "c"), "users": {"ben": Person(host="c")}, "limits": Limits(upload="2G")},
        {"listen": "0.0.0.0,::1", "names": ("::1", "192.168.1.20", "spark"), "hold": "1h"},
    ],
)
def test_haproxy_accepts_it_without_a_warning(values: dict[str, Any], tmp_path: Path) -> None:
    places = Places(str(tmp_path), str(tmp_path), f"{tmp_path}/certificate.pem")
    check(tmp_path, rendered(places, **values))


@pytest.mark.needs("systemd-analyze")
def test_the_unit_is_valid_and_contained(tmp_path: Path) -> None:
    """Exposure at most 2.0 of 10."""
    gateway = Gateway(host="a", names=("spark.local",), port=443)
    path = tmp_path / "comfyui-gateway.service"
    folder = "/opt/comfyui/gateway"
    text = unit("home", gateway, "comfyui", folder, f"{folder}/secrets", ["comfyui"], str(tmp_path))
    for program in ("haproxy", "nft"):
        (tmp_path / program).symlink_to("/bin/true")
    path.write_text(text)
    words = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
