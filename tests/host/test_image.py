"""An image in a real engine: healthy, without privileges, and within its limits. The long run only: it needs Podman."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from core import files
from core.stack import Platform
from lock import image_base
from tests.host.machine import free_port
from tests.image_base import available_base
from tests.unit.test_image import Images

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.faults, pytest.mark.needs("podman", "runc", "apt-get", "root")]

# Where the machine may not raise limits, Podman's own defaults fail; crun refuses a hybrid cgroup layout.
ENGINE = """\
[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
"""


@pytest.fixture
def podman(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Podman with its own storage, without systemd's timers for health checks."""
    with available_base():
        yield from engine(tmp_path)


def engine(tmp_path: Path) -> Iterator[dict[str, str]]:
    (tmp_path / "engine.conf").write_text(ENGINE)
    storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/graph"\nrunroot = "{tmp_path}/run"\n'
    (tmp_path / "storage.conf").write_text(storage)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DISABLE_HC_SYSTEMD": "true"}
    env |= {"CONTAINERS_CONF": f"{tmp_path}/engine.conf", "CONTAINERS_STORAGE_CONF": f"{tmp_path}/storage.conf"}
    yield env
    call(env, "podman", "rm", "--force", "--all", "--volumes")
    subprocess.run(["umount", f"{tmp_path}/graph/overlay"], capture_output=True, check=False)


def call(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=120)


def start(env: dict[str, str], place: Path, port: int, *words: str) -> None:
    address = ("-e", "COMFYUI_LISTEN=127.0.0.1", "-e", f"COMFYUI_PORT={port}")
    done = call(env, "sh", str(place / "run.sh"), "podman", "--network", "host", *address, *words)
    assert done.returncode == 0, done.stderr


def healthy(env: dict[str, str]) -> None:
    for _ in range(100):
        if call(env, "podman", "healthcheck", "run", "comfyui").returncode == 0:
            return
        time.sleep(0.2)
    pytest.fail(call(env, "podman", "logs", "comfyui").stderr)


def test_an_image_runs_without_privileges(podman: dict[str, str], tmp_path: Path) -> None:
    client = Images(tmp_path / "client")
    client.write(tmp_path / "box", "--profile", "cpu")
    port = free_port()
    env = {**podman, "COMFYUI_MEMORY": "512m"}
    start(env, tmp_path / "box", port)
    healthy(env)
    (found,) = json.loads(call(env, "podman", "inspect", "comfyui").stdout)
    status = Path(f"/proc/{found['State']['Pid']}/status").read_text()
    wanted: dict[str, Any] = {"Uid": "1000", "CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    assert {name: re.findall(rf"^{name}:\s+(\w+)", status, re.MULTILINE)[0] for name in wanted} == wanted
    assert found["HostConfig"]["Memory"] == 512 * 1024**2
    assert found["HostConfig"]["PidsLimit"] == 4096
    for path in ("/x", "/opt/comfyui/x", "/opt/comfyui/env/x"):
        assert "Read-only" in call(env, "podman", "exec", "comfyui", "/bin/sh", "-c", f"echo > {path}").stderr
    inside = "echo > /tmp/x && echo > /opt/comfyui/data/output/x"
    assert call(env, "podman", "exec", "comfyui", "/bin/sh", "-c", inside).returncode == 0
    libraries = call(env, "podman", "exec", "comfyui", "/sbin/ldconfig", "-p")  # as Triton calls it
    assert libraries.returncode == 0, libraries.stderr
    os.kill(found["State"]["Pid"], signal.SIGKILL)
    healthy(env)  # it was started again
    assert call(env, "podman", "stop", "comfyui").returncode == 0


def test_data_of_another_user_is_reported(podman: dict[str, str], tmp_path: Path) -> None:
    client = Images(tmp_path / "client")
    client.write(tmp_path / "box", "--profile", "cpu")
    (tmp_path / "data").mkdir(mode=0o700)
    env = {**podman, "COMFYUI_MEMORY": "512m", "COMFYUI_DATA": str(tmp_path / "data")}
    start(env, tmp_path / "box", free_port())
    for _ in range(100):
        if "error[not-writable]" in (said := call(env, "podman", "logs", "comfyui").stderr):
            break
        time.sleep(0.2)
    assert "error[not-writable]" in said


def test_tests_resolve_a_base_whose_packages_are_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A version that no mirror has, as after a security update; `inv image --renew-base` locks the present ones."""
    locked = (files.CHECKOUT / "recipes/image/base.lock").read_text()
    (tmp_path / "base.toml").write_text((files.CHECKOUT / "recipes/image/base.toml").read_text())
    stale, count = re.subn(r" dash \S+", " dash 0.1", locked)
    assert count == 2
    (tmp_path / "base.lock").write_text(stale)
    monkeypatch.setenv("HEARTH_IMAGE_BASE", str(tmp_path))
    with available_base():
        assert image_base._folder() != tmp_path
        assert image_base.locked(Platform.LINUX_AARCH64, "base")["dash"][0] != "0.1"
    assert image_base._folder() == tmp_path
