"""Ways to reach a host: a jump host, sudo's password from a keyring, no network on the host."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.errors import kind_of
from tests.host.fleet import SOONER, Fleet, fresh
from tests.host.replica import scratch
from tests.host.small import small
from tests.unit.test_bundle import SIX

pytestmark = pytest.mark.host


def test_a_jump_host_is_used_and_its_key_is_checked(stand_in: Fleet) -> None:
    machine = stand_in.machine
    stand_in.configure(f'[hosts.inner]\naddress = "inner"\nprofile = "cpu"\nport = {machine.port}\n{SOONER}')
    jump = f"Host jump\n  HostName 127.0.0.1\n  Port {machine.ssh_port}\n  User {machine.login}\n"
    jump += f"  IdentityFile {machine.place}/client\n  GlobalKnownHostsFile /dev/null\nHost inner\n  ProxyJump jump\n"
    try:
        machine.configure_ssh(f"{jump}Host jump\n  UserKnownHostsFile {machine.place}/known_hosts\n")
        through = stand_in.inv("deploy", "--host", "inner", "--dry-run")
        machine.configure_ssh(f"{jump}Host jump\n  UserKnownHostsFile /dev/null\n")
        unknown = stand_in.inv("facts", "--host", "inner")
    finally:
        machine.configure_ssh()
        stand_in.configure()
    assert through.returncode == 0, through.stderr
    assert "nothing to do" in through.stdout
    assert (unknown.returncode, kind_of(unknown.stderr)) == (60, "host-key"), unknown.stderr


def test_sudos_password_comes_from_the_keyring(stand_in: Fleet) -> None:
    (stand_in.place / "one_password.py").write_text(
        "from keyring.backend import KeyringBackend\n"
        "class Keyring(KeyringBackend):\n"
        "    priority = 1\n"
        "    def get_password(self, service, name):\n"
        "        return 'open-sesame' if (service, name) == ('hearth-sudo', 'spark') else None\n"
        "    def set_password(self, service, name, password): ...\n"
    )
    rule = stand_in.machine.root / "etc/sudoers.d/deployer"
    text = rule.read_text()
    subprocess.run(["chroot", stand_in.machine.root, "chpasswd"], input="deployer:open-sesame", text=True, check=True)
    rule.write_text(text.replace("NOPASSWD: ", ""))
    keyring = {"PYTHONPATH": str(stand_in.place), "PYTHON_KEYRING_BACKEND": "one_password.Keyring"}
    try:
        done = stand_in.deploy("--ask-sudo", "--dry-run", **keyring)
    finally:
        rule.write_text(text)
    assert done.returncode == 0, done.stderr
    assert "open-sesame" not in done.stdout + done.stderr


def test_check_reaches_every_host(stand_in: Fleet) -> None:
    ghost = '[hosts.ghost]\naddress = "127.0.0.1"\nssh_port = 1\nprofile = "cpu"\n'
    stand_in.configure(ghost)
    one_is_off = stand_in.inv("hosts", "--check")
    stand_in.configure()
    done = stand_in.inv("hosts", "--check")
    assert (one_is_off.returncode, done.returncode) == (70, 0), one_is_off.stderr + done.stderr
    assert "ghost: ghost cannot be reached" in one_is_off.stderr
    assert "spark: reachable, debian 12" in one_is_off.stderr
    assert f"spark: reachable, debian 12, x86_64, release {stand_in.current()}" in done.stderr


def independent(fleet: Fleet) -> Path:
    """The stand-in for ComfyUI, which needs one package instead of gigabytes; returns the app.toml's folder."""
    folder = small(fleet.place, "small", "import six")
    text = (folder / "app.toml").read_text()
    (folder / "app.toml").write_text(re.sub(r"extra = \[.*?\]\n", "extra = []\n", text))
    (folder / "src/requirements.txt").write_text("six\n")
    (folder / "locks").mkdir()
    (folder / "locks/cu130-linux_x86_64-cp311.txt").write_text(SIX)
    return folder


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["small", "real"])
def test_offline_host_is_deployed_from_a_bundle(tmp_path: Path, *, real: bool) -> None:
    """Everything comes from one file: the client's cache and wheelhouse are empty, too."""
    bundle, cut = tmp_path / "spark.tar", tmp_path / "cut.tar"
    with (
        scratch("bundle") as disk,
        fresh(tmp_path, "bundle", Fleet, bare=True, place=disk / "machine", network=False) as alone,
    ):
        alone.env |= {} if real else {"HEARTH_APP": str(independent(alone))}
        alone.configure("metrics_port = 9101\n")
        alone.machine.boot()
        made = alone.inv("bundle", "--host", "spark", "--output", str(bundle), "--json")
        assert made.returncode == 0, made.stderr
        verified = alone.inv("bundle", "--verify", str(bundle), "--json")
        assert json.loads(verified.stdout) == json.loads(made.stdout)
        with bundle.open("rb") as whole, cut.open("wb") as part:
            part.write(whole.read(1 << 20))
        alone.env.pop("HEARTH_APP", None)
        alone.env["HEARTH_CACHE"] = str(tmp_path / "empty")
        alone.env |= {"UV_OFFLINE": "1", "PIP_NO_INDEX": "1"}
        short = alone.deploy("--bundle", str(cut))
        assert short.returncode == 33, short.stderr
        done = alone.deploy("--bundle", str(bundle))
        assert done.returncode == 0, done.stderr
        assert "the second picture arrived" in done.stderr
        again = alone.deploy("--bundle", str(bundle), "--dry-run")
        assert again.returncode == 0, again.stderr
        facts = alone.facts()
        assert set(facts["parts"].values()) == {""}
        scrape = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9101/metrics').read().decode())"
        assert "\nhearth_comfyui_up 1.0\n" in alone.machine.run(f'python3 -c "{scrape}"')
    bundle.unlink()


@pytest.mark.faults
def test_offline_host_gets_packages_from_the_client(tmp_path: Path) -> None:
    """They are downloaded here (3 GB) and uploaded: part of the long run."""
    with fresh(tmp_path, "offline", Fleet, bare=True, network=False) as alone:
        alone.machine.boot()
        done = alone.deploy()
        assert done.returncode == 0, done.stderr
        assert "spark cannot reach the package index; uploading packages from this machine" in done.stderr
        assert "the second picture arrived" in done.stderr
        facts = alone.facts()
        assert set(facts["parts"].values()) == {""}
        again = alone.deploy("--dry-run")
        assert again.returncode == 0, again.stderr
