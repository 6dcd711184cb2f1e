"""A gateway on a real host: deployed, changed and operated by `inv gateway`, in front of a stand-in for ComfyUI."""

from __future__ import annotations

import ctypes
import http.client
import json
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from deploy.gateways import trial_port
from tests import warm
from tests.gateway import StandIn
from tests.host.fleet import Fleet, fresh, within
from tests.host.machine import Machine, free_port

pytestmark = [pytest.mark.host, pytest.mark.needs("haproxy", "openssl", "nft")]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A booted machine with a network of its own, this machine's HAProxy and nft, and a stand-in for ComfyUI."""
    with fresh(tmp_path_factory.mktemp("fleet"), "gateway", Fleet, bare=True, network=False) as one:
        one.machine.boot()
        install_gateway(one.machine.root)
        with network_of(one.machine):
            comfy = StandIn(one.machine.port)
            yield one
            comfy.close()


@contextmanager
def network_of(machine: Machine) -> Iterator[None]:
    """Let this thread, and the threads and processes that it starts, use a machine's network."""
    warm.start()
    setns, network = ctypes.CDLL(None).setns, 0x40000000  # CLONE_NEWNET
    with Path("/proc/thread-self/ns/net").open() as own, Path(f"/proc/{machine.first}/ns/net").open() as theirs:
        assert setns(theirs.fileno(), network) == 0
        try:
            yield
        finally:
            assert setns(own.fileno(), network) == 0


def install_gateway(root: Path) -> None:
    """Copy HAProxy and nft of this machine, with their libraries."""
    for program in ("/usr/sbin/haproxy", "/usr/sbin/nft"):
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.split()
        for path in [program, *(each for each in listed if each.startswith("/"))]:
            place = root / path.lstrip("/")
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)


def ask(port: int, authority: str, headers: dict[str, str], body: str = '{"prompt": {}}') -> int:
    tls = ssl.create_default_context(cadata=authority)
    with closing(http.client.HTTPSConnection("127.0.0.1", port, timeout=150, context=tls)) as connection:
        connection.request("POST", "/prompt", body=body, headers=headers)
        return connection.getresponse().status


def done(fleet: Fleet, *words: str) -> str:
    ended = fleet.inv("gateway", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


CONNECT = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {port}), 5)'"


def reaches(fleet: Fleet, user: str, port: int = 0) -> bool:
    """Whether a user of the machine reaches a port; by default ComfyUI's."""
    port = port or fleet.machine.port
    words = f"setpriv --reuid={user} --clear-groups {CONNECT.format(port=port)} && echo reached"
    return "reached" in fleet.machine.run(words, check=False)


def hook_installs_a_renewed_certificate(fleet: Fleet, port: int, authority: str) -> None:
    """The hook for certbot in the how-to."""
    page = (fleet.checkout / "docs/how-to/share-over-the-network.md").read_text()
    hook = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0]
    root, made = fleet.machine.root, fleet.place
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    words += ["-keyout", f"{made}/privkey.pem", "-out", f"{made}/fullchain.pem", "-subj", "/CN=renewed"]
    subprocess.run([*words, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    (root / "root/live").mkdir()
    for name in ("privkey.pem", "fullchain.pem"):
        shutil.copy(made / name, root / "root/live")
    (root / "root/hook").write_text(hook)
    served = root / "opt/comfyui/gateway/secrets/certificate.pem"
    before = served.read_bytes()
    fleet.machine.run("RENEWED_LINEAGE=/root/live sh /root/hook")
    await_certificate(port, (made / "fullchain.pem").read_text())
    served.write_bytes(before)
    fleet.machine.run("systemctl reload comfyui-gateway")
    await_certificate(port, authority)


def await_certificate(port: int, authority: str) -> None:
    """Wait until a reload has loaded a certificate of this authority."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(ssl.SSLError):
            assert ask(port, authority, {}) == 401
            return
    raise AssertionError("the certificate is not served")


def others_do_not_reach_comfyui(fleet: Fleet) -> None:
    """Only the gateway, root, ComfyUI itself and services of systemd do, also while the gateway is stopped."""
    machine = fleet.machine
    machine.run("useradd --system comfyui")
    done(fleet, "deploy")
    reached = {who: reaches(fleet, who) for who in ("deployer", "nobody", "hearth-gateway", "comfyui", "root")}
    assert reached == {"deployer": False, "nobody": False, "hearth-gateway": True, "comfyui": True, "root": True}
    with closing(StandIn(trial := trial_port(machine.port))):
        assert {who: reaches(fleet, who, trial) for who in reached} == reached
    machine.run("systemd-run --wait --quiet --property=DynamicUser=yes " + CONNECT.format(port=machine.port))
    machine.run("systemctl stop comfyui-gateway")
    assert not reaches(fleet, "deployer")
    machine.run("nft flush ruleset")
    assert reaches(fleet, "deployer")
    assert json.loads(fleet.inv("gateway", "status", "--json").stdout)["guarded"] is False
    done(fleet, "deploy")
    assert not reaches(fleet, "deployer")


def people_are_served_without_room_for_the_log(fleet: Fleet, use: Callable[[], int]) -> None:
    """The doctor tells that there is none."""
    machine = fleet.machine
    machine.run("mount -t tmpfs -o size=8m none /var/log/journal && systemctl restart systemd-journald")
    machine.run("cat /dev/zero >/var/log/journal/full", check=False)
    assert use() == 200
    told = {each["check"] for each in json.loads(fleet.inv("doctor", "--host", "spark", "--json").stdout)}
    assert "audit-log" in told
    assert not told & {"gateway", "gateway-port", "gateway-certificate"}
    machine.run("umount --lazy /var/log/journal && systemctl restart systemd-journald")


BOX = """
[hosts.box]
address = "spark"
profile = "cpu"
port = 8189
service = "box"
run_as = "box"
prefix = "/opt/box"
"""
KILLED = """
import os, signal
from agent.schema.change import CutOver
from deploy import aside, connection
from deploy.look import find_target
from deploy.plan import Options
aside.LEASE = 3
step = CutOver("", "", "", 60, False, "", "yes")
with connection.connect(find_target("spark")) as agent:
    with aside.aside(agent, find_target("box"), [step], Options(force=True)):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def a_host_is_back_after_its_deploy_was_killed(fleet: Fleet) -> None:
    def states() -> dict[str, str]:
        return {each["name"]: each["state"] for each in json.loads(done(fleet, "status", "--json"))["hosts"]}

    words = [sys.executable, "-c", KILLED]
    killed = subprocess.run(words, cwd=fleet.checkout, env=fleet.environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert states() in ({"spark": "UP", "box": "MAINT"}, {"spark": "UP", "box": "UP"})
    assert "HAProxy" not in killed.stderr
    assert within(30, lambda: states() == {"spark": "UP", "box": "UP"})


def it_is_removed_with_all_that_it_had(fleet: Fleet) -> None:
    done(fleet, "remove", "--yes")
    assert "nothing to do" in done(fleet, "remove", "--yes")
    assert reaches(fleet, "deployer")
    done(fleet, "deploy")
    fleet.inv("nuke", "--host", "spark", "--yes")
    assert reaches(fleet, "deployer")
    left = "ls -d /opt/comfyui/gateway /etc/systemd/system/comfyui-gateway.service 2>/dev/null; pgrep -c haproxy"
    assert fleet.machine.run(left, check=False).strip() == "0"


def a_change_is_loaded_and_undone(fleet: Fleet, configure: Callable[[], None], use: Callable[[], int]) -> None:
    machine = fleet.machine
    main = machine.run("systemctl show comfyui-gateway --property=MainPID")
    configure()
    done(fleet, "deploy")  # loaded without a restart
    assert machine.run("systemctl show comfyui-gateway --property=MainPID") == main
    codes = [use() for _ in range(3)]
    assert codes[-1] == 429
    done(fleet, "rollback")
    assert [use() for _ in range(3)] == [200] * 3
    assert "nothing to do" not in done(fleet, "rollback")
    assert machine.run("systemctl show comfyui-gateway --property=MainPID") == main


def test_people_use_a_deployed_gateway(fleet: Fleet) -> None:
    port, machine = free_port(), fleet.machine

    def configure(prompts: int, more: str = "", behind: str = "") -> None:
        fleet.configure(
            f'{more}[gateways.home]\nhost = "spark"\n{behind}port = {port}\nlisten = "127.0.0.1"\n'
            'names = ["127.0.0.1"]\n'
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

    others_do_not_reach_comfyui(fleet)
    hook_installs_a_renewed_certificate(fleet, port, authority)

    a_change_is_loaded_and_undone(fleet, lambda: configure(1), lambda: ask(port, authority, login))
    people_are_served_without_room_for_the_log(fleet, lambda: ask(port, authority, login))
    with closing(StandIn(8189)):
        configure(30, more=BOX, behind='behind = ["spark", "box"]\n')
        done(fleet, "deploy")
        a_host_is_back_after_its_deploy_was_killed(fleet)

    shown = "systemctl show comfyui-gateway --value --property=ActiveState --property=MainPID"
    killed = machine.run(shown)
    machine.run("systemctl kill --kill-whom=main --signal=KILL comfyui-gateway")
    end = time.monotonic() + 20
    while (now := machine.run(shown)) == killed or "active" not in now.split():
        assert time.monotonic() < end
    assert ask(port, authority, {}) == 401
    done(fleet, "users", "remove", "anna")
    assert ask(port, authority, login) == 401

    it_is_removed_with_all_that_it_had(fleet)
