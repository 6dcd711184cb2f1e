"""The real machine with a fake NVML, and memory freed by the real ComfyUI."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import nvml
from tests.errors import kind_of
from tests.host.fleet import Fleet

pytestmark = pytest.mark.host


@contextmanager
def driver(fleet: Fleet, machine: str) -> Iterator[int]:
    """A fake NVIDIA library at Debian's path, with a recording in which ComfyUI computes; its process id."""
    assert fleet.answers()  # else the process may still be one that becomes ComfyUI
    pid = int(fleet.machine.run("systemctl show comfyui --property=MainPID --value"))
    library = fleet.machine.root / "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
    recording = fleet.machine.root / "etc/nvml-recording"
    shutil.copy(nvml.library(), library)
    recording.write_text(nvml.recording(machine, ("compute", f"{pid} 9000000000")))
    try:
        yield pid
    finally:
        library.unlink()
        recording.unlink()


def queue(fleet: Fleet, seconds: int) -> str:
    """When all jobs of earlier tests have ended, submit one without models that computes for some seconds.

    It keeps its pictures. Returns its id.
    """
    wait_for(lambda: not any(fleet.ask("/queue").values()), 120)  # neither running nor pending
    color = time.time_ns() % (1 << 24)  # ComfyUI would return the cached result of the same workflow
    inputs: dict[str, Any] = {"width": 64, "height": 64, "batch_size": 1, "color": color}
    workflow: dict[str, Any] = {"0": {"class_type": "EmptyImage", "inputs": inputs}}
    for number in range(seconds):
        size = {"upscale_method": "lanczos", "width": 4000 + number, "height": 4000, "crop": "disabled"}
        scale = {"class_type": "ImageScale", "inputs": {"image": [str(number), 0], **size}}
        workflow[str(number + 1)] = scale
    workflow["last"] = {"class_type": "PreviewImage", "inputs": {"images": [str(seconds), 0]}}
    request = urllib.request.Request(
        f"http://127.0.0.1:{fleet.machine.port}/prompt",
        json.dumps({"prompt": workflow}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["prompt_id"])


def test_gpu_shows_comfyuis_process(deployed: Fleet) -> None:
    with driver(deployed, "rtx-4070") as pid:
        told = deployed.inv("gpu", "--host", "spark", "--json")
        assert told.returncode == 0, told.stderr
        (sample,) = json.loads(told.stdout)
        (gpu,) = sample["gpus"]
        assert (gpu["name"], gpu["errors"]) == ("NVIDIA GeForce RTX 4070", [])
        ours = next(each for each in gpu["processes"] if each["comfyui"])
        assert (ours["pid"], ours["user"], ours["unit"]) == (pid, "comfyui", "comfyui.service")
        assert ours["name"].endswith(" main.py")
        shown = deployed.inv("gpu", "--host", "spark").stdout
        assert "comfyui.service (ComfyUI)" in shown
        assert all(len(line) <= 100 for line in shown.splitlines())
        facts = deployed.facts()
        (device,) = facts["gpus"]
        assert [each["pid"] for each in device.pop("processes") if each["comfyui"]] == [pid]
        assert device == {
            "name": "NVIDIA GeForce RTX 4070",
            "capability": "8.9",
            "memory": 12282 << 20,
            "unified": False,
        }
        assert facts["driver"] == "535.247.01"
    without = deployed.inv("gpu", "--host", "spark")
    assert (without.returncode, kind_of(without.stderr)) == (69, "gpu"), without.stderr
    assert "nvidia-smi must list the GPU" in without.stderr


def test_a_recording_names_the_jobs(deployed: Fleet, tmp_path: Path) -> None:
    with driver(deployed, "h200"):
        place = tmp_path / "run.jsonl"
        job = queue(deployed, 6)
        done = deployed.inv("gpu", "--host", "spark", "--record", str(place), "--seconds", "4", "--every", "0.5")
        assert done.returncode == 0, done.stderr
        samples = [json.loads(line) for line in place.read_text().splitlines()]
        assert 7 <= len(samples) <= 9
        assert job in {each["job"] for each in samples}
        assert samples[0]["host"] == "spark"
        assert deployed.inv("gpu-plot", str(place)).stdout.strip() == str(tmp_path / "run.svg")
        assert job[:8] in (tmp_path / "run.svg").read_text()
        again = deployed.inv("gpu", "--host", "spark", "--record", str(place), "--seconds", "4")
        assert (again.returncode, len(place.read_text().splitlines())) == (15, len(samples))


def test_interrupt_keeps_the_recording(deployed: Fleet, tmp_path: Path) -> None:
    with driver(deployed, "gb10"):
        place = tmp_path / "run.jsonl"
        started = deployed.start("gpu", "--host", "spark", "--record", str(place), "--seconds", "600", "--every", "0.2")
        wait_for(lambda: place.exists() and len(place.read_text().splitlines()) >= 3)
        os.kill(started.pid, signal.SIGINT)
        said, _ = started.communicate(timeout=30)
        assert started.returncode == 130, said
        assert "samples in" in said
        samples = [json.loads(line) for line in place.read_text().splitlines()]
        assert all(each["gpus"][0]["memory_source"] == "meminfo" for each in samples)
        wait_for(lambda: not deployed.machine.run("pgrep -f '[a]gent-.*pyz .* gpu'", check=False))


def test_watch_uses_one_connection(deployed: Fleet) -> None:
    def logins() -> int:
        """The number of logins."""
        return deployed.machine.run("journalctl --unit=ssh --output=cat").count("Accepted publickey")

    with driver(deployed, "h200"):
        before = logins()
        started = deployed.start("gpu", "--host", "spark", "--watch=0.5")
        assert started.stdout is not None
        limit = threading.Timer(60, started.kill)
        limit.start()
        shown = sum(1 for _ in itertools.islice((line for line in started.stdout if "H200" in line), 4))
        limit.cancel()
        assert shown == 4
        os.kill(started.pid, signal.SIGINT)
        rest, _ = started.communicate(timeout=60)
        assert started.returncode == 130, rest
        assert logins() == before + 1


def test_comfyui_frees_its_memory_after_its_job(deployed: Fleet) -> None:
    job = queue(deployed, 6)
    at_once = deployed.inv("free-memory", "--host", "spark", "--wait", "0")
    assert at_once.returncode == 1, at_once.stdout + at_once.stderr
    assert f"job {job} is running" in at_once.stdout
    done = deployed.inv("free-memory", "--host", "spark", "--json")
    assert done.returncode == 0, done.stderr
    queue(deployed, 4)
    wait_for(lambda: not any(deployed.ask("/queue").values()), 120)
    (found,) = json.loads(deployed.inv("free-memory", "--host", "spark", "--json").stdout)
    assert (found["freed"], found["job"]) == (True, None)
    assert found["after"]["resident"] < found["before"]["resident"] - 300_000_000  # the pictures of four nodes
    shown = deployed.inv("free-memory", "--host", "spark")
    assert "ComfyUI's process: " in shown.stdout


def test_page_cache_cannot_be_dropped_in_a_container(deployed: Fleet) -> None:
    refused = deployed.inv("drop-caches", "--host", "spark")
    assert refused.returncode == 63
    assert "no GPU of this host shares the machine's memory" in refused.stderr
    with driver(deployed, "gb10"):
        assert deployed.inv("drop-caches", "--host", "spark", "--dry-run").returncode == 2
        done = deployed.inv("drop-caches", "--host", "spark")
    assert done.returncode == 69, done.stderr
    assert "refuses to drop its page cache" in done.stderr
    assert "Read-only file system" in done.stderr
    last = json.loads(deployed.inv("history", "--host", "spark", "--json").stdout)[-1]
    assert (last["action"], last["result"]) == ("drop-caches", "failed")


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
