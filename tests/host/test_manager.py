"""ComfyUI-Manager on a real host: absent unless selected, and then unable to install or to loosen its settings."""

from __future__ import annotations

import json
import shlex
import time
import urllib.error
import urllib.request

import pytest

from tests.host.fleet import PREFIX, Fleet

pytestmark = pytest.mark.host

STATE = f"{PREFIX}/data/user/__manager"


def call(fleet: Fleet, path: str, body: object = None, method: str = "POST") -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{fleet.machine.port}{path}",
        json.dumps(body).encode() if body is not None else None,
        {"Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def inside(fleet: Fleet, command: str) -> str:
    """The output of a shell with the service's user and file system view."""
    pid = fleet.machine.run("systemctl show comfyui --property=MainPID --value").strip()
    words = f"nsenter --mount --target {pid} runuser -u comfyui -- sh -c {shlex.quote(f'({command}) 2>&1')}"
    return fleet.machine.run(f"{words} || true")


def install(fleet: Fleet) -> dict[str, object]:
    """Request a node from the Manager, wait for its answer, and return its record of the request."""
    pack = {"id": "comfyui-impact-pack", "version": "latest", "selected_version": "latest"}
    task = {"ui_id": "one", "client_id": "test", "kind": "install"}
    records = fleet.prefix / "data/user/__manager/batch_history"
    before = set(records.glob("*.json"))
    call(fleet, "/v2/manager/queue/task", {**task, "params": {**pack, "mode": "local", "channel": "default"}})
    call(fleet, "/v2/manager/queue/start")
    end = time.monotonic() + 60
    while not (fresh := set(records.glob("*.json")) - before) and time.monotonic() < end:
        time.sleep(0.2)
    (record,) = fresh
    found = json.loads(record.read_text())
    assert isinstance(found, dict)
    return found


def test_manager_installs_nothing_and_cannot_be_weakened(steady: Fleet) -> None:
    machine = steady.machine
    package = steady.prefix / "current/env/lib/python3.11/site-packages/comfyui_manager"
    assert call(steady, "/v2/manager/version", method="GET")[0] == 404
    assert not package.exists()
    steady.configure('[hosts.spark.override.flags]\n"--enable-manager" = { why = "a test" }\n')
    try:
        done = steady.deploy("--no-trial")
        assert done.returncode == 0, done.stderr
        assert call(steady, "/v2/manager/version", method="GET") == (200, "V4.2.2")

        record = install(steady)
        assert (record["successful_operations"], record["failed_operations"]) == (0, 1)
        assert record["state_before"]["security_level"] == "strong"  # type: ignore[index]
        assert "security_level must be `normal or below`" in machine.run("journalctl --no-pager --unit comfyui")
        for path in ("/v2/snapshot/remove?target=x", "/v2/manager/reboot", "/v2/manager/policy/update"):
            assert call(steady, path, {})[0] == 403, path

        used = f"{PREFIX}/current/user/__manager"
        for change in (
            f"echo >> {used}/config.ini",
            f"mv {used}/config.ini {STATE}/x",
            f"touch {used}/startup-scripts/x",
        ):
            said = inside(steady, change)
            assert "denied" in said or "Read-only" in said, change

        # What a node could prepare for the next start: its own settings, a command for Manager, or a link at a path
        # where systemd would create a file for a mount.
        script = f'["{PREFIX}/data", "touch", "{PREFIX}/data/ran"]'
        prepare = f"cd {PREFIX}/data/user && mv __manager aside && mkdir -p __manager/startup-scripts"
        prepare += " && printf '[default]\\nsecurity_level = weak\\n' > __manager/config.ini"
        assert inside(steady, f"{prepare} && echo '{script}' > __manager/startup-scripts/install-scripts.txt") == ""
        assert inside(steady, f"cd {PREFIX}/data/user/__manager && rm -rf cache && ln -s /etc/profile.d cache") == ""
        before = machine.run("ls /etc/profile.d")
        machine.run("systemctl restart comfyui")
        assert steady.answers()
        assert not (steady.prefix / "data/ran").exists()
        assert machine.run("ls /etc/profile.d") == before
        assert install(steady)["state_before"]["security_level"] == "strong"  # type: ignore[index]
        shown = machine.run("systemd-analyze security comfyui --no-pager")
        assert float(shown.rpartition("comfyui.service: ")[2].split()[0]) <= 2.0
    finally:
        machine.run(f"rm -rf {STATE} {PREFIX}/data/user/aside {PREFIX}/data/ran; systemctl stop comfyui")
