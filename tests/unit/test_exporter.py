"""The exporter: its metrics, its time-outs, and that the packed agent on hosts can run it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from invoke.parser import Parser
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from agent import api
from agent.api import Endpoint
from agent.layout import Layout
from agent.metrics import comfyui, host
from agent.metrics.gather import Gatherer, Source
from agent.metrics.server import gatherer
from core import files
from deploy import archive
from docs import generate
from tests import nvml
from tests.host.machine import free_port

ALERTS = files.CHECKOUT / "ops/prometheus/alerts.yml"


class Stand:
    """Answers the exporter's requests as ComfyUI 0.30.0 does, and no others; `delay` seconds late."""

    def __init__(self) -> None:
        self.history: dict[str, Any] = {}
        self.waiting = 0
        self.delay = 0.0
        self.asked: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                place = urlparse(self.path)
                query = {name: value[0] for name, value in parse_qs(place.query).items()}
                answer: Any
                if place.path == "/history":
                    outer.asked.append(int(query["max_items"]))
                    answer = dict(list(outer.history.items())[-int(query["max_items"]) :])
                else:
                    assert (place.path, query["limit"]) == ("/api/jobs", "1")
                    total = {"in_progress": min(outer.waiting, 1), "pending": max(outer.waiting - 1, 0)}
                    answer = {"jobs": [], "pagination": {"total": total[query["status"]]}}
                time.sleep(outer.delay)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def end(self, name: str, seconds: float = 2, result: str = "success", prefix: str = "art") -> None:
        """End a job."""
        last = {"success": "success", "failed": "error", "interrupted": "interrupted"}[result]
        messages = [["execution_start", {"timestamp": 10_000}]]
        messages += [["execution_cached", {"nodes": [], "timestamp": 10_001}]]
        messages += [[f"execution_{last}", {"timestamp": 10_000 + int(seconds * 1000)}]]
        status = {"status_str": "success" if result == "success" else "error", "messages": messages}
        nodes = {"1": {"class_type": "EmptyImage"}, "2": {"inputs": {"filename_prefix": prefix}}}
        self.history[name] = {"prompt": [0, name, nodes, {}, []], "outputs": {}, "status": status}


@pytest.fixture
def stand() -> Iterator[Stand]:
    found = Stand()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.05,))
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def layout(place: Path, port: int, **more: Any) -> Layout:
    (place / "data/cache").mkdir(parents=True, exist_ok=True)
    plain = {"prefix": str(place), "service": "comfyui", "scope": "system", "user": "", "address": "", "port": port}
    return Layout(plain | more)


def at(port: int) -> Callable[[], Endpoint]:
    return lambda: Endpoint(("127.0.0.1",), port)


def jobs(stand: Stand, place: Path) -> comfyui.Jobs:
    return comfyui.Jobs(comfyui.Client(at(stand.server.server_port)), place / "data/cache/exporter.json")


def counted(found: comfyui.Jobs) -> dict[str, float]:
    found.look()
    return {sample.labels["result"]: sample.value for sample in next(iter(found.metrics())).samples}


def text(*sources: Source) -> str:
    registry = CollectorRegistry()
    registry.register(Gatherer(*sources))
    return generate_latest(registry).decode()


def test_each_job_is_counted_once_as_it_ended(stand: Stand, tmp_path: Path) -> None:
    stand.end("before")
    found = jobs(stand, tmp_path)
    assert counted(found) == {"done": 0, "failed": 0, "interrupted": 0}  # the earlier ones are not counted
    stand.end("one", 3)
    stand.end("two", 700)
    stand.end("three", result="failed")
    stand.end("four", result="interrupted")
    stand.end("proof", prefix="hearth-gate/proof")
    assert counted(found) == {"done": 2, "failed": 1, "interrupted": 1}
    assert counted(found) == {"done": 2, "failed": 1, "interrupted": 1}
    assert stand.asked[-1] == 1  # whole workflows: requests no more of them than needed
    lines = text(Source("jobs", found.look))
    assert 'hearth_job_duration_seconds_bucket{le="2.5"} 0.0' in lines
    assert 'hearth_job_duration_seconds_bucket{le="5.0"} 1.0' in lines
    assert 'hearth_job_duration_seconds_bucket{le="600.0"} 1.0' in lines
    assert "hearth_job_duration_seconds_count 2.0" in lines
    assert "hearth_job_duration_seconds_sum 703.0" in lines


def test_job_counts_persist_across_restarts(stand: Stand, tmp_path: Path) -> None:
    first = jobs(stand, tmp_path)
    counted(first)
    for name in ("one", "two"):
        stand.end(name)
    assert counted(first)["done"] == 2
    stand.end("while the exporter is not there")
    assert counted(jobs(stand, tmp_path))["done"] == 3
    stand.history.clear()  # ComfyUI restarted
    again = jobs(stand, tmp_path)
    assert counted(again)["done"] == 3
    stand.end("of the new one")
    assert counted(again)["done"] == 4
    for number in range(1000):
        stand.end(f"many {number}")
    assert counted(again)["done"] == 4 + comfyui.KNOWN
    stand.history.pop("many 999")  # manually, in the browser
    assert counted(again)["done"] == 4 + comfyui.KNOWN


def test_job_counts_continue_without_storage(stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data/cache").mkdir(parents=True)
    (tmp_path / "data/cache/exporter.json").write_text('{"known": ["one"')
    found = jobs(stand, tmp_path)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").write_text("in the way")
    counted(found)
    stand.end("one")
    assert counted(found)["done"] == 1
    assert "the counts could not be stored" in capsys.readouterr().err


def test_endless_answer_is_abandoned(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "LIMIT", 100_000)
    client = comfyui.Client(at(stand.server.server_port))
    stand.end("x" * 200_000)
    with pytest.raises(ValueError, match="longer than 100000 bytes"):
        client.get("/history?max_items=1")


@pytest.mark.parametrize("answer", [b"{}", b"[0]", b'{"":{"":0}}', b"[" * 90 + b"]" * 90, b'"\\ud83d\\ude00"', b"1.5"])
def test_answers_are_limited_in_memory(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many values as its limits allow: 9 MB of `{},` would take 240 MB when parsed."""
    raw = b""
    monkeypatch.setattr(api, "_exchange", lambda *_: raw)
    for length in (comfyui.LIMIT, comfyui.LIMIT // 3):
        raw = b"[" + b",".join([answer] * (length // (len(answer) + 1))) + b"]"
        tracemalloc.start()
        with suppress(ValueError):
            comfyui.Client(at(1)).get("/history?max_items=1")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 70_000_000


def test_large_job_does_not_block_counting(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "LIMIT", 100_000)
    found = jobs(stand, tmp_path)
    stand.end("before")
    counted(found)
    stand.end("x" * 200_000)
    with pytest.raises(ValueError, match="longer"):
        found.look()
    for name in ("one", "two"):
        stand.end(name)
    assert counted(found)["done"] == 2
    for name in ("three", "four", "five"):
        stand.end(name)
    assert counted(found)["done"] == 5


@pytest.mark.parametrize("total", ["1" + "0" * 400, "1e308", '"7"', "-3", "null", "1.5"])
def test_invalid_number_fails_only_its_source(monkeypatch: pytest.MonkeyPatch, total: str) -> None:
    monkeypatch.setattr(api, "_exchange", lambda *_: b'{"pagination":{"total":%b}}' % total.encode())
    client = comfyui.Client(at(1))
    other = GaugeMetricFamily("other", "", value=10**400)
    found = text(
        Source("comfyui", lambda: comfyui.queue(client), comfyui.down),
        Source("large", lambda: [other]),
        Source("well", lambda: [GaugeMetricFamily("well", "", value=1)]),
    )
    for name, success in (("comfyui", 0), ("large", 0), ("well", 1)):
        assert f'hearth_scrape_collector_success{{collector="{name}"}} {success}.0' in found


def test_times_and_ids_without_a_limit_are_not_kept(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = jobs(stand, tmp_path)
    counted(found)
    messages = [["execution_start", {"timestamp": 0}], ["execution_success", {"timestamp": 10**400}]]
    job = {"prompt": [1, "a", {}], "status": {"status_str": "success", "messages": messages}}
    monkeypatch.setattr(found._client, "get", lambda _: {"x" * 10_000: job, "a": job})
    assert counted(found)["done"] == 1
    assert (found._seconds, (tmp_path / "data/cache/exporter.json").stat().st_size < 2000) == (0, True)


@pytest.mark.parametrize("state", ["closed", "hangs"])
def test_metrics_do_not_wait_for_comfyui(stand: Stand, tmp_path: Path, state: str) -> None:
    stand.delay = 8
    port = stand.server.server_port if state == "hangs" else free_port()
    registry = CollectorRegistry()
    registry.register(gatherer(layout(tmp_path, port), at(port), tmp_path / "counts", cuda=False))
    started = time.monotonic()
    found = generate_latest(registry).decode()
    assert time.monotonic() - started < stand.delay
    assert "hearth_comfyui_up 0.0" in found
    assert 'hearth_jobs_total{result="done"} 0.0' in found
    assert "hearth_jobs_running" not in found
    assert 'hearth_scrape_collector_success{collector="jobs"} 0.0' in found
    assert 'hearth_scrape_collector_success{collector="memory"} 1.0' in found
    assert f'hearth_disk_available_bytes{{path="{tmp_path}"}}' in found


def test_queue_metrics(stand: Stand) -> None:
    stand.waiting = 4
    client = comfyui.Client(at(stand.server.server_port))
    found = text(Source("comfyui", lambda: comfyui.queue(client), comfyui.down))
    for line in ("hearth_comfyui_up 1.0", "hearth_jobs_running 1.0", "hearth_jobs_pending 3.0"):
        assert f"\n{line}\n" in found


def test_hanging_source_is_not_queried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.metrics.gather.PATIENCE", 0.2)
    monkeypatch.setattr("agent.metrics.gather.FRESH", 0.4)
    go_on, asked = threading.Event(), {"stuck": 0, "quick": 0}

    def stuck() -> list[Any]:
        asked["stuck"] += 1
        go_on.wait(30)
        return [GaugeMetricFamily("late", "Late.", value=1)]

    def quick() -> list[Any]:
        asked["quick"] += 1
        return [GaugeMetricFamily("prompt", "Prompt.", value=asked["quick"])]

    registry = CollectorRegistry()
    registry.register(Gatherer(Source("stuck", stuck), Source("quick", quick)))
    found: list[str] = []
    scrapes = [threading.Thread(target=lambda: found.append(generate_latest(registry).decode())) for _ in range(5)]
    for each in scrapes:
        each.start()
    for each in scrapes:
        each.join()
    assert asked == {"stuck": 1, "quick": 1}
    assert all('success{collector="stuck"} 0.0' in each and "prompt 1.0" in each for each in found)
    time.sleep(0.5)
    assert "prompt 2.0" in generate_latest(registry).decode()
    assert asked == {"stuck": 1, "quick": 2}
    go_on.set()
    time.sleep(0.5)
    assert "late 1.0" in generate_latest(registry).decode()
    assert asked == {"stuck": 2, "quick": 3}


def test_source_logs_an_error_once_and_its_recovery(capsys: pytest.CaptureFixture[str]) -> None:
    errors: list[Exception] = [ValueError("nonsense"), ValueError("nonsense")]

    def ask() -> list[Any]:
        if errors:
            raise errors.pop()
        return []

    source = Source("odd", ask)
    for _ in range(4):
        source.begin()
        source.answer(time.monotonic() + 5)
    assert capsys.readouterr().err == "odd: ValueError: nonsense\nodd: works again\n"


def test_metric_families_of_two_sources_are_merged() -> None:
    def of(path: str) -> list[Any]:
        metric = GaugeMetricFamily("room", "Room.", labels=["path"])
        metric.add_metric([path], 1)
        return [metric]

    found = text(Source("a", lambda: of("/a")), Source("b", lambda: of("/b")))
    assert found.count("# TYPE room gauge") == 1
    assert 'room{path="/a"} 1.0\nroom{path="/b"} 1.0' in found


def release(place: Path) -> Layout:
    """A prefix with a current release and a history."""
    found = layout(place, 1)
    folder = found.releases / "abc"
    folder.mkdir(parents=True)
    manifest = {"id": "abc", "version": "0.30.0", "torch": "2.11.0", "stack": "cu130", "profile": "dgx-spark"}
    manifest |= {"python": "3.12", "kernels": {"sageattention": "2.2.0", "flash-attn": "2.8.3"}}  # type: ignore[dict-item]
    manifest |= {"gate": {"attention": "sage attention"}}  # type: ignore[dict-item]
    (folder / "release.json").write_text(json.dumps(manifest))
    found.current.symlink_to("releases/abc")
    found.state.mkdir()
    return found


def test_the_release_its_gate_and_the_last_deploy(tmp_path: Path) -> None:
    found = release(tmp_path)
    told = host.Release(found)
    lines = text(Source("release", told))
    expected = 'attention="sage attention",kernels="flash-attn 2.8.3, sageattention 2.2.0",profile="dgx-spark"'
    expected += ',python="3.12",release="abc",stack="cu130",torch="2.11.0",version="0.30.0"'
    assert f"hearth_release_info{{{expected}}} 1.0" in lines
    assert "hearth_gate_success 0.0" in lines
    assert "hearth_deploy" not in lines

    (found.releases / "abc/proven").write_text('{"at": "2026-11-23T03:00:00Z"}')
    ended = {"action": "deploy", "result": "done", "at": "2026-11-23T02:00:00Z"}
    failed = {"action": "deploy", "result": "reverted", "at": "2026-11-23T04:00:00Z"}
    other = {"action": "drop caches", "result": "done", "at": "2026-11-23T05:00:00Z"}
    found.history.write_text(json.dumps(ended) + "\n")
    lines = text(Source("release", told))
    assert "hearth_gate_success 1.0" in lines
    assert "hearth_gate_timestamp_seconds 1.7954028e+09" in lines
    assert "hearth_deploy_success 1.0" in lines
    found.history.write_text("".join(json.dumps(each) + "\n" for each in (ended, failed, other)))
    lines = text(Source("release", told))
    assert "hearth_deploy_success 0.0" in lines
    assert "hearth_deploy_timestamp_seconds 1.7954064e+09" in lines

    found.current.unlink()
    assert "hearth_release_info" not in text(Source("release", told))
    found.current.symlink_to("/etc")
    assert 'success{collector="release"} 0.0' in text(Source("release", told))


GPUS = """
import sys
from pathlib import Path
from prometheus_client import CollectorRegistry, generate_latest
from agent.metrics import gather
from agent.metrics.host import Gpus
gather.FRESH = 0
registry = CollectorRegistry()
registry.register(gather.Gatherer(gather.Source("gpu", Gpus(needed={needed}))))
for recording in {recordings}:
    if recording:
        RECORDING.write_text(recording)
    else:
        RECORDING.unlink(missing_ok=True)
    print("---", generate_latest(registry).decode())
"""


def gpus(*recordings: str, needed: bool = True) -> list[str]:
    """One exporter's metrics while the driver returns these answers in turn; empty: there is no driver."""
    return nvml.python(GPUS.format(needed=needed, recordings=recordings), "").split("---")[1:]


def test_gpus_of_real_machines() -> None:
    desktop, unified, server = gpus(*map(nvml.recording, ("rtx-4070", "gb10", "h200")))
    for line in (
        'hearth_gpu_info{capability="8.9",cuda="12.2",driver="535.247.01",gpu="0",name="NVIDIA GeForce RTX 4070",'
        'unified="false",uuid="GPU-4070aaaa-0000-0000-0000-000000000000"} 1.0',
        'hearth_gpu_memory_used_bytes{gpu="0"} 3.296722944e+09',
        'hearth_gpu_utilization_ratio{gpu="0"} 0.02',
        'hearth_gpu_temperature_celsius{gpu="0"} 47.0',
        'hearth_gpu_power_watts{gpu="0"} 74.0',
        'hearth_gpu_power_limit_watts{gpu="0"} 215.0',
    ):
        assert line in desktop
    assert 'unified="true"' in unified
    assert 'hearth_gpu_memory_size_bytes{gpu="0"}' in unified
    assert "hearth_gpu_power_limit_watts" not in unified  # there is none, and none is invented
    assert server.count("# TYPE hearth_gpu_temperature_celsius gauge") == 1


def test_lost_gpu_is_queried_again() -> None:
    whole, lost = nvml.recording("rtx-4070"), nvml.recording("rtx-4070", ("fails", "0 15"))
    silent = nvml.recording("rtx-4070", *((key, "!15") for key in ("name", "uuid", "temperature")))
    found = gpus(whole, silent, lost, "", whole)
    assert ['success{collector="gpu"} 1.0' in each for each in found] == [True, True, False, False, True]
    assert ['hearth_gpu_up{gpu="0"} 1.0' in each for each in found] == [True, False, False, False, True]
    assert 'hearth_gpu_up{gpu="0"} 0.0' in found[1]
    assert ["hearth_gpu_temperature_celsius{" in each for each in found] == [True, False, False, False, True]


def test_missing_driver_is_an_error_only_if_a_gpu_is_needed() -> None:
    assert 'success{collector="gpu"} 0.0' in gpus("")[0]
    assert 'success{collector="gpu"} 1.0' in gpus("", needed=False)[0]


@contextmanager
def running(place: Path, port: int) -> Iterator[str]:
    """The exporter from the agent's archive, as a host runs it; yields its address."""
    ours = free_port()
    release(place)
    config = {"site": vars(layout(place, port, address="127.0.0.1").site), "port": ours, "cuda": False}
    (place / "exporter.json").write_text(json.dumps(config))
    words = [sys.executable, "-I", "-S", str(archive.agent_file()), "metrics", str(place / "exporter.json")]
    process = subprocess.Popen(
        words, cwd="/", env={"PATH": os.environ["PATH"], "RUNTIME_DIRECTORY": str(place)}, stderr=-3
    )
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{ours}/metrics", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{ours}/metrics"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.mark.process
@pytest.mark.needs("promtool")
def test_packed_exporter_runs_and_passes_promtool(stand: Stand, tmp_path: Path) -> None:
    with running(tmp_path, stand.server.server_port) as address, urllib.request.urlopen(address, timeout=5) as answer:
        raw = answer.read()
    assert b"hearth_comfyui_up 1.0" in raw
    assert b"process_resident_memory_bytes" in raw
    done = subprocess.run(["promtool", "check", "metrics"], input=raw, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.process
@pytest.mark.needs("promtool")
def test_alert_rules_fire_as_documented() -> None:
    for words in (
        ["check", "rules", ALERTS],
        ["test", "rules", Path(__file__).parents[1] / "fixtures/prometheus/alerts.test.yml"],
    ):
        done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_names_a_command_that_can_be_typed() -> None:
    alerts = re.split(r"\n +- alert: ", ALERTS.read_text())[1:]
    assert len(alerts) > 10
    for each in alerts:
        assert re.search(r'^ +summary: ".+"$', each, re.MULTILINE), each
        found = re.search(r'^ +next: "inv (.+)"$', each, re.MULTILINE)
        assert found, each
        words = shlex.split(found[1].replace("{{ $labels.host }}", "spark"))
        (context,) = Parser(contexts=generate.contexts().values()).parse_argv(words)
        assert context.name == words[0]


def test_dashboard_is_complete() -> None:
    dashboard = json.loads((files.CHECKOUT / "ops/grafana/hearth.json").read_text())
    panels = dashboard["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Health", "Queue and jobs", "GPU", "Disk and memory"]
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["datasource", "host"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for target in [target for panel in panels for target in panel.get("targets", ())]:
        assert 'host=~"$host"' in target["expr"]
        assert target["datasource"]["uid"] == "${datasource}"
