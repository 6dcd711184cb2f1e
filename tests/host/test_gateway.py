"""A gateway on a real host: deployed, changed and operated by `inv gateway`, in front of a stand-in for ComfyUI."""

from __future__ import annotations

import http.client
import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.gateway import StandIn
from tests.host.fleet import Fleet, fresh
from tests.host.machine import free_port

pytestmark = [pytest.mark.host, pytest.mark.needs("haproxy", "openssl")]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A booted machine with this machine's HAProxy; ComfyUI's port, which it shares, has a stand-in."""
    with fresh(tmp_path_factory.mktemp("fleet"), "gateway", Fleet) as one:
        one.machine.boot()
        install_haproxy(one.machine.root)
        comfy = StandIn(one.machine.port)
        yield one
        comfy.close()


def install_haproxy(root: Path) -> None:
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin")
    assert program is not None
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.split()
    for path in [program, *(each for each in listed if each.startswith("/"))]:
        place = root / path.lstrip("/")
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def ask(port: int, authority: str, headers: dict[str, str]) -> int:
    tls = ssl.create_default_context(cadata=authority)
    with closing(http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=tls)) as connection:
        connection.request("POST", "/prompt", body=b'{"prompt": {}}', headers=headers)
        return connection.getresponse().status


def done(fleet: Fleet, *words: str) -> str:
    ended = fleet.inv("gateway", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_people_use_a_deployed_gateway(fleet: Fleet) -> None:
    port, machine = free_port(), fleet.machine

    def configure(prompts: int) -> None:
        fleet.configure(
            f'[gateways.home]\nhost = "spark"\nport = {port}\nlisten = "127.0.0.1"\nnames = ["127.0.0.1"]\n'
            f"users.anna = {{}}\nlimits.prompts = {prompts}\n"
        )

    configure(30)
    dry = fleet.inv("gateway", "deploy", "--dry-run")
    assert dry.returncode == 2, dry.stderr
    done(fleet, "deploy")
    assert "nothing to do" in done(fleet, "deploy")
    token = done(fleet, "users", "add", "anna", "--token").strip()
    authority = done(fleet, "cert")
    login = {"Authorization": f"Bearer {token}"}
    assert ask(port, authority, {}) == 401
    assert ask(port, authority, login) == 200
    status = json.loads(done(fleet, "status", "--json"))
    assert (status["state"], status["people"]["anna"]["tokens"]) == ("in service", 1)
    end = time.monotonic() + 20
    while not any(each["user"] == "anna" for each in json.loads(done(fleet, "audit", "--json"))):
        assert time.monotonic() < end, machine.run("journalctl --no-pager --unit=comfyui-gateway --lines=20")
    (logged,) = [each for each in json.loads(done(fleet, "audit", "--json")) if each["user"] == "anna"]
    assert (logged["path"], logged["status"], logged["from"]) == ("/prompt", 200, "127.0.0.1")
    machine.run("systemd-analyze security --no-pager --threshold=20 comfyui-gateway.service")

    main = machine.run("systemctl show comfyui-gateway --property=MainPID")
    configure(1)
    done(fleet, "deploy")  # loaded without a restart
    assert machine.run("systemctl show comfyui-gateway --property=MainPID") == main
    codes = [ask(port, authority, login) for _ in range(3)]
    assert codes[-1] == 429

    machine.run("systemctl kill --kill-whom=main --signal=KILL comfyui-gateway")
    end = time.monotonic() + 20
    while machine.run("systemctl is-active comfyui-gateway", check=False).strip() != "active":
        assert time.monotonic() < end
    assert ask(port, authority, {}) == 401
    done(fleet, "users", "remove", "anna")
    assert ask(port, authority, login) == 401

    fleet.inv("nuke", "--host", "spark", "--yes")
    left = "ls -d /opt/comfyui/gateway /etc/systemd/system/comfyui-gateway.service 2>/dev/null; pgrep -c haproxy"
    assert machine.run(left, check=False).strip() == "0"
