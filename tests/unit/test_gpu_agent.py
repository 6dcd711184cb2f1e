"""NVML queries of agent and client: the library is fake, its answers were recorded on real machines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.files import meminfo
from agent.look.gpu import gpus, process
from agent.look.machine import nvidia as nvidia
from agent.schema.facts import Gpu
from tests import nvml

KEYS = {
    *("index", "name", "uuid", "capability", "driver", "cuda", "memory_total", "memory_used", "unified"),
    *("memory_source", "utilization", "memory_utilization", "temperature", "power", "power_limit", "clock_sm"),
    *("clock_memory", "persistence", "compute_mode", "processes", "unsupported", "errors"),
}


SITE = {"prefix": "/nowhere", "service": "s", "scope": "user", "user": "", "address": "", "port": 1}
OF_FACTS = f"agent.look.machine.nvidia(agent.serve.managers.ours(agent.layout.Layout({SITE}), agent.look.gpu.gpus()))"


def asked(recording: str, call: str = "agent.look.gpu.gpus()") -> Any:
    """The agent's answer on a machine with that recording."""
    code = f"import json, agent.layout, agent.look.gpu, agent.look.facts; print(json.dumps({call}, default=vars))"
    return json.loads(nvml.python(code, recording))


def one(machine: str, *edits: tuple[str, str]) -> dict[str, Any]:
    (found,) = asked(nvml.recording(machine, *edits))
    assert isinstance(found, dict)
    assert found.keys() == KEYS
    return found


def test_an_rtx_4070() -> None:
    found = one("rtx-4070")
    listed = found.pop("processes")
    assert found == {
        "index": 0,
        "name": "NVIDIA GeForce RTX 4070",
        "uuid": "GPU-4070aaaa-0000-0000-0000-000000000000",
        "capability": "8.9",
        "driver": "535.247.01",
        "cuda": "12.2",
        "memory_total": 12282 << 20,
        "memory_used": 3144 << 20,
        "unified": False,
        "memory_source": "nvml",
        "utilization": 2,
        "memory_utilization": 1,
        "temperature": 47,
        "power": 74.0,
        "power_limit": 215.0,
        "clock_sm": 2475,
        "clock_memory": 10501,
        "persistence": True,
        "compute_mode": "default",
        "unsupported": [],
        "errors": [],
    }
    assert [(each["kind"], each["bytes"] >> 20) for each in listed] == [
        ("compute", 1708),
        *(("graphics", size) for size in (814, 158, 235, 112, 96)),
    ]


def test_an_h200() -> None:
    found = one("h200")
    assert (found["name"], found["capability"], found["cuda"]) == ("NVIDIA H200", "9.0", "13.1")
    assert (found["memory_total"] >> 20, found["memory_used"] >> 20) == (143771, 32976)
    assert (found["utilization"], found["power"], found["errors"]) == (100, 627.32, [])
    assert len(found["processes"]) == 3


@pytest.mark.parametrize(
    "edits",
    [
        (),
        (("memory", "130663165952 1"),),  # nvtop#463: some drivers report the whole machine's as the GPU's
        (("capability", "11 0"),),  # unknown to Hearth: its memory query decides
    ],
)
def test_a_gb10_has_the_machines_memory(edits: tuple[tuple[str, str], ...]) -> None:
    found = one("gb10", ("compute", "3904242 1000"), *edits)
    assert (found["unified"], found["memory_source"]) == (True, "meminfo")
    assert found["memory_total"] == meminfo()["MemTotal"]
    assert 0 < found["memory_used"] < found["memory_total"]
    assert found["power_limit"] is None
    assert (found["unsupported"], found["errors"]) == (["power_limit", "clock_memory"], [])
    assert [each["bytes"] for each in found["processes"]] == [1000]


@pytest.mark.parametrize(
    ("edit", "keys", "said"),
    [
        (("memory", "!15"), ("memory_total", "memory_used", "memory_source"), "memory: GPU is lost"),
        (("memory", "100 101"), ("memory_total", "memory_used"), "memory: implausible: 101 of 100 bytes used"),
        (("memory", "0 0"), ("memory_total", "memory_used"), "memory: implausible: 0 of 0 bytes used"),
        (("utilization", "200 1"), ("utilization", "memory_utilization"), "utilization: implausible: 200"),
        (("temperature", "4294967295"), ("temperature",), "temperature: implausible: 4294967295"),
        (("power", "!4"), ("power",), "power: Insufficient Permissions"),
        (("power", "4294967295"), ("power",), "power: implausible: 4294967295"),
        (("clock-sm", "999999"), ("clock_sm",), "clock_sm: implausible: 999999"),
        (("capability", "-5 0"), ("capability",), "capability: implausible: -5"),
        (("uuid", "\udcff"), ("uuid",), "uuid: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (("name", "\x1b[31mGPU"), ("name",), "name: implausible: '\\x1b[31mGPU'"),
        (("persistence", "7"), ("persistence",), "persistence: implausible: 7"),
        (("cuda", "!999"), ("cuda",), "cuda: Unknown Error"),
        (("compute-mode", "9"), ("compute_mode",), "compute_mode: implausible: 9"),
    ],
)
def test_missing_or_implausible_value_is_none(edit: tuple[str, str], keys: tuple[str, ...], said: str) -> None:
    whole, found = one("h200"), one("h200", edit)
    assert found["errors"] == [said]
    assert [found[key] for key in keys] == [None] * len(keys)
    rest = KEYS - {*keys, "errors", "memory_source"}
    assert {key: found[key] for key in rest} == {key: whole[key] for key in rest}


def test_implausible_processes_are_reported() -> None:
    pid, unknown = os.getpid(), 2**64 - 1
    lines = f"compute 0 5\ncompute {pid} {unknown}\ncompute 4294967295 5\nmps {pid} {2**60}\n"
    found = one("h200", ("compute", "!3"))
    assert found["processes"] == []
    (found,) = asked(nvml.recording("h200").replace("compute 3910291 2690646016\n", lines))
    assert [(each["pid"], each["bytes"], each["kind"]) for each in found["processes"]] == [
        (pid, None, "compute"),
        (3910293, 1616904192, "compute"),
        (3910309, 29605494784, "compute"),
        (pid, None, "mps"),
    ]
    assert found["errors"] == [
        "compute processes: implausible: process 0",
        "compute processes: implausible: process 4294967295",
        f"mps processes: implausible: process {pid} uses {2**60} bytes",
    ]


def test_a_gpu_that_is_lost_midway() -> None:
    """The first calls succeed, all others fail: earlier values remain."""
    found = one("h200", ("fails", "5 15"))
    assert (found["capability"], found["memory_source"]) == ("9.0", "nvml")
    assert (found["utilization"], found["power"], found["processes"]) == (None, None, [])
    assert "power: GPU is lost" in found["errors"]


def test_a_gpu_without_a_handle_is_listed_beside_one_that_works() -> None:
    driver, _, gpu = nvml.recording("h200", ("gpus", "2")).partition("gpu\n")
    lost, works = asked(f"{driver}gpu\nhandle !15\ngpu\n{gpu}")
    assert lost.keys() == KEYS
    assert (lost["index"], lost["name"], lost["errors"]) == (0, None, ["device: GPU is lost"])
    assert (works["index"], works["name"], works["errors"]) == (1, "NVIDIA H200", [])
    listed, _ = asked(f"{driver}gpu\nhandle !15\ngpu\n{gpu}", OF_FACTS)
    assert [each["name"] for each in listed] == ["NVIDIA H200"]


@pytest.mark.parametrize("recording", ["", "driver 1\n", "gpus !9\n", "gpus 4294967295\n"])
def test_driver_without_data_reports_no_gpu(recording: str) -> None:
    assert asked(recording) == []


def test_without_the_library_there_is_no_gpu() -> None:
    assert gpus() == []  # no build machine is known to have one
    words = "from agent.look.gpu import Nvml\ntry: Nvml()\nexcept Exception as error: print(error.report)"
    run = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert "libnvidia-ml.so.1" in run.stdout


def test_a_library_that_is_not_nvidias(tmp_path: Path) -> None:
    source, place = tmp_path / "x.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text("int x;\n")
    subprocess.run(["gcc", "-shared", "-o", str(place), str(source)], check=True)
    words = [sys.executable, "-c", "from agent.look.gpu import gpus; print(gpus())"]
    run = subprocess.run(words, env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_process_has_user_and_unit() -> None:
    words = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as named:
        assert named.stdin is not None
        assert named.stdout is not None
        named.stdout.readline()
        found = process(named.pid)
        named.stdin.close()
    assert found["pid"] == named.pid
    assert found["name"].startswith("python")
    assert "input()" in found["name"]
    assert found["user"]
    assert process(4_194_303) == {"pid": 4_194_303, "name": None, "user": None, "unit": None}


def test_gpu_names_are_sanitised() -> None:
    # Wait until it runs under its own name: Popen returns a moment earlier.
    words = ["\x1b[2Jcat", "-"]
    with subprocess.Popen(words, executable="/bin/cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as named:
        assert named.stdin is not None
        assert named.stdout is not None
        named.stdin.write(b"x")
        named.stdin.flush()
        named.stdout.read(1)
        assert process(named.pid)["name"] == "?[2Jcat"
        named.stdin.close()


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        ("h200", {"name": "NVIDIA H200", "capability": "9.0", "memory": 143771 << 20, "unified": False}),
        ("gb10", {"name": "NVIDIA GB10", "capability": "12.1", "memory": None, "unified": True}),
    ],
)
def test_facts_use_nvml(machine: str, wanted: dict[str, Any]) -> None:
    (gpu,), driver = asked(nvml.recording(machine), OF_FACTS)
    listed = re.findall(r"^(?:compute|graphics) (\d+)", nvml.recording(machine), re.MULTILINE)
    assert [each["pid"] for each in gpu.pop("processes")] == list(map(int, listed))
    assert gpu == wanted
    assert driver.startswith("5")


def test_facts_fall_back_to_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA H200, 9.0, 143771\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found, _ = nvidia(())
    assert found == (Gpu("NVIDIA H200", "9.0", 143771 << 20, unified=False),)


@pytest.mark.parametrize(("machine", "arch"), [("rtx-4070", "8.9"), ("h200", "9.0"), ("gb10", "12.1")])
def test_the_client_asks_the_same_library_by_pynvml(machine: str, arch: str) -> None:
    code = "from core.arch import local_gpus; print(*(gpu.arch for gpu in local_gpus()))"
    assert nvml.python(code, nvml.recording(machine)) == f"{arch}\n"
