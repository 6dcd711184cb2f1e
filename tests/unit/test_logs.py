"""The log and the jobs: the requests, the permitted terminal output, and the supervisor's log file."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.files import AgentError
from agent.layout import Layout
from agent.look import jobs as agent_jobs
from agent.look import logs as agent_logs
from agent.schema.live import Job, LogLine
from agent.schema.requests import LogQuery
from agent.serve.supervised import Supervised
from core.errors import ConnectError
from deploy import fleet
from ops import jobs, logs
from tests.errors import raises

NOW = time.mktime((2026, 11, 23, 14, 30, 0, 0, 0, -1))


def own(place: Path, port: int = 1) -> Layout:
    (place / "state").mkdir(exist_ok=True)
    (place / "state/enabled").touch()  # so that it is the supervisor's on every test machine
    return Layout({"prefix": str(place), "service": "s", "scope": "user", "user": "", "address": "", "port": port})


def read(layout: Layout, **asked: Any) -> Iterator[LogLine]:
    return agent_logs.logs(layout, LogQuery(**{"lines": 100, **asked}))


def texts(layout: Layout, **asked: Any) -> list[str]:
    return [each.text for each in read(layout, **asked) if each.text is not None]


def test_log_request_fields() -> None:
    assert logs.query("", "", "", follow=True) == LogQuery(100, follow=True)
    assert logs.query("", "yesterday", "", follow=False).lines is None
    assert logs.query("7", "yesterday", "", follow=False).lines == 7
    with raises("usage", match="--lines must be"):
        logs.query("-1", "", "", follow=False)
    with raises("usage", match=r"--grep \( is not a regular expression"):
        logs.query("", "", "(", follow=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("now", 0), ("10 min ago", 600), ("10min ago", 600), ("-10min", 600), ("1 hour ago", 3600), ("2h ago", 7200),
        ("3 days ago", 3 * 86400), ("1week ago", 604800), ("today", 14.5 * 3600), ("yesterday", 38.5 * 3600),
        ("14:00", 1800), ("13:29:59", 3601), ("2026-11-23 14:00", 1800), ("2026-11-23", 14.5 * 3600),
        (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW)), 0),
    ],
)  # fmt: skip
def test_times(text: str, seconds: float) -> None:
    assert agent_logs.moment(text, NOW) == NOW - seconds


@pytest.mark.parametrize("text", ["foo", "10 min", "10 parsecs ago", "25:00", "2026-13-01", ""])
def test_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        agent_logs.moment(text, NOW)


def test_the_last_lines_come_from_both_files_with_progress_bars_as_they_ended(tmp_path: Path) -> None:
    layout = own(tmp_path)
    (layout.state / "comfyui.log.1").write_text("one\n\x1b[31mtwo\x1b[0m\n")
    (layout.state / "comfyui.log").write_bytes(b"  0%|  |\r 50%|# |\r100%|##|\nthree \xff\nfour")
    assert texts(layout) == ["one", "\x1b[31mtwo\x1b[0m", "100%|##|", "three \ufffd", "four"]
    assert texts(layout, lines=2) == ["three \ufffd", "four"]
    assert texts(layout, grep="^t", lines=1) == ["three \ufffd"]
    assert texts(layout, grep="^two$") == ["\x1b[31mtwo\x1b[0m"]  # the visible text, not the coloured one
    assert list(read(layout, grep="five")) == [LogLine(note="no line matches")]


def test_a_line_without_an_end_comes_in_pieces(tmp_path: Path) -> None:
    layout = own(tmp_path)
    with (layout.state / "comfyui.log").open("wb") as file:
        file.write(b"\n" * 10_000 + b"x" * 10 * agent_logs.LONGEST)
    assert [len(each) for each in texts(layout, lines=3)] == [agent_logs.LONGEST] * 3
    grown = agent_logs._grown(layout.state / "comfyui.log", 10_000)
    assert len(next(grown) or "") <= 2 * agent_logs.LONGEST


def test_empty_log_has_a_reason(tmp_path: Path) -> None:
    assert list(read(own(tmp_path))) == [LogLine(note="there is no log: ComfyUI has never run here")]
    (tmp_path / "state/comfyui.log").touch()
    assert list(read(own(tmp_path))) == [LogLine(note="nothing was logged")]


def test_since_uses_the_supervisors_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = own(tmp_path)
    manager = Supervised(layout)
    log = layout.state / "comfyui.log"
    for at, line in ((1000, "old\n"), (1003, "too soon to be noted\n"), (2000, "new\n"), (2100, "")):
        with log.open("a") as file:
            file.write(line)
        monkeypatch.setattr(time, "time", lambda at=at: float(at))
        manager.note_log_offset()
    assert (layout.state / "comfyui.times").read_text() == f"1000 4\n2000 {log.stat().st_size}\n"
    monkeypatch.setattr(time, "time", lambda: 3000.0)
    assert texts(layout, since="2500 s ago", lines=None) == ["old", "too soon to be noted", "new"]
    assert texts(layout, since="1500 s ago", lines=None) == ["too soon to be noted", "new"]
    assert texts(layout, since="10 s ago", lines=None) == []
    with pytest.raises(AgentError, match="--since then is not a supported time"):
        list(read(layout, since="then"))
    monkeypatch.setattr("agent.serve.supervised.LONG", 10)
    manager.rotate()
    assert sorted(path.name for path in layout.state.glob("comfyui.*")) == ["comfyui.log.1", "comfyui.times.1"]
    log.write_text("newest\n")
    assert texts(layout, since="1500 s ago", lines=None) == ["too soon to be noted", "new", "newest"]


def test_following_continues_after_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = own(tmp_path)
    log = layout.state / "comfyui.log"
    log.write_text("before\nlast\n")
    monkeypatch.setattr(agent_logs, "ALIVE", 0.3)
    lines = read(layout, follow=True, lines=1, grep="^[^x]")
    assert next(lines).text == "last"
    with log.open("a") as file:
        file.write("grown\nxx\nhal")
    assert next(lines).text == "grown"
    with log.open("a") as file:
        file.write("f\n")
    assert next(lines).text == "half"
    assert next(lines) == LogLine()
    log.rename(log.with_name("comfyui.log.1"))
    log.write_text("anew\n")
    assert next(each for each in lines if each.text is not None).text == "anew"
    lines.close()  # type: ignore[attr-defined]  # it is a generator


# --- jobs ----------------------------------------------------------------------------------------------------------

PROMPT = [3, "0f5c", {"1": {}, "2": {}}, {"create_time": 1795404759013}, ["2"]]


def over(status: str, *messages: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """An entry of /history as ComfyUI 0.30.0 returns it."""
    said = [["execution_start", {"prompt_id": "0f5c", "timestamp": 1795404760000}], *map(list, messages)]
    return {"prompt": PROMPT, "outputs": {}, "status": {"status_str": status, "completed": True, "messages": said}}


def test_how_jobs_ended() -> None:
    cached = ("execution_cached", {"nodes": ["1"], "timestamp": 1795404760001})
    done = agent_jobs._over("an id", over("success", cached, ("execution_success", {"timestamp": 1795404762500})))
    assert done == Job("0f5c", "success", 2, queued=1795404759.013, started=1795404760.0, seconds=2.5, cached=1)
    error = {"node_id": "2", "node_type": "KSampler", "exception_type": "RuntimeError", "timestamp": 1795404761000}
    failed = agent_jobs._over(
        "an id", over("error", ("execution_error", {**error, "exception_message": "no\x1b[2J room\n"}))
    )
    assert (failed.status, failed.node, failed.node_type) == ("error", "2", "KSampler")
    assert failed.error == "RuntimeError: no [2J room"
    stopped = {"node_id": "1", "node_type": "Wait", "timestamp": 1795404761000}
    assert agent_jobs._over("an id", over("error", ("execution_interrupted", stopped))).status == "interrupted"
    assert agent_jobs._over("an id", {"prompt": PROMPT, "outputs": {}, "status": None}).status == "unknown"


def test_jobs_are_shown_in_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Job(
        "0f5c1234-5678", "error", 12, 1.0, 2.0, 3700.0, 3, "2", "KSampler", "OutOfMemoryError: \x1b[2Jno\n room " * 20
    )
    told = [failed, Job("77", "running", 2, 5.0), Job("78", "pending", 2)]
    said = "\n".join(jobs.rows({"spark": told}))
    assert all(len(line) <= 100 for line in said.splitlines())
    assert "\x1b" not in said
    assert "0f5c1234: node 2 (KSampler): OutOfMemoryError: [2Jno room" in said
    assert "1 h 01 min" in said
    off = fleet.Answer[list[Job]]("off", None, ConnectError("unreachable", "off cannot be reached"))
    answers = [fleet.Answer("spark", [failed]), off]
    assert fleet.code(answers) == 1
    (shown,) = jobs.summary(fleet.collect(answers))
    assert (shown["host"], shown["error"]) == ("spark", failed.error)
    assert "off: off cannot be reached" in capsys.readouterr().err
    with raises("unreachable"):
        fleet.collect([off])


def test_hanging_and_stopped_comfyui_have_different_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_jobs, "PATIENCE", 0.3)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        layout = own(tmp_path, listening.getsockname()[1])
        started = time.monotonic()
        with pytest.raises(AgentError, match="accepts connections but does not answer"):
            agent_jobs.jobs(layout, 20)
        assert time.monotonic() - started < 15
    with pytest.raises(AgentError, match="ComfyUI is not running"):
        agent_jobs.jobs(layout, 20)


def test_invalid_number_of_jobs_is_refused() -> None:
    for count in ("0", "x", "-3"):
        with raises("usage", match="--number must be"):
            jobs.recent(["local"], count, ask_sudo=False)
