"""`inv gpu`, `gpu-plot`, `free-memory`, `drop-caches`: their output, plots and refusals."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import msgspec
import pytest
from invoke.context import Context
from invoke.exceptions import Exit

from agent.change import memory as agent_memory
from agent.files import AgentError
from agent.layout import Layout
from agent.schema.change import DropCaches
from agent.schema.live import Freed, GpuMemory, Held, Sample
from agent.serve import managers
from core.errors import ConnectError, UsageError
from core.typed import convert
from deploy import fleet
from deploy.facts import Gpu as GpuFact
from deploy.flags import Fleet
from ops import gpu, memory, plot, tasks
from tests import nvml
from tests.errors import raises
from tests.plans import FRESH, spark

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROCESS = {"pid": 4242, "name": "python3.12 main.py", "user": "comfyui", "unit": "comfyui.service"}


@functools.cache
def asked(machine: str) -> str:
    """The JSON of the agent's `gpus` on a recorded machine."""
    code = "import json; from agent.look.gpu import gpus; print(json.dumps(gpus()))"
    return nvml.python(code, nvml.recording(machine))


def sample(machine: str, **changes: Any) -> dict[str, Any]:
    """A sample as the agent returns it, without processes unless they are given."""
    (one,) = json.loads(asked(machine))
    return {"time": 1000.0, "gpus": [{**one, "processes": [], **changes}], "job": None}


def shown(**of: dict[str, Any]) -> str:
    return "\n".join(gpu.rows({name: convert(each, Sample) for name, each in of.items()}))


# --- shown -----------------------------------------------------------------------------------------------------------


def test_a_gpu_and_its_processes() -> None:
    ours = {**PROCESS, "bytes": 30_000_000_000, "kind": "compute", "comfyui": True}
    text = shown(spark={**sample("h200", processes=[ours]), "job": "3f2a"})
    assert text == (
        "GPU  name  used   memory               °C  power         SM/memory MHz\n"
        "0    H200  100 %  34.6 GB of 150.8 GB  52  627 of 700 W  1980 / 3201\n"
        "\n"
        "GPU  pid   process             user     kind     memory   service\n"
        "0    4242  python3.12 main.py  comfyui  compute  30.0 GB  comfyui.service (ComfyUI)\n"
        "\n"
        "spark: job 3f2a is running"
    )


def test_missing_value_is_a_dash_and_errors_are_explained() -> None:
    untold = dict.fromkeys(
        ("name", "utilization", "memory_used", "temperature", "power", "power_limit", "clock_memory")
    )
    text = shown(spark=sample("gb10", **untold, unified=True, errors=["power: GPU is lost"]))
    assert "0    -     - %" in text
    assert "spark: GPU 0 shares the machine's memory" in text
    assert "spark: GPU 0: power: GPU is lost" in text
    assert "clock_memory" not in text


def test_no_gpu() -> None:
    assert "spark: the driver lists no GPU" in shown(spark={**sample("h200"), "gpus": []})


def test_tables_fit_100_columns() -> None:
    long = {**PROCESS, "pid": 4194303, "name": "x" * 60, "user": "y" * 32, "unit": f"{'z' * 40}.service"}
    process = {**long, "bytes": 99_900_000_000, "kind": "graphics", "comfyui": True}
    one = sample(
        "h200", name="NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", power=1000, processes=[process]
    )
    assert max(map(len, shown(spark=one).splitlines())) <= 100
    assert max(map(len, shown(spark=one, studio=one).splitlines())) <= 100


@pytest.mark.parametrize(
    "words",
    [
        {"record": "x"},
        {"seconds": "5"},
        {"every": "1"},
        {"record": "x", "seconds": "5", "watch": True},
        {"record": "x", "seconds": "0"},
        {"record": "x", "seconds": "soon"},
        {"record": "x", "seconds": "5", "every": "0.01"},
        {"record": "x", "seconds": "5", "every": "-1"},
        {"watch": "nan"},
    ],
)
def test_invalid_flags_are_refused(words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"watch": "", "record": "", "seconds": "", "every": "", **words}
    with pytest.raises(Exit) as raised:
        tasks.gpu(Context(), host="", group="", ask_sudo=False, json=False, **given)
    assert raised.value.code == UsageError.exit_code
    assert not list(tmp_path.iterdir())


# --- drawn -----------------------------------------------------------------------------------------------------------


def recorded(*jobs: str | None, **changes: Any) -> list[dict[str, Any]]:
    """One sample per second, with the running job."""
    return [
        {**sample("h200", **changes), "time": 1000.0 + second, "job": job, "host": "spark"}
        for second, job in enumerate(jobs)
    ]


def written(tmp_path: Path, samples: list[dict[str, Any]]) -> Path:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in samples))
    return path


def drawn(*jobs: str | None, **changes: Any) -> Figure:
    return plot.figure([convert(each, plot.Recorded) for each in recorded(*jobs, **changes)])


def test_a_recording_is_plotted_with_its_jobs() -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    samples = [convert(each, plot.Recorded) for each in recorded(None, "one", "one", "two", None, "one")]
    unknown = replace(samples[2].gpus[0], power=None)
    samples[2] = replace(samples[2], gpus=(unknown,))
    used, memory, power = plot.figure(samples).axes
    spans = [(patch.get_x(), patch.get_width()) for patch in used.patches if isinstance(patch, Rectangle)]
    assert spans == [(1, 2), (3, 1), (5, 0)]
    assert [text.get_text() for text in used.texts] == ["one", "two", "one"]
    assert (used.get_ylim(), power.get_ylim()) == ((0, 100), (0, 700))
    assert [len(each.get_lines()) for each in (used, memory, power)] == [1, 1, 1]
    (line,) = power.get_lines()
    assert np.isnan(np.asarray(line.get_ydata())).tolist() == [False, False, True, False, False, False]  # a gap
    assert np.asarray(line.get_xdata()).tolist() == [0, 1, 2, 3, 4, 5]


def test_jobs_are_seen_to_begin_and_end() -> None:
    seen = [convert(each, plot.Recorded) for each in recorded("a", "a", None, "b")]
    assert plot.jobs(seen) == [(1000, 1002, "a"), (1003, 1003, "b")]


def test_a_value_that_is_not_reported_has_an_empty_panel() -> None:
    nothing = dict.fromkeys(("utilization", "memory_used", "memory_total", "power", "power_limit", "name"))
    labels = [each.get_ylabel() for each in drawn(None, **nothing).axes]
    assert labels == ["GPU used, %", "memory used, GB\nnot reported", "power, W\nnot reported"]


def test_names_are_neither_markup_nor_formulas(tmp_path: Path) -> None:
    place = plot.plot(str(written(tmp_path, recorded("<j&b>", name="<script>$x_{$\x1b[1m"))), "")
    assert place == tmp_path / "run.svg"
    text = place.read_text()
    assert "<script>" not in text
    assert {"<j&b>", "GPU 0: <script>$x_{$"} <= {each.text for each in ElementTree.fromstring(text).iter()}


def test_plot_writes_a_png(tmp_path: Path) -> None:
    plot.plot(str(written(tmp_path, recorded("a", "b"))), str(tmp_path / "run.png"))
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with raises("program-missing") as raised:
        plot.plot(str(written(tmp_path, recorded("a"))), "")
    assert raised.value.hint == "uv sync --group plot"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:-30], "line 3 of .*run.jsonl is incomplete"),
        (lambda raw: raw.replace(b"{", b"[", 1), "line 1 of .* is not a sample"),
        (lambda raw: raw.replace(b'"time": 1001.0', b'"time": "noon"'), "line 2 of .* is not a sample"),
        (lambda raw: raw.replace(b'"gpus"', b'"cpus"'), "line 1 of .* is not a sample"),
        (lambda raw: b"hello\n" + raw, "line 1 of .* is not a sample"),
        (lambda _: b"", "is empty"),
    ],
)
def test_damaged_recording_error_names_the_line(tmp_path: Path, damage: Any, said: str) -> None:
    path = written(tmp_path, recorded(None, "a", "b"))
    path.write_bytes(damage(path.read_bytes()))
    with raises("recording", match=said):
        plot.read(path)
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_and_unsupported_files_are_refused(tmp_path: Path) -> None:
    with raises("recording", match="cannot be read"):
        plot.plot(str(tmp_path / "none"), "")
    with raises("usage", match="neither"):
        plot.plot(str(written(tmp_path, recorded("a"))), str(tmp_path / "run.pdf"))
    with raises("usage", match="cannot be written"):
        plot.plot(str(tmp_path / "run.jsonl"), str(tmp_path / "none/run.png"))


# --- ComfyUI's memory ------------------------------------------------------------------------------------------------


@contextmanager
def comfyui(*running: str | None) -> Iterator[tuple[Layout, list[str]]]:
    """A ComfyUI whose queue has these jobs, one answer after the other; and the requests that it received."""
    asked: list[str] = []
    left = list(running)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/queue"
            job = left.pop(0) if len(left) > 1 else left[0]
            self.answer(json.dumps({"queue_running": [[0, job, {}]] if job else [], "queue_pending": []}).encode())

        def do_POST(self) -> None:
            assert self.path == "/free"
            asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.answer(b"")  # as the real one: status 200 without content

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield layout(server.server_port), asked
        finally:
            server.shutdown()
            thread.join()


def layout(port: int) -> Layout:
    where = {"prefix": "/nowhere/hearth", "service": "comfyui", "scope": "user", "user": ""}
    return Layout({**where, "address": "127.0.0.1", "port": port})


def test_idle_comfyui_is_asked_again_if_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_memory, "UNCHANGED", 0.1)
    with comfyui(None) as (place, asked):
        found = convert(agent_memory.free(place, 0), Freed)
    assert (found.freed, found.job) == (True, None)
    assert [json.loads(each) for each in asked] == [{"free_memory": True}] * 2
    assert found.before.available > 0


def test_memory_is_freed_after_the_running_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_memory, "UNCHANGED", 0.1)
    with comfyui("one", "one", "one", "two") as (place, _):
        found = agent_memory.free(place, 30)
    assert (found.freed, found.job) == (True, "one")


def test_wait_for_a_job_is_limited() -> None:
    with comfyui("one") as (place, asked):
        found = convert(agent_memory.free(place, 0.1), Freed)
    assert not found.freed
    assert len(asked) == 1
    said = "spark: job one is running; ComfyUI frees its memory when the job ends"
    assert memory.lines("spark", found) == [said]


def test_unresponsive_comfyui_keeps_its_memory() -> None:
    with pytest.raises(AgentError, match="does not answer"):
        agent_memory.free(layout(1), 1)


def test_the_results_of_all_hosts_come_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = Held((), 5, 10)
    freed = Freed(True, None, held, held)
    error = ConnectError("unreachable", "off cannot be reached")
    answers = [fleet.Answer[Freed]("off", None, error), fleet.Answer("spark", freed)]
    monkeypatch.setattr(memory, "free", lambda *_, **__: answers)
    monkeypatch.setattr(Fleet, "names", lambda _: ["off", "spark"])
    with pytest.raises(SystemExit) as raised:
        tasks.free_memory(Context(), wait="0", host="", group="", ask_sudo=False, json=False)
    assert raised.value.code == 1
    assert capsys.readouterr() == (
        "spark: ComfyUI's process: 5 B before, 5 B after (0 B less)\n", "off: off cannot be reached\n"
    )  # fmt: skip


def test_freed_memory_is_shown() -> None:
    def held(used: int | None, resident: int | None) -> Held:
        of = () if used is None else (GpuMemory(0, used, 0),)
        return Held(of, resident, 10**10)

    freed = Freed(True, None, held(9_000_000_000, 5), held(1_000_000_000, 5))
    assert memory.lines("a", freed) == ["a: GPU 0: 9.0 GB before, 1.0 GB after (8.0 GB less)"]
    of_process = Freed(True, None, held(None, 2_000_000_000), held(None, 2_100_000_000))
    assert memory.lines("a", of_process) == ["a: ComfyUI's process: 2.0 GB before, 2.1 GB after (100.0 MB more)"]


# --- samples of the agent --------------------------------------------------------------------------------------------


def test_the_agent_samples_at_its_pace_and_names_the_job() -> None:
    """Over one open library; ComfyUI's process is identified by its unit."""
    with comfyui("one", "one", None) as (place, _):
        code = (
            "import json; from itertools import islice\n"
            "from agent.look.samples import samples; from agent.layout import Layout\n"
            f"found = list(islice(samples(Layout({vars(place.site)!r}), 0.3, None), 3))\n"
            "print(json.dumps(found, default=vars))"
        )
        begun = time.time()
        found = msgspec.json.decode(nvml.python(code, nvml.recording("h200")), type=list[Sample])
    assert [each.job for each in found] == ["one", "one", None]
    assert all(each.time >= begun + number * 0.3 for number, each in enumerate(found))
    assert found[0].gpus[0].power == 627.32


def test_a_comfyui_that_hangs_does_not_hold_up_the_samples() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as hung:  # accepts connections, and answers none
        code = (
            "import json; from agent.look.samples import samples; from agent.layout import Layout\n"
            f"print(json.dumps(list(samples(Layout({vars(layout(hung.server_port).site)!r}), 0.2, 2)), default=vars))"
        )
        found = msgspec.json.decode(nvml.python(code, nvml.recording("h200")), type=list[Sample])
    assert len(found) > 3  # one second is lost, once
    assert {each.job for each in found} == {None}


def test_processes_of_the_service_are_marked() -> None:
    def process(unit: str | None) -> dict[str, Any]:
        return {"pid": 9, "name": None, "user": None, "unit": unit, "bytes": None, "kind": "compute"}

    units = ("comfyui.service", "comfyui-mps.service", "other.service", None)
    (found,) = managers.ours(layout(1), [{**sample("h200")["gpus"][0], "processes": list(map(process, units))}])
    assert [each.comfyui for each in found.processes] == [True, True, False, False]


# --- the page cache --------------------------------------------------------------------------------------------------


def test_dropping_the_page_cache_is_planned_where_memory_is_shared() -> None:
    there = replace(FRESH, current="r1", gpus=(GpuFact("GB10", "12.1", None, True),))
    planned = memory.plan(spark(), there, force=False)
    assert [step.kind for step in planned.steps] == ["drop-caches"]
    assert (planned.base, planned.release) == ("r1", "r1")


@pytest.mark.parametrize(
    ("changes", "force", "kind"),
    [
        ({"gpus": (GpuFact("H200", "9.0", 1, False),)}, False, "no-unified-gpu"),
        ({"gpus": ()}, False, "no-unified-gpu"),
        ({"root": False}, True, "no-root"),
        ({"current": ""}, True, "not-deployed"),
    ],
)
def test_dropping_the_page_cache_is_refused(changes: dict[str, Any], force: bool, kind: str) -> None:
    there = replace(FRESH, **{"current": "r1", **changes})
    planned = memory.plan(spark(), there, force=force)
    assert not planned.steps
    assert [each.kind for each in planned.refusals] == [kind]
    assert all(each.remedy for each in planned.refusals)


def test_force_drops_the_page_cache_elsewhere() -> None:
    there = replace(FRESH, current="r1", gpus=())
    assert memory.plan(spark(), there, force=True).steps


def test_drop_caches_step_reports_freed_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on this machine, where the cache is useful to others."""
    place = tmp_path / "drop_caches"
    place.write_text("")
    monkeypatch.setattr(agent_memory, "CACHES", place)
    notes: list[str] = []
    agent_memory.drop_caches(layout(1), DropCaches("t", "w", "u"), notes.append)
    assert place.read_text() == "3\n"
    assert [note.partition(":")[0] for note in notes] == ["the page cache", "available memory"]
    monkeypatch.setattr(agent_memory, "CACHES", tmp_path / "no/such")
    with pytest.raises(AgentError, match="refuses to drop its page cache"):
        agent_memory.drop_caches(layout(1), DropCaches("t", "w", "u"), notes.append)
