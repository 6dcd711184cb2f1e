"""`inv bench-kernels`: the table, the answer and the plot of a recording, and what is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from invoke.context import Context

from core import arch
from core.arch import Arch, LocalGpu
from kernels import bench, tasks
from tests.errors import raises

MACHINE = {"gpu": "NVIDIA Tiny", "capability": "9.0", "cuda": "13.0", "versions": {"torch": "2.11.0"}}


def line(backend: str, model: str = "Flux", **more: Any) -> dict[str, Any]:
    shape = {"model": model, "dtype": "bfloat16", "batch": 1, "heads": 2, "length": 9, "kv_length": 9, "head_dim": 64}
    measured = {"tolerance": 0.01, "error": 0.001, "memory": 1000, "milliseconds": 2.0, "tflops": 1.0, "reason": ""}
    return {"backend": backend, "shape": shape, **measured, **more}


GPUS = [LocalGpu(Arch(9, 0), "GPU-1"), LocalGpu(Arch(12, 0), "GPU-2")]


def recording(place: Path, *lines: dict[str, Any]) -> Path:
    place.write_text("".join(f"{json.dumps(each)}\n" for each in (MACHINE, *lines)))
    return place


def test_the_shipped_recording_is_of_a_real_gpu_and_shown_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arch, "local_gpus", list)
    tasks.bench_kernels(Context(), json=False)
    shown = capsys.readouterr().out
    assert shown.startswith("RECORDING ")
    assert "not measured on this machine" in shown
    tasks.bench_kernels(Context(), json=True)
    found = json.loads(capsys.readouterr().out)
    assert Path(found["recording"]) == bench.SHIPPED
    assert found["machine"]["gpu"] in shown
    models = {each["shape"]["model"] for each in found["measurements"]}
    assert {model.split()[0] for model in models} == {"SDXL", "Flux", "Qwen-Image", "Wan"}
    backends = {"SDPA", "SDPA flash", "SDPA cuDNN", "flash-attention", "SageAttention", "comfy-kitchen"}
    assert {each["backend"] for each in found["measurements"]} >= backends
    assert len(found["measurements"]) == len(models) * len({each["backend"] for each in found["measurements"]})


def test_only_a_correct_backend_is_the_fastest(tmp_path: Path) -> None:
    lines = (
        line("SDPA"),
        line("good", milliseconds=1.0),
        line("wrong", milliseconds=0.1, error=0.5),
        line("nan", milliseconds=0.1, error=None, reason="the result holds NaN or infinity"),
        line("broken", error=None, milliseconds=None, memory=None, tflops=None, reason="RuntimeError: no kernel"),
    )
    found = bench.read(recording(tmp_path / "r.jsonl", *lines))
    best = bench.fastest(found, "Flux")
    assert best is not None
    assert best.backend == "good"
    assert bench.speeds(found) == {"SDPA": 1.0, "good": 2.0, "wrong": None, "nan": None, "broken": None}
    shown = list(bench.rows(found))
    states = {row.split()[1]: row for row in shown if row.startswith("Flux  ")}
    assert states["good"].endswith("fastest")
    assert states["wrong"].endswith("WRONG")
    assert states["broken"].endswith("RuntimeError: no kernel")
    assert "Flux: good, 1.000 ms" in shown


def test_a_backend_must_be_correct_on_every_model_to_have_a_speed(tmp_path: Path) -> None:
    lines = (line("SDPA"), line("SDPA", "Wan"), line("fast", milliseconds=0.5), line("fast", "Wan", reason="no memory"))
    found = bench.read(recording(tmp_path / "r.jsonl", *lines))
    assert bench.speeds(found)["fast"] is None
    lines = (*lines[:3], line("fast", "Wan", milliseconds=8.0))
    assert bench.speeds(bench.read(recording(tmp_path / "r.jsonl", *lines)))["fast"] == pytest.approx(1.0)


def test_no_correct_backend_is_said(tmp_path: Path) -> None:
    found = bench.read(recording(tmp_path / "r.jsonl", line("SDPA", error=1.0)))
    assert bench.fastest(found, "Flux") is None
    assert "Flux: no correct backend" in list(bench.rows(found))


@pytest.mark.parametrize(
    "text", ["", "nothing\n", "{}\n", json.dumps(MACHINE)[:-1], f'{json.dumps(MACHINE)}\n{{"a": 1}}\n']
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r").write_text(text)
    with raises("recording"):
        bench.look("", str(tmp_path / "r"))
    with raises("recording"):
        bench.look("", str(tmp_path / "missing"))


def program(place: Path, *commands: str) -> str:
    place.write_text("\n".join(("#!/bin/sh", *commands)))
    place.chmod(0o755)
    return str(place)


def test_an_interpreter_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "local_gpus", lambda: GPUS)
    printed = recording(tmp_path / "r", line("SDPA"))
    shown = program(
        tmp_path / "python",
        f'echo "$@" $CUDA_VISIBLE_DEVICES > {tmp_path}/argv',
        "echo a library says something",
        f"cat {printed}",
    )
    found = bench.look(shown, "")
    assert (found.recording, found.notes) == ("", ())
    assert [each.backend for each in found.measurements] == ["SDPA"]
    assert not next(bench.rows(found)).startswith("RECORDING")
    assert (tmp_path / "argv").read_text().split() == ["-m", "kernels.attention", "GPU-1"]


def test_measurements_before_a_crash_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "local_gpus", lambda: GPUS)
    printed = recording(tmp_path / "r", line("SDPA"))
    found = bench.look(program(tmp_path / "python", f"cat {printed}", "echo CUDA error: lost >&2", "exit 1"), "")
    assert len(found.measurements) == 1
    assert "CUDA error: lost" in list(bench.rows(found))[-1]


def test_an_interpreter_without_torch_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "local_gpus", lambda: GPUS)
    with raises("inspection", match="No module named"):
        bench.look(program(tmp_path / "python", "echo No module named torch >&2", "exit 1"), "")
    monkeypatch.setattr(arch, "local_gpus", list)
    with raises("usage"):
        bench.look("python", "")


def test_the_plot_has_a_bar_for_each_backend_and_model(tmp_path: Path) -> None:
    place = tmp_path / "plot.svg"
    found = bench.read(
        recording(tmp_path / "r", line("SDPA"), line("fast"), line("SDPA", "Wan $x$"), line("fast", "Wan $x$"))
    )
    bench.plot(found, place)
    tree = ElementTree.parse(place)
    bars = [each.get("id") for each in tree.iter("{http://www.w3.org/2000/svg}g") if each.get("id") in ("SDPA", "fast")]
    assert sorted(filter(None, bars)) == ["SDPA", "SDPA", "fast", "fast"]
    assert "Wan $x$" in place.read_text()
    assert "recorded" in place.read_text()
    with raises("usage"):
        bench.plot(found, tmp_path / "plot.pdf")


def test_a_recording_has_the_fields_of_a_measurement() -> None:
    fields = {each.encode_name for each in msgspec.structs.fields(bench.Measurement)}
    for text in bench.SHIPPED.read_text().splitlines()[1:]:
        assert set(json.loads(text)) <= fields
