"""A custom node that attacks its host (tests/fixtures/hostile): its reach, and the operator's control."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from core import files
from tests.host.fleet import PREFIX, Fleet, within
from tests.host.machine import FIREWALL, place_for
from tests.host.replica import Replica
from tests.host.test_nodes import Garden

pytestmark = pytest.mark.host

OTHERS = """
mkdir -p /home/deployer && chmod 755 /home/deployer && echo private > /home/deployer/notes.txt
echo theirs > /tmp/theirs
ip address add 169.254.169.254/32 dev lo
cat > /usr/local/bin/serve <<'X'
import http.server, os, socket, socketserver, threading
class Socket(socketserver.BaseRequestHandler):
    def handle(self): self.request.sendall(b"a secret of another's")
class Unix(socketserver.ThreadingUnixStreamServer): pass
server = Unix("/run/other.sock", Socket); os.chmod("/run/other.sock", 0o666)
threading.Thread(target=server.serve_forever, daemon=True).start()
http.server.HTTPServer(("169.254.169.254", 80), http.server.SimpleHTTPRequestHandler).serve_forever()
X
systemd-run --quiet --unit=others --setenv=TOKEN=theirs python3 /usr/local/bin/serve
"""


@pytest.fixture(scope="module")
def attacked(deployed: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Garden]:
    """A separate machine with its own loopback, with the hostile node deployed."""
    machine = Replica(
        place_for("hostile"), PREFIX, network=False, of=deployed.machine, port=deployed.machine.port, more=FIREWALL
    )
    fleet = Fleet(machine, tmp_path_factory.mktemp("hostile"))
    fleet.patience = 240
    patch = pytest.MonkeyPatch()
    try:
        machine.boot()
        machine.run(OTHERS)
        garden = Garden(fleet.place / "garden", fleet)
        code = (files.CHECKOUT / "tests/fixtures/hostile/__init__.py").read_text()
        garden.write(garden.commit("hostile", code), monkeypatch=patch)
        done = garden.deploy("hostile")
        assert done.returncode == 0, done.stderr
        machine.run(f"runuser -u comfyui -- touch {PREFIX}/data/output/begin")
        assert within(120, lambda: (fleet.prefix / "data/output/ready").exists()), machine.run(
            "journalctl -u comfyui -n 50 --no-pager"
        )
        yield garden
    finally:
        patch.undo()
        machine.discard()


def report(garden: Garden) -> dict[str, list[str]]:
    found = json.loads((garden.fleet.prefix / "data/output/report.json").read_text())
    assert isinstance(found, dict)
    return found


def test_hostile_node_reaches_nothing_of_others(attacked: Garden) -> None:
    found = report(attacked)
    assert found["foreign"] == []
    assert len(found["kept from"]) > 20
    # the blocked targets exist, and other processes can reach them
    machine = attacked.fleet.machine
    assert "private" in machine.run("runuser -u nobody -- cat /home/deployer/notes.txt")
    assert "200" in machine.run(
        "runuser -u nobody -- python3 -c \"import urllib.request as u; print(u.urlopen('http://169.254.169.254/').status)\""
    )


def timed(fleet: Fleet, *words: str, seconds: float = 60) -> str:
    begun = time.monotonic()
    done = fleet.inv(*words, "--host", "spark")
    assert time.monotonic() - begun < seconds, words
    assert "internal error" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not re.search(r"[\x1b\u202e]", done.stdout + done.stderr)
    return done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["status", "doctor", "jobs", "logs", "facts", "free-memory"])
def test_requests_to_a_hostile_node_end_in_time(attacked: Garden, verb: str) -> None:
    assert timed(attacked.fleet, verb)


def test_planted_files_are_reported(attacked: Garden) -> None:
    assert "data/custom_nodes contains evil.py, which is never loaded" in timed(attacked.fleet, "status")


def test_hostile_node_can_be_stopped_updated_and_removed(attacked: Garden) -> None:
    fleet, machine = attacked.fleet, attacked.fleet.machine
    stopped = fleet.inv("quarantine", "--host", "spark")
    assert stopped.returncode == 0, stopped.stderr
    assert machine.run("ps -o stat= -u comfyui | grep -vc Z || true").strip() == "0"
    assert "journalctl --unit comfyui.service" in stopped.stdout
    assert "PrivateNetwork=yes" in machine.run("systemctl cat comfyui.service")
    assert fleet.inv("resume", "--host", "spark").returncode != 0
    for words in (["quarantine", "--undo"], ["remove", "--yes"]):
        done = fleet.inv(*words, "--host", "spark")
        assert done.returncode == 0, done.stderr
    trapped = attacked.deploy()
    assert f"{PREFIX}/data/user/comfyui.db-journal is not a regular file" in trapped.stderr
    machine.run(f"rm {PREFIX}/data/user/comfyui.db-*")
    clean = attacked.deploy()
    assert not (fleet.prefix / "data/output/ran-again").exists()  # its files in custom_nodes were not loaded
    assert clean.returncode == 0, clean.stderr
    assert "not loaded, because it is in" in clean.stderr
    modes = machine.run(f"find {PREFIX}/data -perm /6000 -type f")
    assert modes.strip() == "", modes
    assert machine.run("ls /etc/cron.d; stat -c %a /etc/shadow").split()[-1] == "640"
    told = fleet.inv("nuke", "--host", "spark", "--data", "--dry-run")  # this machine's prefix is a mount
    assert "is a mount point" in told.stderr
    assert not (fleet.prefix / "data/output/hearth-gate").exists()  # the deep tree in place of the gate's picture
