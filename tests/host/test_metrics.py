"""Metrics of the real machine and the real ComfyUI, scraped by Debian's prometheus, with a fake NVML."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from core import files
from tests.host.fleet import Fleet, taken_port
from tests.host.machine import free_port
from tests.host.test_doctor import findings, only
from tests.host.test_gpu import driver

pytestmark = [pytest.mark.host, pytest.mark.needs("prometheus")]

UNIT = "comfyui-exporter"
ALERTS = files.CHECKOUT / "ops/prometheus/alerts.yml"
DASHBOARD = files.CHECKOUT / "ops/grafana/hearth.json"


class Prometheus:
    """Debian's prometheus; scrapes one exporter each second, as in docs/how-to/metrics.md."""

    def __init__(self, fleet: Fleet, target: int) -> None:
        self.place = fleet.place / "prometheus"
        self.place.mkdir()
        self.port = free_port()
        (self.place / "prometheus.yml").write_text(
            f"global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [{ALERTS}]\n"
            "scrape_configs:\n  - job_name: hearth\n    static_configs:\n"
            f'      - {{ targets: ["127.0.0.1:{target}"], labels: {{ host: spark }} }}\n'
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        words = ["prometheus", f"--config.file={self.place}/prometheus.yml", f"--storage.tsdb.path={self.place}/data"]
        words += [f"--web.listen-address=127.0.0.1:{self.port}"]
        with (self.place / "log").open("wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 30
            while True:
                assert process.poll() is None, (self.place / "log").read_text()
                try:
                    self.query("up")
                    break
                except OSError:
                    assert time.monotonic() < end, (self.place / "log").read_text()
                    time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait()

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Any]:
        found = self.ask(f"query?{urllib.parse.urlencode({'query': expression})}")["result"]
        assert isinstance(found, list)
        return found

    def value(self, expression: str, wanted: float, within: float = 20) -> None:
        """Wait until the only matching series has that value."""
        end = time.monotonic() + within
        while [float(each["value"][1]) for each in self.query(expression)] != [wanted]:
            assert time.monotonic() < end, (expression, self.query(expression))
            time.sleep(0.2)


@pytest.fixture
def metrics(steady: Fleet) -> Iterator[tuple[Fleet, int]]:
    """The machine with an exporter, and its port; `steady` removes the exporter afterwards."""
    port = free_port()
    steady.configure(f"metrics_port = {port}\n")
    done = steady.deploy()
    assert done.returncode == 0, done.stderr
    yield steady, port
    steady.configure()
    gone = steady.deploy()
    assert gone.returncode == 0, gone.stderr
    assert steady.machine.run(f"systemctl is-active {UNIT} || true").strip() == "inactive"
    assert list((steady.machine.root / "etc/systemd/system").glob(f"**/{UNIT}*")) == []
    assert list((steady.prefix / "state").glob("exporter*")) == []
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def kill(fleet: Fleet, signal: str, unit: str) -> None:
    fleet.machine.run(f"kill -{signal} $(systemctl show {unit} --property=MainPID --value)")


def submit(fleet: Fleet, prefix: str) -> str:
    """Submit a job that writes a picture, if permitted; returns its id after it ends."""
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": time.time_ns() % (1 << 24)}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }
    address = f"http://127.0.0.1:{fleet.machine.port}/prompt"
    body = json.dumps({"prompt": workflow}).encode()
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=10) as answer:
        name = str(json.load(answer)["prompt_id"])
    end = time.monotonic() + 30
    while not fleet.ask(f"/history/{name}"):
        assert time.monotonic() < end
        time.sleep(0.1)
    return name


def expressions() -> list[str]:
    """Every expression of the dashboard, for this host."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [each.replace("$host", "spark").replace("$__rate_interval", "1m") for each in found]


def test_prometheus_finds_all_that_the_dashboard_and_the_alerts_name(metrics: tuple[Fleet, int]) -> None:
    fleet, port = metrics
    machine = fleet.machine
    again = fleet.deploy("--dry-run")
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr
    shown = machine.run(f"systemd-analyze security {UNIT} --no-pager")
    exposure = re.search(r"exposure level for comfyui-exporter.service: ([\d.]+)", shown)
    assert exposure
    assert float(exposure[1]) <= 2.0
    assert machine.run(f"ps -o user= -p $(systemctl show {UNIT} -p MainPID --value)").strip() not in ("comfyui", "root")
    prometheus = Prometheus(fleet, port)
    with driver(fleet, "rtx-4070"), prometheus.running():
        prometheus.value("hearth_comfyui_up", 1)
        for _ in range(3):
            submit(fleet, "metrics/one")
        submit(fleet, "../../metrics")  # ComfyUI rejects that when it runs
        prometheus.value('hearth_jobs_total{result="done"}', 3)
        prometheus.value('hearth_jobs_total{result="failed"}', 1)
        prometheus.value("hearth_job_duration_seconds_count", 3)

        asked = " ".join(expressions()) + re.sub(r"#.*", "", ALERTS.read_text())
        named = set(re.findall(r"\b(hearth_\w+|up(?=\{))", asked))
        assert len(named) > 25
        assert {name for name in named if not prometheus.query(name)} == set()
        for each in expressions():
            prometheus.query(each)  # raises for an invalid expression
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        end = time.monotonic() + 20
        while {rule["health"] for rule in rules} != {"ok"}:
            assert time.monotonic() < end, rules
            time.sleep(0.5)
            rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]

        assert "exporter" not in findings(fleet, code=1)
        machine.run(f"systemctl stop {UNIT}")
        what, remedy = only(findings(fleet, code=1), "exporter")
        assert what == f"the exporter is not running: no process listens on port {port}"
        machine.run(remedy.partition("then ")[2])
        prometheus.value("up", 1)

        (release,) = prometheus.query("hearth_release_info")
        assert (release["metric"]["release"], release["metric"]["version"]) == (fleet.current(), "0.30.0")
        for name, wanted in (("gate_success", 1), ("deploy_success", 1), ("service_active", 1), ("gpu_up", 1)):
            prometheus.value(f"hearth_{name}", wanted)
        assert prometheus.query("hearth_scrape_collector_success == 0") == []
        (resident,) = prometheus.query("hearth_service_process_resident_memory_bytes")
        assert float(resident["value"][1]) > 100e6  # torch is in it
        told = scrape(port)
        page = (files.CHECKOUT / "docs/how-to/metrics.md").read_text()
        exported = set(re.findall(r"^# TYPE (hearth_\w+)", told, re.MULTILINE))
        documented = set(re.findall(r"`(hearth_\w+)`", page))
        assert {name for name in exported if not name.startswith("hearth_service_process_")} == documented
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=told, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")

        # ComfyUI restarts and loses its state; systemd restarts it automatically and counts that.
        kill(fleet, "KILL", "comfyui")
        prometheus.value("hearth_service_restarts_total", 1)
        assert fleet.answers()
        prometheus.value("hearth_comfyui_up", 1)
        submit(fleet, "metrics/two")
        prometheus.value('hearth_jobs_total{result="done"}', 4)
        kill(fleet, "KILL", UNIT)
        prometheus.value("up", 0)
        submit(fleet, "metrics/three")
        prometheus.value("up", 1)
        prometheus.value('hearth_jobs_total{result="done"}', 5)
        prometheus.value('hearth_jobs_total{result="failed"}', 1)
    machine.run("rm -r /opt/comfyui/data/output/metrics")


def test_metrics_report_a_hung_comfyui_in_time(metrics: tuple[Fleet, int]) -> None:
    fleet, port = metrics
    assert "hearth_comfyui_up 1.0" in scrape(port)
    time.sleep(1.1)  # an answer is cached for a second
    kill(fleet, "STOP", "comfyui")
    try:
        started = time.monotonic()
        found = scrape(port)
        assert time.monotonic() - started < 10
    finally:
        kill(fleet, "CONT", "comfyui")
    for line in ("hearth_comfyui_up 0.0", "hearth_service_active 1.0", "hearth_gate_success 1.0"):
        assert line in found
    assert "hearth_disk_available_bytes{" in found
    assert fleet.answers()

    with taken_port(fleet.machine) as (held, holder):
        fleet.configure(f"metrics_port = {held}\n")
        refused = fleet.deploy()
    fleet.configure(f"metrics_port = {port}\n")
    assert refused.returncode == 63, refused.stderr
    assert f"port {held} is in use by python3 -m http.server (pid {holder})" in refused.stderr
    assert "`metrics_port`" in refused.stderr


def pid(fleet: Fleet, unit: str) -> str:
    return fleet.machine.run(f"systemctl show {unit} --property=MainPID --value").strip()


def test_exporter_changes_separately_and_rolls_back(metrics: tuple[Fleet, int]) -> None:
    fleet, port = metrics
    before = {unit: pid(fleet, unit) for unit in ("comfyui", UNIT)}
    release = fleet.current()
    unit = fleet.machine.root / f"etc/systemd/system/{UNIT}.service"
    unit.write_text(unit.read_text() + "# edited\n")
    done = fleet.deploy()
    assert done.returncode == 0, done.stderr
    assert "its unit changed" in done.stdout + done.stderr
    assert "edited" not in unit.read_text()
    assert (fleet.current(), pid(fleet, "comfyui")) == (release, before["comfyui"])
    assert pid(fleet, UNIT) != before[UNIT]
    assert "hearth_comfyui_up 1.0" in scrape(port)

    held = free_port()
    hook = fleet.machine.root / f"etc/systemd/system/{UNIT}.service.d/break.conf"
    hook.parent.mkdir()
    # only the new port's unit fails: the previous one starts again
    hook.write_text(f"[Service]\nExecStartPre=/bin/sh -c '! grep -q {held} /opt/comfyui/state/exporter.json'\n")
    try:
        fleet.configure(f"metrics_port = {held}\n")
        failed = fleet.deploy()
        assert failed.returncode != 0
        assert "the previous one is restored" in failed.stderr, failed.stderr
        assert "hearth_comfyui_up 1.0" in scrape(port)
        assert (fleet.current(), pid(fleet, "comfyui")) == (release, before["comfyui"])
        assert not (fleet.prefix / "state/exporter-before.json").exists()
    finally:
        shutil.rmtree(hook.parent)
        fleet.machine.run("systemctl daemon-reload")
        fleet.configure(f"metrics_port = {port}\n")
    again = fleet.deploy("--dry-run")
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr
