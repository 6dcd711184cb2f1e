"""ComfyUI's log, streamed: the journal if systemd runs it, else the supervisor's file."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from agent.api import ask, checked, endpoint
from agent.files import AgentError, Json
from agent.layout import Layout
from agent.processes import LOG_BYTES
from agent.schema.live import LogLine
from agent.schema.requests import LogQuery
from agent.serve.managers import manager_of
from agent.serve.supervised import Supervised
from agent.serve.systemd import Systemd, login

ALIVE = 5.0
"""Seconds between keep-alives of a quiet stream: only a write detects that the client is gone."""

LONGEST = 100_000
"""Maximum length of a line in bytes: the writer may never end it."""

Match = Callable[[str], bool]


def logs(layout: Layout, asked: LogQuery) -> Iterator[LogLine]:
    """Yield the log, oldest first, and notes on it. Raises AgentError if the log cannot be read."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that journalctl is ended, too
    try:
        wanted = re.compile(asked.grep)
    except re.error as error:
        raise AgentError("usage", f"--grep {asked.grep} is not a regular expression", str(error)) from None
    manager = manager_of(layout)

    def match(text: str) -> bool:
        return bool(wanted.search(re.sub(r"\x1b\[[0-9;]*m", "", text)))

    lines = _journal(manager, asked, match) if isinstance(manager, Systemd) else _file(manager, asked, match)
    printed = False
    for each in lines:
        printed = printed or each.text is not None
        yield each
    if not printed:
        yield LogLine(note=_silence(manager, asked))


def _shown(raw: bytes) -> str:
    """Return a line as a terminal shows it: progress bars overwrite themselves."""
    return raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]


def moment(text: str, now: float) -> float:
    """Parse a time in journalctl's syntax to seconds since 1970; local time by default. Raises ValueError."""
    units = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
    units |= {"d": 86400, "day": 86400, "w": 604800, "week": 604800}
    today = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
    words = {"now": now, "today": today.timestamp(), "yesterday": (today - timedelta(days=1)).timestamp()}
    plain = text.strip()
    if plain in words:
        return words[plain]
    if back := re.fullmatch(r"(-?)(\d+) ?([a-z]+?)s?( ago)?", plain):
        if not (back[1] or back[4]) or (back[3] or "s") not in units:
            raise ValueError(text)
        return now - int(back[2]) * units[back[3] or "s"]
    if re.fullmatch(r"\d\d:\d\d(:\d\d)?", plain):
        plain = f"{today.date()} {plain}"
    return datetime.fromisoformat(re.sub(r"Z$", "+00:00", plain)).timestamp()


def _silence(manager: Systemd | Supervised, asked: LogQuery) -> str:
    """Explain why there is no output."""
    since = f" since {asked.since}" if asked.since else ""
    if asked.grep:
        return f"no line matches{since}"
    if isinstance(manager, Supervised):
        return (
            f"nothing was logged{since}" if manager.output.exists() else "there is no log: ComfyUI has never run here"
        )
    with suppress(StopIteration, AgentError):
        first = next(_entries(["journalctl", "--quiet", "--output=json", "--output-fields=MESSAGE"]))
        begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_at(first)))
        return f"the journal has no line of {manager.unit}{since}. It begins at {begin}; older lines were rotated away"
    return "the journal is empty: journald does not store it, or its disk is full"


# --- the journal ---------------------------------------------------------------------------------------------------


def _journal(manager: Systemd, asked: LogQuery, match: Match) -> Iterator[LogLine]:
    who = "--user-unit" if manager.layout.scope == "user" else "--unit"
    words = ["journalctl", "--quiet", "--no-pager", "--output=json", "--all"]  # all: long lines and colours, too
    words += [f"{who}={unit}" for unit in (manager.unit, manager.storage)]
    since = _since(asked.since)
    cursor, last = "", asked.lines
    try:
        if last is None:
            for entry in _entries([*words, *since]):
                cursor = entry["__CURSOR"]
                yield from _line(entry, match)
        else:
            found: list[LogLine] = []
            for entry in _entries([*words, *since, "--reverse"]):
                cursor = cursor or entry["__CURSOR"]
                if len(found) >= last:
                    break
                found += _line(entry, match)
            yield from reversed(found)
    except AgentError as error:
        if error.report["kind"] != "log":
            raise
        yield from _remembered(manager.layout, error, match)
        return
    if asked.follow:
        place = ["--no-tail", f"--after-cursor={cursor}"] if cursor else ["--lines=0"]
        for each in _entries([*words, "--follow", *place], ALIVE):
            yield from _line(each, match) if each else [LogLine()]


def _since(text: str) -> list[str]:
    """Return journalctl's --since flag. Older versions of journalctl do not accept ISO times with a T or Z."""
    if not text:
        return []
    try:
        return [f"--since=@{int(moment(text, time.time()))}"]
    except ValueError:
        return [f"--since={text}"]


def _line(entry: Json, match: Match) -> list[LogLine]:
    """Return a journal entry as a line if it matches; journalctl encodes text that is not printable as bytes."""
    message = entry.get("MESSAGE") or ""
    text = _shown(bytes(message) if isinstance(message, list) else message.encode())
    return [LogLine(text, _at(entry))] if match(text) else []


def _at(entry: Json) -> float:
    return int(entry["__REALTIME_TIMESTAMP"]) / 1e6


def _entries(words: list[str], alive: float | None = None) -> Iterator[Json]:
    """Yield journalctl's entries, and an empty one after `alive` seconds without any. Raises AgentError if it fails."""
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
        except OSError as error:
            raise AgentError("log", "journalctl could not be run", str(error)) from error
        assert process.stdout is not None
        rest = b""
        try:
            while True:
                if not select.select([process.stdout], [], [], alive)[0]:
                    yield {}
                    continue
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield json.loads(line)
                if not chunk:
                    break
        finally:
            process.stdout.close()
            if process.poll() is None:
                process.terminate()
            process.wait()
        stderr.seek(0)
        why = stderr.read().decode(errors="replace").strip()
        if process.returncode:
            raise _error(why)


def _error(why: str) -> AgentError:
    if "timestamp" in why:
        return AgentError(
            "usage",
            "journalctl does not accept the time of --since",
            why,
            "use a time such as '2026-11-23 14:00' or '1h ago'",
        )
    hint = f"on the host, as root: usermod --append --groups systemd-journal {login()}; then log in again"
    return AgentError("log", f"{login()} cannot read the journal", why, hint)


def _remembered(layout: Layout, error: AgentError, match: Match) -> Iterator[LogLine]:
    """Yield the last 300 writes from ComfyUI's memory if the journal is not readable. Raises `error` on failure."""
    try:
        found = ask(endpoint(layout), "/internal/logs/raw", limit=LOG_BYTES)
        remembered = checked("its log", found, lambda log: "".join(str(each["m"]) for each in log["entries"]))
    except (OSError, ValueError):
        raise error from None
    memory = "these are the lines that ComfyUI keeps in memory"
    yield LogLine(note=f"{error.report['what']}; {memory}. {error.report['hint']}")
    for line in remembered.splitlines():
        if match(line):
            yield LogLine(line)


# --- the supervisor's file -----------------------------------------------------------------------------------------


def _file(manager: Supervised, asked: LogQuery, match: Match) -> Iterator[LogLine]:
    older = manager.output.with_name(f"{manager.output.name}.1")
    places = [(older, 0), (manager.output, 0)]
    if asked.since:
        try:
            at = moment(asked.since, time.time())
        except ValueError:
            what = f"--since {asked.since} is not a supported time"
            raise AgentError(
                "usage", what, "", "use a time such as '2026-11-23 14:00', '10 min ago' or yesterday"
            ) from None
        marks = [_mark(manager.times.with_name(f"{manager.times.name}.1"), at), _mark(manager.times, at)]
        if marks[1] is not None:
            places = [(manager.output, marks[1])]
        elif marks[0] is not None:
            places = [(older, marks[0]), (manager.output, 0)]
        yield LogLine(note="the lines have no times; the output can begin up to five seconds early")
    read = 0

    def written() -> Iterator[LogLine]:
        nonlocal read
        for path, offset in places:
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(offset)
                for raw in iter(lambda file=file: file.readline(LONGEST), b""):  # type: ignore[misc]
                    if match(text := _shown(raw)):
                        yield LogLine(text)
                read = file.tell()

    yield from written() if asked.lines is None else deque(written(), maxlen=asked.lines)
    if asked.follow:
        for text in _grown(manager.output, read):
            if text is None or match(text):
                yield LogLine(text)


def _mark(times: Path, at: float) -> int | None:
    """Return the log's size in bytes at a time; None if no mark is that old."""
    with suppress(OSError):
        marks = [line.split() for line in times.read_text().splitlines()]
        past = [int(size) for when, size in (each for each in marks if len(each) == 2) if float(when) <= at]
        return past[-1] if past else None
    return None


def _grown(path: Path, read: int) -> Iterator[str | None]:
    """Follow a log from byte `read` on, across rotation; yield its lines, and None as keep-alive."""
    rest, last = b"", time.monotonic()
    while True:
        chunk = b""
        with suppress(FileNotFoundError), path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < read:
                read, rest = 0, b""
            file.seek(read)
            if chunk := file.read(LONGEST):
                read += len(chunk)
                *whole, rest = (rest + chunk).split(b"\n")
                if len(rest) > LONGEST:
                    whole, rest = [*whole, rest], b""
                yield from map(_shown, whole)
                last = time.monotonic()
        if time.monotonic() - last > ALIVE:
            yield None
            last = time.monotonic()
        time.sleep(0.0 if chunk else 0.2)
