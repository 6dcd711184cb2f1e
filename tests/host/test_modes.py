"""Modes on a real host: flags, nodes under development, freed memory."""

from __future__ import annotations

import json
import re
import urllib.error

import pytest

from deploy import profile
from tests.host.fleet import PREFIX, Fleet, within

pytestmark = pytest.mark.host

NODE = """\
class One:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "test"

NODE_CLASS_MAPPINGS = {"NAME": One}
"""
HOME = "home/deployer/my-node"


def has(fleet: Fleet, node_type: str) -> bool:
    try:
        return node_type in fleet.ask(f"/object_info/{node_type}")
    except (OSError, urllib.error.HTTPError):
        return False


def exposure(fleet: Fleet, unit: str) -> float:
    found = re.search(r"exposure level for .*: ([\d.]+)", fleet.machine.run(f"systemd-analyze security {unit}"))
    assert found
    return float(found[1])


def test_mode_flags_are_applied_and_explained(steady: Fleet) -> None:
    steady.becomes('modes = ["low-memory", "production"]\n')
    system = steady.ask("/system_stats")["system"]
    assert isinstance(system, dict)
    assert " ".join(system["argv"]).endswith("--cache-ram 4 --cpu --disable-api-nodes --vram-headroom 0.5")
    shown = steady.machine.run("systemctl show comfyui -p Restart -p MemoryMax")
    assert "Restart=always" in shown
    assert "MemoryMax=infinity" not in shown
    steady.configure('modes = ["shared-gpu"]\n')
    told = steady.inv("flags", "--host", "spark")
    assert all(len(line) <= 100 for line in told.stdout.splitlines())
    assert told.returncode == 0, told.stderr
    assert re.search(r"--cpu +yes +profile cpu\n", told.stdout)
    assert re.search(r"--cache-ram +4 +an earlier configuration\n", told.stdout)
    assert re.search(r"--port +\d+ +Hearth\n", told.stdout)
    assert "configuration differs: --reserve-vram is not set in the release, 2 in the configuration" in told.stdout
    assert "  --cpu --gpu-only --highvram --lowvram --novram\n" in told.stdout


@pytest.mark.parametrize("mode", profile.modes())
def test_every_mode_works_with_the_deployed_comfyui(deployed: Fleet, mode: str) -> None:
    try:
        deployed.configure(f'modes = ["{mode}"]\n')
        done = deployed.deploy("--dry-run")
    finally:
        deployed.configure()
    assert done.returncode == (0 if mode == "standard" else 2), done.stderr


def test_exclusive_flags_are_refused_with_their_origins(deployed: Fleet) -> None:
    try:
        deployed.configure('modes = ["low-memory", "high-memory"]\n')
        modes = deployed.deploy()
        deployed.configure(
            'modes = ["low-memory"]\n[hosts.spark.override.flags]\n"--cache-none" = { why = "a test" }\n'
        )
        flags = deployed.deploy()
        deployed.configure('modes = ["production"]\ndevelop = ["/home/deployer/my-node"]\n')
        develop = deployed.deploy()
        deployed.configure('modes = ["development"]\ndevelop = ["/srv/nothing"]\n')
        missing = deployed.deploy()
    finally:
        deployed.configure()
    assert (modes.returncode, flags.returncode, develop.returncode, missing.returncode) == (10, 63, 10, 63)
    assert "modes low-memory and high-memory exclude each other" in modes.stderr
    assert "--cache-none and --cache-ram exclude each other" in flags.stderr
    assert "--cache-none is from host spark, --cache-ram is from mode low-memory" in flags.stderr
    assert "which production does not allow" in develop.stderr
    assert "/srv/nothing does not exist" in missing.stderr


def test_comfyui_restarts_when_a_developed_node_changes(service: Fleet) -> None:
    """The node is in a private home folder, which the service's unit hides."""
    machine = service.machine
    node = machine.root / HOME / "__init__.py"
    machine.run(f"runuser -u deployer -- mkdir -p /{HOME}/inner; chmod 0700 /home/deployer")

    def write(text: str) -> None:
        machine.run(f"runuser -u deployer -- tee /{HOME}/{node.name} >/dev/null <<'END'\n{text}\nEND")

    write("import a_module_that_nobody_has")
    done = service.becomes(f'modes = ["development"]\ndevelop = ["/{HOME}"]\n')
    assert f"ComfyUI restarts whenever a Python file in /{HOME} changes" in done.stderr
    assert "node my-node cannot be imported: No module named 'a_module_that_nobody_has'" in done.stderr
    write(NODE.replace("NAME", "DevelopedOne"))
    assert within(90, lambda: has(service, "DevelopedOne"))
    machine.run(f"runuser -u deployer -- sh -c 'echo value = 1 > /{HOME}/inner/more.py'")
    write("from .inner.more import value\n" + NODE.replace("NAME", "DevelopedTwo"))
    assert within(90, lambda: has(service, "DevelopedTwo"))
    assert not has(service, "DevelopedOne")
    assert service.deploy("--dry-run").returncode == 0
    log = machine.run("journalctl --no-pager --output=cat --unit=comfyui-reload")
    place = f"{PREFIX}/releases/{service.current()}/custom_nodes/my-node"
    assert f"{place}/__init__.py changed: restarting ComfyUI" in log
    assert exposure(service, "comfyui-reload") <= 2.0
    tried = machine.run(
        f"nsenter --target $(systemctl show comfyui -p MainPID --value) --mount "
        f"runuser -u comfyui -- touch {place}/new 2>&1 || true"
    )
    assert "Read-only file system" in tried
    write("import os; os._exit(3)")
    assert within(60, lambda: "auto-restart" in machine.run("systemctl show comfyui -p SubState"))
    write(NODE.replace("NAME", "DevelopedAgain"))
    assert within(90, lambda: has(service, "DevelopedAgain"))
    # a stopped service stays stopped
    machine.run("systemctl stop comfyui")
    write(NODE.replace("NAME", "DevelopedThree"))
    assert within(20, lambda: "is stopped" in machine.run("journalctl --no-pager --output=cat --unit=comfyui-reload"))
    assert machine.run("systemctl is-active comfyui || true").strip() == "inactive"
    machine.run("systemctl start comfyui")
    assert within(90, lambda: has(service, "DevelopedThree"))
    service.becomes()
    assert not (machine.root / "etc/systemd/system/comfyui-reload.service").is_symlink()
    assert machine.run("systemctl is-active comfyui-reload || true").strip() == "inactive"


def test_timer_frees_memory(service: Fleet) -> None:
    service.becomes('free_memory = "3s"\n')
    timers = json.loads(service.machine.run("systemctl list-timers --output=json comfyui-free-memory.timer"))
    assert [each["activates"] for each in timers] == ["comfyui-free-memory.service"]
    journal = "journalctl --no-pager --output=cat --unit=comfyui-free-memory"
    said = "ComfyUI has no job and frees its memory"
    assert within(20, lambda: service.machine.run(journal).count(said) >= 2)
    assert exposure(service, "comfyui-free-memory") <= 2.0
    service.machine.run("systemctl stop comfyui")
    assert within(20, lambda: "ComfyUI does not answer" in service.machine.run(journal))
    assert "Failed" not in service.machine.run(journal)
