"""Places for models and outputs: mounts that come and go, full disks, folders elsewhere, shared access."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest

from tests.host.fleet import PREFIX, Fleet
from tests.host.test_modes import exposure

pytestmark = pytest.mark.host

POOL = """\
mounts."/srv/pool" = {}
folders.output = "/srv/pool/out"
"""


def picture(fleet: Fleet, name: str) -> dict[str, object]:
    """Have ComfyUI save a picture under a name; returns its history entry."""
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": time.time_ns() % (1 << 24)}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": name}},
    }
    body = json.dumps({"prompt": workflow}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{fleet.machine.port}/prompt", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        prompt = json.load(answer)["prompt_id"]
    end = time.monotonic() + 60
    while not (found := fleet.ask(f"/history/{prompt}").get(prompt)) and time.monotonic() < end:
        time.sleep(0.1)
    assert isinstance(found, dict)
    return found


def stopped(fleet: Fleet, within: float = 60) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if fleet.machine.run("systemctl is-active comfyui || true").strip() in ("inactive", "failed"):
            return True
        time.sleep(0.2)
    return False


def test_comfyui_reads_models_in_other_places(steady: Fleet) -> None:
    machine = steady.machine
    machine.run("mkdir -p /srv/more/loras; touch /srv/more/loras/hand.safetensors")
    steady.becomes('model_roots = ["/srv/more"]\n')
    with urllib.request.urlopen(f"http://127.0.0.1:{machine.port}/models/loras", timeout=10) as answer:
        assert json.load(answer) == ["hand.safetensors"]
    machine.run("rm -r /srv/more")


def test_comfyui_follows_its_mounts(service: Fleet) -> None:
    machine = service.machine
    machine.run("mkdir -p /srv/pool")
    service.configure(POOL)
    refused = service.deploy()
    assert refused.returncode == 63, refused.stderr
    assert "/srv/pool is not mounted" in refused.stderr
    machine.run("mount --bind /srv/inodes /srv/pool")
    done = service.deploy("--no-trial")
    assert done.returncode == 0, done.stderr
    assert "create /srv/pool/out" in done.stderr
    picture(service, "kept")
    assert machine.run("ls /srv/pool/out").split() == ["kept_00001_.png"]
    assert exposure(service, "comfyui-storage") <= 2.0

    machine.run("umount /srv/pool || umount --lazy /srv/pool")
    assert stopped(service)
    assert machine.run("ls -A /srv/pool") == ""
    gone = service.deploy()
    assert (gone.returncode, "/srv/pool is not mounted" in gone.stderr) == (63, True), gone.stderr
    machine.run("mount --bind /srv/inodes /srv/pool")  # ComfyUI is not started
    assert service.answers()

    machine.power_off()
    machine.boot()
    assert stopped(service)
    facts = service.inv("facts", "--host", "spark")
    assert "/srv/pool: not mounted; ComfyUI waits for it" in " ".join(facts.stdout.split()), facts.stdout
    machine.run("mount --bind /srv/inodes /srv/pool")
    assert service.answers()
    assert machine.run("ls /srv/pool/out").split() == ["kept_00001_.png"]
    service.becomes()
    machine.run("umount /srv/pool; rm -r /srv/inodes/out")
    assert service.answers(5)  # a mount that it no longer needs does not stop it


def test_full_data_disk_refuses_a_deploy(service: Fleet) -> None:
    machine = service.machine
    machine.run("mkdir -p /srv/small; mount -t tmpfs -o size=300M small /srv/small")
    service.becomes('mounts."/srv/small" = {}\nfolders.output = "/srv/small/out"\n')
    machine.run("head -c 400M /dev/zero > /srv/small/filler 2>/dev/null || true")
    refused = service.deploy()
    assert refused.returncode == 63, refused.stderr
    assert "free for /srv/small/out, 200.0 MB needed" in refused.stderr
    machine.run("rm /srv/small/filler")
    picture(service, "some")
    assert "some_00001_.png" in machine.run("ls /srv/small/out")
    service.becomes()
    machine.run("umount /srv/small")


def test_configured_mounts_at_boot_and_never_over_files(service: Fleet) -> None:
    machine = service.machine
    machine.run("mkdir -p /srv/vault; touch /srv/vault/hidden")
    mount = '[hosts.spark.mounts."/srv/vault"]\nwhat = "{}"\ntype = "{}"\noptions = "{}"\n'
    folders = 'folders.input = "/srv/vault/in"\n'
    service.configure(folders + mount.format("/srv/inodes", "none", "bind"))
    over = service.deploy()
    assert over.returncode == 63, over.stderr
    assert "the folder contains files, which the mount would hide" in over.stderr
    machine.run("rm /srv/vault/hidden")
    for what, kind, remedy in (
        ("/dev/mapper/vault", "ext4", "cryptsetup open DEVICE vault"),
        ("nas:/models", "nfs4", "apt-get install nfs-common"),
    ):
        service.configure(folders + mount.format(what, kind, "noatime"))
        cannot = service.deploy()
        assert (cannot.returncode, remedy in cannot.stderr) == (63, True), cannot.stderr
    done = service.becomes(folders + mount.format("/srv/inodes", "none", "bind"))
    assert "mount /srv/inodes at /srv/vault (none, bind)" in done.stderr
    machine.power_off()
    machine.boot()
    assert service.answers()
    assert "/srv/vault" in machine.run("findmnt --noheadings --output TARGET /srv/vault")
    again = service.deploy("--dry-run")
    assert again.returncode == 0, again.stderr
    service.becomes()
    machine.run("systemctl disable --now srv-vault.mount; rm -r /srv/inodes/in")


def test_members_share_data_and_have_configured_rights(service: Fleet) -> None:
    machine = service.machine
    machine.run("useradd anna; useradd ben; useradd eve")
    service.becomes('members = ["anna", "ben"]\nmembers_may = ["restart"]\n')
    place, log = f"{PREFIX}/data/output/shared", "sudo -n journalctl --no-pager --unit comfyui.service"

    def may(who: str, command: str) -> bool:
        tried = machine.run(f"runuser -u {who} -- sh -c '{command}' >/dev/null 2>&1 && echo yes || echo no")
        return tried.strip() == "yes"

    assert may("anna", f"umask 077; mkdir -p {place}; echo a > {place}/one")
    assert may("ben", f"echo b >> {place}/one; echo b > {place}/two")
    assert may("comfyui", f"rm {place}/two")
    assert may("anna", f"head -1 {PREFIX}/current/app/main.py")
    assert not may("anna", f"touch {PREFIX}/current/app/x")
    assert not may("eve", f"touch {place}/three")
    since = machine.run("systemctl show comfyui --property=ActiveEnterTimestampMonotonic --value")
    assert may("anna", log)
    assert not may("eve", log)
    assert not may("anna", "sudo -n systemctl stop comfyui.service")
    assert not may("anna", f"{log} --file /etc/shadow")
    assert may("ben", "sudo -n systemctl restart comfyui.service")
    assert machine.run("systemctl show comfyui --property=ActiveEnterTimestampMonotonic --value") != since
    assert service.answers()

    service.becomes('members = ["anna"]\n')
    assert not may("ben", f"echo b >> {place}/one")
    assert not may("ben", log)
    assert not may("anna", "sudo -n systemctl restart comfyui.service")
    service.becomes()
    assert not may("anna", log)
    machine.run(f"rm -r {place}")
