"""Settings of a real machine: applied by name, resumed after a kill, undone; MPS as a unit, with a fake daemon.

There is no GPU, and a container shares its host's kernel settings. So these files are replaced by bind mounts; that
they are otherwise read-only is the real machine's answer.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from core import files
from tests.errors import kind_of
from tests.host.fleet import PREFIX, Fleet
from tests.host.test_doctor import findings, gpu, only
from tests.host.test_modes import exposure

pytestmark = pytest.mark.host

SWAPPINESS, CONF = "/proc/sys/vm/swappiness", "/etc/sysctl.d/90-hearth-swappiness.conf"
RECORD = f"{PREFIX}/state/settings.jsonl"


@contextmanager
def kernel_file(fleet: Fleet, path: str, text: str) -> Iterator[None]:
    """A writable file in place of a kernel setting."""
    fleet.machine.run(f"echo {text} > /root/value; chmod 644 /root/value; mount --bind /root/value {path}")
    try:
        yield
    finally:
        fleet.machine.run(f"umount {path}; rm /root/value")


def test_a_setting_is_applied_recorded_and_undone(service: Fleet) -> None:
    machine = service.machine
    refused = service.inv("tune", "--host", "spark", "--apply", "swappiness")
    assert (refused.returncode, "is not writable" in refused.stderr) == (63, True), refused.stderr
    with kernel_file(service, SWAPPINESS, "60"):
        listed = service.inv("tune", "--host", "spark", "--json")
        ((host),) = json.loads(listed.stdout)
        found = {each["name"]: each for each in host["settings"]}
        assert (found["swappiness"]["now"], found["swappiness"]["becomes"]) == ("60", "10")
        assert found["gpu-persistence"]["unfit"] == "no NVIDIA GPU there"
        dry = service.inv("tune", "--host", "spark", "--apply", "swappiness", "--dry-run")
        assert (dry.returncode, machine.run(f"cat {SWAPPINESS}").strip()) == (2, "60")
        done = service.inv("tune", "--host", "spark", "--apply", "swappiness")
        assert done.returncode == 0, done.stderr
        assert machine.run(f"cat {SWAPPINESS}").strip() == "10"
        assert machine.run(f"tail -1 {CONF}").strip() == "vm.swappiness = 10"
        assert service.facts()["settings"] == ["swappiness"]
        again = service.inv("tune", "--host", "spark", "--apply", "swappiness")
        assert "nothing to do" in again.stdout
        nuke = service.inv("nuke", "--host", "spark", "--dry-run")
        assert (nuke.returncode, "inv tune --undo" in nuke.stderr) == (63, True), nuke.stderr

        machine.run(f"echo 42 > {SWAPPINESS}")
        undo = service.inv("tune", "--host", "spark", "--undo")
        assert (kind_of(undo.stderr), f"{SWAPPINESS}: 42, Hearth set 10" in undo.stderr) == ("changed", True), (
            undo.stderr
        )
        assert machine.run(f"cat {SWAPPINESS}").strip() == "42"
        forced = service.inv("tune", "--host", "spark", "--undo", "swappiness", "--force")
        assert forced.returncode == 0, forced.stderr
        assert machine.run(f"cat {SWAPPINESS}; echo; ls {CONF} 2>/dev/null || echo none").split() == ["60", "none"]
    assert service.facts()["settings"] == []
    assert service.inv("tune", "--host", "spark", "--undo").stdout.startswith("spark: nothing to do")


def test_the_unit_of_persistence_mode_is_confined(service: Fleet) -> None:
    shutil.copy(files.CHECKOUT / "recipes/system/persistence.service", service.machine.root / "root")
    assert exposure(service, "--offline=true /root/persistence.service") <= 2.0


@contextmanager
def control(fleet: Fleet) -> Iterator[None]:
    """A fake MPS control program on the machine."""
    place = fleet.machine.root / "usr/bin/nvidia-cuda-mps-control"
    shutil.copy(files.CHECKOUT / "tests/fixtures/mps/nvidia-cuda-mps-control", place)
    place.chmod(0o755)
    try:
        yield
    finally:
        place.unlink()


def mps(fleet: Fleet, *words: str, code: int = 0) -> str:
    done = fleet.inv("mps", *words, "--host", "spark")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_mps_life_cycle(service: Fleet) -> None:
    machine = service.machine
    assert "the driver shows no NVIDIA GPU" in mps(service, "on", code=63)
    service.configure("override.cuda = true\n")
    with gpu(service, "rtx-4070"):
        assert "nvidia-cuda-mps-control is not installed" in mps(service, "on", code=63)
        with control(service):
            assert "MPS is off" in mps(service, "limit", "--percent", "50", code=63)
            mps(service, "on", "--dry-run", code=2)
            before = machine.run("systemctl show comfyui --property=MainPID --value").strip()
            mps(service, "on", "--percent", "60", "--memory", "0=8G")
            pid = machine.run("systemctl show comfyui --property=MainPID --value").strip()
            assert pid != before
            assert exposure(service, "comfyui-mps") <= 2.0
            shown = mps(service, "status")
            assert "MPS is on, active (running), threads 60.0 %, memory 0=8G" in shown
            assert f"client {pid}: python" in shown
            assert "(ComfyUI)" in shown
            assert "nothing to do" in mps(service, "on")
            assert "mps" not in findings(service, code=2)

            mps(service, "limit", "--percent", "30")
            shown = mps(service, "status")
            assert "threads 30.0 %" in shown
            assert "memory" not in shown

            # The daemon dies: systemd restarts it together with ComfyUI, whose CUDA context is lost, too.
            first = machine.run("systemctl show comfyui --property=MainPID --value").strip()
            machine.run("systemctl kill --signal=KILL comfyui-mps")
            end = time.monotonic() + 30
            while time.monotonic() < end:
                pid = machine.run("systemctl show comfyui --property=MainPID --value").strip()
                if pid not in (first, "0"):
                    break
                time.sleep(0.5)
            assert pid != first
            assert service.answers()
            assert "was restarted 1 time," in mps(service, "status", code=1)

            # The daemon cannot restart.
            machine.run("mv /usr/bin/nvidia-cuda-mps-control /usr/bin/away")
            machine.run(
                "systemctl kill --signal=KILL comfyui-mps; until systemctl is-failed comfyui-mps; do sleep 1; done"
            )
            machine.run("mv /usr/bin/away /usr/bin/nvidia-cuda-mps-control")
            assert service.answers()  # without MPS
            assert "its daemon is not running: failed" in mps(service, "status", code=1)
            what, remedy = only(findings(service, code=2), "mps")
            assert "its daemon is not running: failed" in what
            assert remedy.startswith("inv mps on --host spark")
            mps(service, "on")
            machine.power_off()
            machine.boot()
            assert service.answers()
            assert "active (running)" in mps(service, "status")

            mps(service, "off")
            assert service.answers()
            left = "ls -d /etc/systemd/system/comfyui-mps.service /etc/systemd/system/comfyui.service.d 2>/dev/null"
            assert machine.run(f"{left} || true").strip() == ""
            assert "nothing to do" in mps(service, "off")
            assert "MPS is off" in mps(service, "status")


def test_failed_mps_start_is_rolled_back(service: Fleet) -> None:
    service.configure("override.cuda = true\n")
    with gpu(service, "rtx-4070"), control(service):
        service.machine.run("mkdir -p /etc/systemd/system/comfyui-mps.service.d")
        service.machine.run(
            "printf '[Service]\\nUser=nobody-here\\n' > /etc/systemd/system/comfyui-mps.service.d/bad.conf"
        )
        shown = mps(service, "on", code=69)
        service.machine.run("rm -r /etc/systemd/system/comfyui-mps.service.d")
        assert "mps could not be set and was undone" in shown
        assert service.answers()
        assert service.facts()["settings"] == []


def test_gpu_restricted_to_a_group(service: Fleet) -> None:
    machine = service.machine
    machine.run("useradd anna 2>/dev/null || true; mknod /dev/nvidia0 c 1 3; chmod 600 /dev/nvidia0")
    service.configure('members = ["anna"]\n')
    try:
        checked = service.inv("gpu-access", "--host", "spark")
        assert (checked.returncode, "comfyui, anna" in checked.stdout) == (1, True), checked.stdout + checked.stderr
        kept = service.inv("gpu-access", "--host", "spark", "--apply")
        assert kept.returncode == 0, kept.stderr
        assert "next login: anna" in kept.stderr
        gid = machine.run("getent group gpu-users").split(":")
        assert gid[3].strip() == "anna,comfyui"
        assert machine.run("stat --format='%G %a' /dev/nvidia0").strip() == "gpu-users 660"
        assert f"NVreg_DeviceFileGID={gid[2]} " in machine.run("cat /etc/modprobe.d/hearth-gpu-access.conf")
        assert service.inv("gpu-access", "--host", "spark").returncode == 0
        assert gid[2] in machine.run("grep ^Groups /proc/$(systemctl show comfyui -p MainPID --value)/status")
        undone = service.inv("gpu-access", "--host", "spark", "--undo")
        assert undone.returncode == 0, undone.stderr
        assert machine.run("stat --format='%G %a' /dev/nvidia0").strip() == "root 600"
        assert machine.run("getent group gpu-users || echo none").strip() == "none"
        assert (
            machine.run("ls /etc/udev/rules.d/70-hearth* /etc/modprobe.d/hearth* 2>/dev/null || echo none").strip()
            == "none"
        )
    finally:
        machine.run("rm -f /dev/nvidia0")
