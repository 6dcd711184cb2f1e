"""A deploy without root to a host whose login has its own systemd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.fleet import Fleet, fresh, link_environment, within
from tests.host.machine import LOGIN, free_port
from tests.host.small import small
from tests.host.test_metrics import scrape

pytestmark = pytest.mark.host

HOME = f"/home/{LOGIN}"


class Own(Fleet):
    """A fleet whose host `spark` is deployed to without root."""

    @property
    def prefix(self) -> Path:
        return self.machine.root / f"{HOME.lstrip('/')}/.local/share/hearth/comfyui"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Own]:
    with fresh(tmp_path, "user", Own, bare=True) as fleet:
        machine = fleet.machine
        # before it boots, because it goes below the overlay
        link_environment(machine.disk / f"upper/{HOME}/.local/share/hearth/comfyui")
        fleet.configure('scope = "user"\n')
        machine.boot()
        # Standard on every full Debian and Ubuntu; polkit allows a login to enable lingering for itself.
        packages = "libpam-systemd dbus-user-session polkitd"
        machine.run(f"apt-get update -qq && apt-get install -qq -y --no-install-recommends {packages}")
        machine.run(f"find {HOME}/.local -type d -exec chown {LOGIN}: {{}} +")  # files are shared with other hosts
        yield fleet


def test_a_user_deploys_without_root(own: Own) -> None:
    done = own.deploy()
    assert done.returncode == 0, done.stderr
    assert "systemd run without a login (loginctl enable-linger)" in done.stderr
    assert "the second picture arrived" in done.stderr
    facts = own.facts()
    assert (facts["manager"], facts["root"], facts["login"]) == ("systemd-user", False, LOGIN)
    assert facts["service"]["enabled"]
    again = own.deploy("--dry-run")
    assert again.returncode == 0, again.stderr
    own.env["HEARTH_APP"] = str(small(own.place, "small"))  # the rest is about the service
    own.becomes('scope = "user"\n')
    release = own.current()
    port = free_port()
    own.configure(f'scope = "user"\nmetrics_port = {port}\n')
    measured = own.deploy("--no-trial")
    assert measured.returncode == 0, measured.stderr
    found = scrape(port)
    for line in ("hearth_comfyui_up 1.0", "hearth_service_active 1.0", "hearth_gate_success 1.0"):
        assert line in found
    assert "hearth_service_process_resident_memory_bytes" in found
    node = f"{HOME}/my-node"
    own.machine.run(f"runuser -u {LOGIN} -- sh -c 'mkdir {node}; echo NODE_CLASS_MAPPINGS = 0 > {node}/__init__.py'")
    own.configure(f'scope = "user"\nmodes = ["development"]\ndevelop = ["{node}"]\nfree_memory = "5s"\n')
    developed = own.deploy("--no-trial")
    assert developed.returncode == 0, developed.stderr
    assert "node my-node cannot be imported" in developed.stderr
    before = own.facts()["service"]["pid"]
    own.machine.run(f"runuser -u {LOGIN} -- sh -c 'echo NODE_CLASS_MAPPINGS = {{}} > {node}/__init__.py'")
    told = f"journalctl --no-pager --output=cat _UID=$(id -u {LOGIN})"
    assert within(30, lambda: f"{node}/__init__.py changed: restarting ComfyUI" in own.machine.run(told))
    assert within(30, lambda: "frees its memory" in own.machine.run(told))
    assert own.answers()
    assert own.facts()["service"]["pid"] != before
    development = own.current()
    own.configure('scope = "user"\n[hosts.spark.override]\nstart_seconds = 6\n')
    slow = small(own.place, "never", 'import time; print("thinking", flush=True); time.sleep(99)')
    broken = own.deploy(HEARTH_APP=str(slow))
    assert broken.returncode == 66, broken.stderr
    assert own.current() == development != release
    assert own.answers(1)
    own.machine.power_off()
    own.machine.boot()
    assert own.answers()  # nobody has logged in

    own.configure('scope = "user"\n')
    said = own.inv("logs", "--host", "spark", "--lines", "500")
    assert said.returncode == 0, said.stderr
    assert "To see the GUI go to" in said.stdout
    assert own.inv("restart", "--host", "spark").returncode == 0
    removed = own.inv("remove", "--host", "spark", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert f"let {LOGIN}'s systemd end with the last session" in removed.stderr
    assert own.machine.run("ls /var/lib/systemd/linger") == ""
    assert "comfyui" not in own.machine.run(f"ls -R {HOME}/.config/systemd/user")
    back = own.deploy()
    assert back.returncode == 0, back.stderr
    assert "make " not in back.stderr
    assert own.current() == release
    assert own.facts()["manager"] == "systemd-user"
    gone = own.inv("nuke", "--host", "spark", "--yes")
    assert gone.returncode == 0, gone.stderr
    assert [path.name for path in own.prefix.iterdir()] == ["data"]
    assert own.machine.run("ls /var/lib/systemd/linger") == ""
