"""Gateways from the client: what a deploy would do, and what is said of people."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from agent.schema import change as schema
from agent.schema.gateway import Certificate, GatewayState, Given, LogDisk, Person, Served, Server
from agent.schema.installed import InstalledGateway
from deploy import browse, host
from deploy.plan import Options, Plan
from gateway import control
from tests.errors import raises
from tests.plans import running as running_facts

HOSTS = """
[hosts.spark]
address = "spark"
profile = "cpu"
[gateways.home]
host = "spark"
names = ["spark.local", "192.168.1.20"]
users.anna = { role = "administrator" }
users.ben = {}
"""


OWN: dict[str, Any] = {"until": "2027", "expired": False, "renew": False, "uncovered": ()}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hosts.toml"
    path.write_text(HOSTS)
    monkeypatch.setenv("HEARTH_HOSTS", str(path))
    return path


def reported(**values: Any) -> GatewayState:
    """A host whose gateway is as configured, except for these values, by field."""
    name, found = control.find("")
    right = control.wanted(name, found, "/opt/comfyui", "comfyui")
    well = GatewayState(
        installed=right,
        active=True,
        guarded=True,
        people={each: Person(True) for each in found.users},
        certificate=Served(**OWN, names=tuple(sorted(found.names))),
        given=None,
        holder={},
        journal=LogDisk(True, 50, 100),
        servers=(),
        previous=None,
        missing=(),
        kept=True,
    )
    return replace(well, **values)


def planned(facts: Any = None, **values: Any) -> Plan:
    name, found = control.find("")
    return control.plan(name, found, host.target("spark"), facts or running_facts(), reported(**values))


@pytest.mark.usefixtures("written")
def test_a_gateway_as_configured_needs_nothing() -> None:
    found = planned()
    assert (found.steps, found.refusals, found.notes) == ((), (), ())


def test_the_firewall_lets_the_user_of_each_comfyui_through(written: Path) -> None:
    """With scope user the agent, which asks for its health, is that user, too. Others are reached over the network."""
    written.write_text(
        HOSTS.replace("[gateways.home]", """
[hosts.ann]
address = "spark"
profile = "cpu"
port = 8288
run_as = "ann"
[hosts.ben]
address = "spark"
profile = "cpu"
port = 8388
scope = "user"
user = "ben"
[hosts.box]
address = "box"
profile = "cpu"
listen = "192.168.1.20"
[gateways.home]
behind = ["spark", "ann", "ben", "box"]""")
    )  # fmt: skip
    name, found = control.find("")
    access = control.wanted(name, found, "/opt/comfyui", "comfyui").access
    users = {"8188": "comfyui", "8288": "ann", "8388": "ben"}
    users |= {"28188": "comfyui", "28288": "ann", "28388": "ben"}  # of trials
    assert {port: names[2] for port, names in access.items()} == users
    assert host.target("ben").site.trial == 28388
    assert not host.target("box").site.trial  # on another machine nothing is guarded
    assert {tuple(names[:2]) for names in access.values()} == {("hearth-gateway", "hearth-exporter")}


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize(
    "values",
    [
        {"unit": "", "configuration": ""},
        {"unit": "other"},
        {"configuration": "other"},
        {"access": {}},
    ],
)
def test_another_installed_gateway_is_replaced(values: dict[str, Any]) -> None:
    (step,) = planned(installed=replace(reported().installed, **values)).steps
    assert "another" in step.why or not values["unit"]


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize(
    "values",
    [
        {"installed": InstalledGateway(), "active": False},
        {"active": False},
        {"guarded": False},
        {"servers": (Server("spark", "MAINT", 0),)},
        {"certificate": Served(**OWN, names=("other",))},
        {"certificate": Served(**{**OWN, "renew": True}, names=("192.168.1.20", "spark.local"))},
    ],
)
def test_whatever_differs_is_one_step(values: dict[str, Any]) -> None:
    (step,) = planned(**values).steps
    assert isinstance(step, schema.Gateway)
    assert (step.address, step.port, step.names) == ("127.0.0.1", 443, ("spark.local", "192.168.1.20"))
    assert schema.unpacked(schema.packed(step)) == step
    assert step.why


GIVEN = Given(**OWN, same=True)


@pytest.mark.parametrize(
    ("given", "steps", "refused"),
    [
        ({}, 0, []),
        ({"same": False}, 1, []),
        ({"renew": True}, 0, []),
        ({"same": False, "expired": True}, 0, ["certificate"]),
        ({"same": False, "uncovered": ("spark.local",)}, 0, ["certificate"]),
        ({"same": False, "until": ""}, 0, ["certificate"]),
    ],
)
def test_a_certificate_of_yours_is_used_if_it_is_valid(
    written: Path, given: dict[str, Any], steps: int, refused: list[str]
) -> None:
    """The gateway's own is not looked at. A renewed file is deployed again."""
    written.write_text(HOSTS.replace("users.anna", 'certificate = "/x.pem"\nusers.anna', 1))
    found = planned(certificate=Served("", False, True, (), ()), given=replace(GIVEN, **given))
    assert (len(found.steps), [each.kind for each in found.refusals]) == (steps, refused)
    assert [each.certificate for each in found.steps if isinstance(each, schema.Gateway)] == ["/x.pem"] * steps
    assert len(found.notes) == ("renew" in given)


@pytest.mark.usefixtures("written")
def test_a_port_that_another_program_uses_is_refused() -> None:
    (refusal,) = planned(active=False, holder={"pid": 12, "command": "nginx", "unit": "nginx.service"}).refusals
    assert (refusal.kind, "nginx" in refusal.what, "nginx.service" in refusal.remedy) == ("port-taken", True, True)


@pytest.mark.usefixtures("written")
def test_reasons_against_a_deploy() -> None:
    both = planned(missing=("/usr/sbin/haproxy", "/usr/sbin/nft")).refusals
    assert [(each.kind, each.remedy.rpartition(" ")[2]) for each in both] == [
        ("no-program", "haproxy"),
        ("no-program", "nftables"),
    ]
    assert [each.kind for each in planned(replace(running_facts(), root=False)).refusals] == ["no-root"]


@pytest.mark.usefixtures("written")
def test_a_tunnel_to_a_host_behind_its_own_gateway_is_refused() -> None:
    """The firewall lets no login reach ComfyUI."""
    with raises("usage", match="only gateway home"):
        browse.run("spark", "")


@pytest.mark.usefixtures("written")
def test_a_rollback_serves_the_release_before(monkeypatch: pytest.MonkeyPatch) -> None:
    planners: list[Any] = []
    monkeypatch.setattr(control, "change_each", lambda _, change, __: planners.append(change.plan))
    control.rollback("", Options())

    class Reports:
        def call(self, _: str, **__: Any) -> dict[str, Any]:
            return asdict(found)

    found = reported()
    (refusal,) = planners[0](Reports(), host.target("spark"), running_facts()).refusals
    assert refusal.kind == "no-release"
    (step,) = planned(active=False).steps
    assert isinstance(step, schema.Gateway)
    before = replace(step, gateway=replace(step.gateway, configuration="the one before"))
    found = reported(previous=before)
    (back,) = planners[0](Reports(), host.target("spark"), running_facts()).steps
    assert (back.gateway.configuration, back.port) == ("the one before", 443)
    found = reported(installed=back.gateway)
    assert planners[0](Reports(), host.target("spark"), running_facts()).steps == ()


@pytest.mark.usefixtures("written")
def test_people_who_cannot_log_in_yet_are_named() -> None:
    (note,) = planned(people={"anna": Person(True)}).notes
    assert "inv gateway users add ben" in note


def test_the_status_names_what_is_wrong() -> None:
    found = control.Status(
        name="home",
        host="spark",
        address="https://spark.local",
        state="in service",
        hosts=(Server("box", "MAINT", 3),),
        guarded=True,
        certificate=Certificate(**OWN),
        people={"ben": control.Member(True, 2)},
    )
    well = control.rows(found)
    assert ["box", "MAINT", "3"] in [each.split() for each in well]
    worse = replace(found, guarded=False, certificate=Certificate("2025", True, True, ("spark.local",)))
    assert len(control.rows(worse)) == len(well) + 1
    assert control.rows(worse)[0].endswith("certificate until 2025, expired, not for spark.local")


def test_a_gateway_is_found_by_name_or_alone(written: Path) -> None:
    assert control.find("")[0] == control.find("home")[0] == "home"
    with raises("unknown-name"):
        control.find("office")
    written.write_text(
        f'{HOSTS}\n[hosts.box]\naddress = "b"\nprofile = "cpu"\n[gateways.two]\nhost = "box"\nnames = ["b"]'
    )
    with raises("unknown-name"):
        control.find("")
    written.write_text("")
    with raises("unknown-name"):
        control.find("")


@pytest.mark.parametrize(
    ("values", "address"),
    [
        ('names = ["spark.local"]', "https://spark.local"),
        ('names = ["spark.local"]\nport = 8443', "https://spark.local:8443"),
        ('names = ["fd00::1"]\nport = 8443', "https://[fd00::1]:8443"),
    ],
)
def test_the_address_that_people_type(written: Path, values: str, address: str) -> None:
    written.write_text(f'[hosts.spark]\naddress = "s"\nprofile = "cpu"\n[gateways.home]\nhost = "spark"\n{values}\n')
    assert control.address(control.find("")[1]) == address
