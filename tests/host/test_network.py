"""Network failures: dropped packets, a broken upload, a slow link. What is deployed is a stand-in for ComfyUI.

The client and the machine each have a network namespace, connected by a virtual cable: this machine's own network is
not affected.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.host.fleet import PREFIX, Fleet, within
from tests.host.machine import LOGIN, place_for
from tests.host.replica import Replica
from tests.host.small import small
from tests.host.test_faults import cut_connection, journal, wait_for_step

pytestmark = pytest.mark.host

NEAR, FAR = "192.0.2.1", "192.0.2.2"
"""Addresses of the cable's two ends: reserved for documentation (RFC 5737), so no network uses them."""

SILENCE = 75
"""Seconds within which a client must detect a dead connection: about a minute."""


@dataclass
class Distant(Fleet):
    """A fleet whose client reaches its machine over a cable; `client` is a process in the client's namespace."""

    client: int = 0

    def command(self, *words: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.client}/ns/net", *super().command(*words)]

    def there(self, *words: str) -> None:
        """Run a program of this machine in the other network namespace."""
        subprocess.run(["nsenter", f"--net=/proc/{self.machine.first}/ns/net", *words], check=True)

    def here(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self.client}/ns/net", *words], check=True)

    def plug_in(self) -> None:
        """Create the cable, and configure the client for it."""
        self.here("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(self.machine.first))
        for run, end, address in ((self.here, "near", NEAR), (self.there, "far", FAR)):
            run("ip", "address", "add", f"{address}/24", "dev", end)
            run("ip", "link", "set", end, "up")
        place = self.machine.place
        known = (place / "known_hosts").read_text()
        (place / "known_hosts").write_text(known + known.replace("127.0.0.1", FAR))
        (place / "cable").write_text(
            (place / "ssh_config").read_text().partition("  ProxyCommand")[0].replace("127.0.0.1", FAR)
        )
        self.env["HEARTH_SSH_CONFIG"] = str(place / "cable")

    def slow(self, *rate: str) -> None:
        """Limit the client's upload rate; no limit without a rate."""
        limit = ["tbf", "rate", *rate, "burst", "8k", "latency", "1s"] if rate else ["pfifo_fast"]
        self.here("tc", "qdisc", "replace", "dev", "near", "root", *limit)

    def silence(self) -> None:
        """Drop all packets of the cable in both directions: neither end sees the connection close."""
        self.there("nft", "add table inet gone")
        for hook, key in (("input", "iifname"), ("output", "oifname")):
            self.there("nft", f"add chain inet gone {hook} {{ type filter hook {hook} priority 0; }}")
            self.there("nft", f"add rule inet gone {hook} {key} far drop")

    def restore(self) -> None:
        self.there("nft", "delete table inet gone")


@pytest.fixture(scope="module")
def linked(stand_in: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Distant]:
    machine = Replica(place_for("distant"), PREFIX, network=False, of=stand_in.machine, port=stand_in.machine.port)
    # It ends with this process, and so do the namespace and the cable.
    holder = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
    fleet = Distant(machine, tmp_path_factory.mktemp("distant"), client=holder.pid)
    fleet.patience = 240
    fleet.configure()
    (machine.root / "etc/ssh/sshd_config.d/here.conf").write_text("UseDNS no\n")  # it also listens at the cable
    try:
        machine.boot()
        fleet.plug_in()
        fleet.env["HEARTH_APP"] = str(small(fleet.place, "small"))
        fleet.becomes()
        yield fleet
    finally:
        machine.discard()
        holder.kill()
        holder.wait()


@pytest.fixture
def distant(linked: Distant) -> Iterator[Distant]:
    """After the test it has no changes, and its network works."""
    release, data = linked.current(), linked.data()
    yield linked
    linked.there("nft", "flush", "ruleset")
    linked.slow()
    for agent in agents(linked):
        agent.unlink()
    linked.becomes()
    assert linked.current() == release
    assert linked.data() == data


def agents(fleet: Fleet) -> list[Path]:
    """The agent copies in the login's home."""
    return [*(fleet.machine.root / f"home/{LOGIN}/.cache/hearth").glob("agent-*")]


def ends_by_itself(client: subprocess.Popen[str]) -> str:
    """Wait until a client ends that gets no more answers; returns its output."""
    began = time.monotonic()
    try:
        said, _ = client.communicate(timeout=120)
    finally:
        client.kill()
    assert time.monotonic() - began < SILENCE
    assert client.returncode == 60, said
    assert "Traceback" not in said
    return said


def test_silent_network_ends_the_client_but_not_the_deploy(distant: Distant) -> None:
    app = str(small(distant.place, "silent"))
    since = time.time()
    client = distant.start("deploy", "--host", "spark", HEARTH_APP=app)
    wait_for_step(distant, "make app", since)
    distant.silence()
    said = ends_by_itself(client)
    assert "inv attach --host spark" in said
    assert within(180, lambda: any(event["event"] == "end" for event in journal(distant, since)))
    unreachable = distant.inv("facts", "--host", "spark")
    assert unreachable.returncode == 60, unreachable.stderr
    distant.restore()
    told = distant.inv("attach", "--host", "spark")
    assert told.returncode == 0, told.stderr
    assert "no run is in progress on spark; its last run:" in told.stderr + told.stdout
    again = distant.deploy(HEARTH_APP=app)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr


def test_silent_network_during_upload_ends_the_client(distant: Distant) -> None:
    """The host still waits for the interrupted upload; the next client does not."""
    folder = small(distant.place, "large")
    (folder / "src/large.bin").write_bytes(random.Random(1).randbytes(20_000_000))
    distant.slow("16mbit")
    client = distant.start("deploy", "--host", "spark", HEARTH_APP=str(folder))
    incoming = distant.prefix / "state/incoming"
    assert within(60, lambda: any(path.stat().st_size > 1_000_000 for path in incoming.glob("*.part")))
    distant.silence()
    ends_by_itself(client)
    distant.restore()
    distant.slow()
    done = distant.deploy("--no-trial", HEARTH_APP=str(folder))
    assert done.returncode == 0, done.stderr


def test_interrupted_agent_upload_is_repeated(distant: Distant) -> None:
    for agent in agents(distant):
        agent.unlink()
    distant.slow("100kbit")
    client = distant.start("facts", "--host", "spark")
    assert within(60, lambda: any(path.stat().st_size > 0 for path in agents(distant)))
    cut_connection(distant, client.pid)
    said, _ = client.communicate(timeout=60)
    distant.slow()
    assert client.returncode == 60, said
    assert "Traceback" not in said
    done = distant.inv("facts", "--host", "spark")
    assert done.returncode == 0, done.stderr
