"""A compromised ComfyUI: whatever it answers, or if it does not, every command ends in time with an error message."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent import api
from agent.change import memory
from agent.files import AgentError
from agent.look import jobs, logs, samples, status
from agent.metrics import comfyui as metrics
from agent.schema.facts import Service
from agent.serve import health
from tests.servers import BUSY, IDLE, RUNNING, STATS, at, layout, listening

SECONDS = 0.2
"""The time-out of each request in these tests, in place of the real 2 to 60 s."""

Talk = Callable[[socket.socket], None]


def raw(content: bytes) -> Talk:
    """Sends these bytes, then closes the connection."""

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(content)
        connection.close()

    return talk


def body(content: bytes, head: bytes = b"HTTP/1.0 200 OK") -> Talk:
    return raw(head + b"\r\n\r\n" + content)


def said(**answer: Any) -> Talk:
    """Answers every path with the same JSON."""
    return body(json.dumps(answer).encode())


def without_end(first: bytes, more: bytes, pause: float = 0.01) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(more)
            time.sleep(pause)

    return talk


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n{")
    time.sleep(60)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

WAYS: dict[str, Talk] = {
    # connections
    "says nothing": lambda _: time.sleep(60),
    "hangs up": lambda connection: connection.close(),
    "resets": reset,
    "stops in the middle": half,
    # not HTTP
    "another protocol": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "bytes": raw(bytes(range(256)) * 100),
    "a status that is none": raw(b"HTTP/1.1 2x0 OK\r\n\r\n"),
    "a status of its own": raw(b"HTTP/1.1 999 \x1b]0;pwned\x07\r\n\r\n"),
    "headers without end": without_end(OK, b"X: y\r\n"),
    "one header without end": without_end(OK + b"X: ", b"y" * 1000),
    "a length that is none": raw(OK + b"Content-Length: -5\r\n\r\n{}"),
    "a length beyond all": raw(OK + b"Content-Length: 99999999999999999999\r\n\r\n{}"),
    "chunks without end": without_end(CHUNKED, b"1\r\n \r\n"),
    "a chunk that is none": raw(CHUNKED + b"zz\r\n"),
    "a chunk beyond all": without_end(CHUNKED + b"FFFFFFFFFFFF\r\n", b" " * 1000),
    "interim answers without end": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    # bodies
    "a byte now and then": without_end(OK + b"\r\n", b" ", 0.1),
    "blanks without end": without_end(OK + b"\r\n", b" " * 100_000),
    "empty": body(b""),
    "a page": body(b"<html>\x1b[2J</html>"),
    "compressed": raw(OK + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b\x08" + bytes(1000)),
    "not UTF-8": body(b'{"queue_running": ["\xff\xfe"]}'),
    "nested": body(b"[" * 100_000),
    "half a surrogate": body(
        b'{"queue_running": [[1, "\\ud800", {}, {}]], "queue_pending": [], "system": {"comfyui_version": "\\ud800"},'
        b' "devices": []}'
    ),
    "no number": body(b'{"queue_running": [[NaN, "x", {}, {"create_time": NaN}]], "queue_pending": []}'),
    "infinite": body(b'{"queue_running": [[1e999, "x", {}, {"create_time": 1e999}]], "queue_pending": []}'),
    "a number without end": body(b'{"queue_running": [[' + b"9" * 100_000 + b', "x"]], "queue_pending": []}'),
    # redirects and refusals
    "a redirect to the metadata": raw(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest\r\n\r\n"),
    "a redirect to itself": raw(b"HTTP/1.1 301 Moved\r\nLocation: /queue\r\n\r\n"),
    "a redirect to a file": raw(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/shadow\r\n\r\n"),
    "unauthorized": raw(b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm="\x1b[2J"\r\n\r\n'),
    "an error": raw(b"HTTP/1.1 500 Oops\r\n\r\n" + b"\x1b]52;c;cHduZWQ=\x07" * 100),
    # shapes
    "a list": body(b"[]"),
    "a word": body(b'"queue"'),
    "null": body(b"null"),
    "an object": said(),
    "queues that are null": said(queue_running=None, queue_pending=None, system=None, devices=None),
    "queues that are numbers": said(queue_running=[7], queue_pending=[7], system=7, devices=[7]),
    "queues that are words": said(queue_running="ab", queue_pending="ab", system="ab", devices="ab"),
    "jobs that are empty": said(queue_running=[[]], queue_pending=[[]], system={}, devices=[{}]),
    "jobs of objects": said(queue_running=[{"id": 1}], queue_pending=[{}], system=[], devices=[[]]),
    "jobs with other times": said(queue_running=[[1, "x", [], {"create_time": -(10**30)}]], queue_pending=[], **STATS),
    "a long id": said(queue_running=[[1, "x" * 1_000_000, {}, {}]], queue_pending=[], **STATS),
    "an id that steers": said(queue_running=[[1, "\x1b]52;c;x\x07\u202e\n", {}, {}]], queue_pending=[], **STATS),
    "many jobs": said(queue_running=[], queue_pending=[[n, "x", {}, {}] for n in range(20_000)], **STATS),
    "a history of its own": said(
        a={"prompt": "abc", "status": {"messages": [["execution_error", {"timestamp": "x", "exception_message": {}}]]}},
        b={"prompt": [1, 2], "status": {"messages": [["execution_start", {"timestamp": [1]}]]}},
    ),
}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.ask, "__defaults__", (None, SECONDS, 2_000_000))
    for asking in (api.queue, api.system_stats):
        monkeypatch.setattr(asking, "__defaults__", (SECONDS,))
    monkeypatch.setattr(health, "LOG_SECONDS", SECONDS)
    for module in (status, jobs, metrics):
        monkeypatch.setattr(module, "PATIENCE", SECONDS)
    monkeypatch.setattr(health, "WORKFLOW_SECONDS", SECONDS)
    monkeypatch.setattr(memory, "UNCHANGED", SECONDS)


class Unknown:
    """A process whose log cannot be read."""

    def status(self) -> Service:
        return RUNNING

    def log(self, lines: int) -> list[str]:  # noqa: ARG002
        return []


def test_hostile_answers_cover_all_endpoints() -> None:
    assert len(WAYS) >= 30


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("way", WAYS)
def test_every_request_ends_in_time(way: str, tmp_path: Path) -> None:
    """Stop, deploy, rollback, pause, remove and nuke wait for jobs (`drain`); the others request data to show."""
    with listening(WAYS[way]) as port:
        place, host = at(port), layout(tmp_path, port)
        client = metrics.Client(lambda: place)
        notes: list[str] = []
        asked: dict[str, Callable[[], object]] = {
            "drain": lambda: health.drain(place, SECONDS, False, notes.append),
            "status": lambda: status._comfyui(host),
            "jobs": lambda: jobs.jobs(host, 10),
            "free-memory": lambda: memory.free(host, SECONDS),
            "the timer": lambda: health.free_if_idle(host),
            "gpu": lambda: samples.running_job(host, SECONDS),
            "logs": lambda: list(logs._remembered(host, AgentError("log", "x"), lambda _: True)),
            "metrics": lambda: list(metrics.queue(client)),
            "counts": lambda: list(metrics.Jobs(client, tmp_path / "counts").look()),
            "gate": lambda: health._picture(place, Unknown(), "first", lambda: None, notes.append),
            "log of the gate": lambda: health.output(place, Unknown(), ""),
        }

        def answer(name: str) -> str:
            begun = time.monotonic()
            try:
                told = json.dumps(asked[name](), default=repr, allow_nan=False)
            except (OSError, ValueError) as error:
                told = str(error)
            except AgentError as error:
                told = json.dumps(error.report)
            except Exception as error:
                if name not in ("metrics", "counts"):  # the exporter handles any exception of a source
                    raise
                told = str(error)
            assert time.monotonic() - begun < 60 * SECONDS, f"{name} against {way}"
            return told

        with ThreadPoolExecutor(len(asked)) as all_at_once:
            for name, told in zip(asked, all_at_once.map(answer, asked), strict=True):
                assert "\x1b" not in told, f"{name} against {way}"
                assert "\ud800" not in told, f"{name} against {way}"
                assert len(told) < 3_000_000, f"{name} against {way}"
        assert all(len(note) < 5000 for note in notes)


@pytest.mark.parametrize("way", WAYS)
def test_force_sends_no_request(way: str) -> None:
    asked: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        asked.append(connection)
        WAYS[way](connection)

    with listening(talk) as port:
        health.drain(at(port), 60, True, lambda _: None)
    assert asked == []


def test_honest_answers_are_parsed() -> None:
    """Otherwise the other tests would pass with a parser that accepts nothing."""
    with listening(said(**IDLE, **STATS)) as port:
        health.drain(at(port), 1, False, lambda _: None)
        assert api.system_stats(at(port))["version"] == "0.30.0"
    with listening(said(**BUSY)) as port:
        assert api.queue(at(port))[0][0]["id"] == "a-job"
