"""Third-party programs that run once: the settings of their transient units."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.change import trial
from agent.files import AgentError, write
from agent.layout import Layout
from agent.look import mps
from agent.schema.manifest import Gate, ReleaseManifest
from agent.serve import sandbox

DATA = "/opt/comfyui/data"


def layout(**values: object) -> Layout:
    base = {"prefix": "/opt/comfyui", "service": "comfyui", "scope": "system", "user": "comfyui"}
    return Layout({**base, "address": "", "port": 1, **values})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of the last command."""
    words: list[str] = []

    def output(command: list[str], *_: object) -> bytes:
        words[:] = command
        return b" 100.0\n"

    monkeypatch.setattr(sandbox, "_output", output)
    return words


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("line", [
    f"BindReadOnlyPaths=/r/manager.ini:{DATA}/user/__manager/config.ini",
    f"BindPaths=-{DATA}/models:/mnt",
    f"InaccessiblePaths=-{DATA}/user/__manager/startup-scripts",
    "BindReadOnlyPaths=/r/manager.ini:/srv/mine/__manager/config.ini",
    "TemporaryFileSystem=/srv/mine/x",
])  # fmt: skip
def test_sandbox_binds_are_not_below_writable_folders(ran: list[str], line: str, *, apart: bool) -> None:
    """systemd-run checks nothing, and systemd follows links as root."""
    unit = f"[Unit]\nAssertPathIsSymbolicLink=!{DATA}/user\n[Service]\nReadWritePaths={DATA} /srv/mine\n{line}\n"
    sandbox.sandboxed(layout(folders={"user": "/srv/mine"}), unit, ["true"], ReleaseManifest(), seconds=5, apart=apart)
    assert [word for word in ran if f"{DATA}/" in word or "/srv/mine/" in word] == []
    assert (f"--property=ReadWritePaths={DATA} /srv/mine" in ran) is not apart
    assert "--property=WorkingDirectory=/" in ran


def test_mps_daemon_is_queried_in_a_sandbox(ran: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process of ComfyUI's user outside the sandbox would be an escape."""
    monkeypatch.setattr(mps, "UNITS", tmp_path)
    text = (Path(__file__).parents[2] / "recipes/system/mps.service").read_text().replace("$service", "comfyui")
    (tmp_path / "comfyui-mps.service").write_text(text.replace("$user", "comfyui"))
    monkeypatch.setattr("subprocess.run", None)
    assert mps._said("/usr/bin/control", "get_server_list", "/run/comfyui-mps", layout()) == ["100.0"]
    assert ran[0] == "systemd-run"
    for line in ("User=comfyui", "ProtectHome=yes", "BindPaths=/run/comfyui-mps", "PrivateNetwork=yes"):
        assert f"--property={line}" in ran
    assert not [
        word
        for word in ran
        if "Exec" in word or "WantedBy" in word or "RuntimeDirectory" in word or "LogsDirectory" in word
    ]
    assert ran[ran.index("--") + 1 :] == ["/bin/sh", "-c", 'echo "$1" | "$0"', "/usr/bin/control", "get_server_list"]

    def fails(*_: object) -> bytes:
        raise AgentError("step", "it ended with 1", "Cannot find MPS control daemon process")

    monkeypatch.setattr(sandbox, "_output", fails)
    with pytest.raises(AgentError, match="does not answer") as caught:
        mps._said("/usr/bin/control", "get_server_list", "/run/comfyui-mps", layout())
    assert "Cannot find" in caught.value.report["cause"]


def test_trial_binds_are_not_below_writable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a link `data/models`, or a link that a kernel's import leaves for the following start."""
    folders = {"models": "/mnt/models", "output": "/srv/output"}
    for given in ({}, folders):
        place = layout(prefix=str(tmp_path), user="", folders=given)
        for each in (place.data / "user", place.state):
            each.mkdir(parents=True, exist_ok=True)
        argv = ("python", "--listen", "x", "--port", "1")
        write(place.releases / "r/comfyui.service", "[Service]\n")
        monkeypatch.setattr(trial, "run", lambda *_: "")
        tried = trial.SystemdTrial(place)
        monkeypatch.setattr(tried.unit, "start", lambda: None)
        tried.place = tmp_path / "units/comfyui-trial.service"
        tried.start(ReleaseManifest(id="r", argv=argv, gate=Gate(seconds=1)))
        said = (tmp_path / "units/comfyui-trial.service.d/~trial.conf").read_text()
        binds = dict(line.split(":") for line in re.findall(r"^Bind\w+=-?(.*)$", said, re.MULTILINE))
        room = place.state / "trial"
        wanted = {str(room / "data"): str(place.data), str(place.data): "/run/comfyui-data"}
        wanted |= {str(room / "output"): "/srv/output", "/mnt/models": "/mnt/models"} if given else {}
        assert binds == wanted
        assert (room / "data/models").readlink() == Path("/run/comfyui-data/models")
        monkeypatch.setattr(tried.unit, "stop", lambda: None)
        monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
        tried.clear()
        assert not room.exists()


CONTAINER = """[Container]
Rootfs=/opt/comfyui/parts/base-1:O
AddDevice=nvidia.com/gpu=all
Volume=/opt/comfyui/data:/opt/comfyui/data:rw,z
Volume=%t/%N/secrets:/run/hearth/secrets:ro,z
Exec=python main.py
[Service]
LoadCredential=HF_TOKEN:/opt/comfyui/secrets/HF_TOKEN
MemoryMax=90%
IPAddressDeny=link-local 10.0.0.0/8
"""


@pytest.mark.parametrize("scope", ["system", "user"])
@pytest.mark.parametrize("network", [False, True])
def test_a_program_in_a_container_sees_the_parts_only(ran: list[str], scope: str, *, network: bool) -> None:
    release = ReleaseManifest(environment={"A": "1"})
    argv = ["/opt/comfyui/parts/env-1/bin/python", "-c", "1"]
    sandbox.sandboxed(layout(scope=scope), CONTAINER, argv, release, seconds=5, apart=True, network=network)
    at = ran.index("--")
    outer, inner = ran[:at], ran[at + 1 :]
    assert outer[0] == "systemd-run"
    assert ("--user" in outer) == (scope == "user")
    limits = {each.removeprefix("--property=") for each in outer if each.startswith("--property=")}
    assert {"MemoryMax=90%", "IPAddressDeny=link-local", "IPAddressDeny=10.0.0.0/8"} < limits
    assert not [each for each in limits if "Credential" in each]
    assert inner[:2] == ["podman", "run"]
    assert inner[-5:] == ["--rootfs", "/opt/comfyui/parts/base-1:O", *argv]
    assert [each for each in inner if each.startswith(("--volume", "-v", "--mount"))] == [
        "--volume=/opt/comfyui/parts:/opt/comfyui/parts:ro"
    ]
    assert {"--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"} < {*inner}
    assert f"--network={'host' if network else 'none'}" in inner
    assert ("--user=65534:65534" if scope == "system" else "--userns=keep-id") in inner
    assert {"--device=nvidia.com/gpu=all", "--env=A=1", "--timeout=5"} < {*inner}
