"""The only module that writes to the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import TextIO


_speaker: ContextVar[str] = ContextVar("speaker", default="")


@contextmanager
def speaking(name: str) -> Iterator[None]:
    """Prefix every line of `say` in this context with `name: `, to distinguish the lines of several hosts."""
    token = _speaker.set(f"{name}: ")
    try:
        yield
    finally:
        _speaker.reset(token)


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Control strings up to their terminator on the same line: OSC, DCS, SOS, PM, APC (ECMA-48, 8.3).
_STRINGS = re.compile(
    r"(?:\x1b\]|\x9d)[^\x00-\x1f\x7f-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x00-\x1f\x7f-\x9f]*(?:\x1b\\|\x9c)"
)
# C0 and C1 controls, marks of text direction (Unicode TR 9), and invisible characters.
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)


def printable(text: str, *, colours: bool = False) -> str:
    """Return text without terminal control sequences: hosts, repositories, jobs and file names supply parts of it.

    Tabs and line feeds are kept, and with `colours` also colours, which are reset at the end. A lone surrogate, as in a
    file name that is not UTF-8, becomes an escape. The printable part of an unterminated sequence is kept: dropping it
    would swallow our own text after it.
    """
    pieces = _COLOUR.split(text)
    kept = _COLOUR.findall(text) if colours else [""] * (len(pieces) - 1)
    first, *rest = (_STEERING.sub("", _STRINGS.sub("", piece)) for piece in pieces)
    whole = first + "".join(colour + piece for colour, piece in zip(kept, rest, strict=True))
    return (f"{whole}\x1b[0m" if any(kept) else whole).encode(errors="backslashreplace").decode()


def line(text: str) -> str:
    """Return printable text on one line, so that untrusted text cannot start a line that looks like ours."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _write(text: str, file: TextIO, end: str = "\n") -> None:
    """Write printable text; characters missing from the terminal's encoding become escapes."""
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, file=file, flush=True)


def say(text: str) -> None:
    """Write a message (stderr)."""
    prefix = _speaker.get()
    _write("\n".join(f"{prefix}{line}" for line in printable(text).splitlines()), sys.stderr)


def confirm(question: str) -> bool | None:
    """Ask a yes-or-no question; None without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    _write(printable(f"{question} [y/N] "), sys.stderr, end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def confirm_name(question: str, name: str) -> bool:
    """Ask the user to type `name`; False without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    _write(printable(f"{question} "), sys.stderr, end="")
    return sys.stdin.readline().strip() == name


def hidden(question: str) -> str:
    """Read a line from the terminal without echoing it; raises EOFError."""
    from getpass import getpass

    return getpass(printable(question))


def guard() -> None:
    """Route Python's own output through `say`: warnings and uncaught errors."""
    import threading
    import traceback
    import warnings

    def report(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, trace)))

    def report_thread(event: threading.ExceptHookArgs) -> None:
        if event.exc_type is not SystemExit:
            report(event.exc_type, event.exc_value, event.exc_traceback)

    if threading.excepthook is threading.__excepthook__:  # otherwise pytest collects them
        threading.excepthook = report_thread
        sys.unraisablehook = lambda event: report(event.exc_type, event.exc_value, event.exc_traceback)
    sys.excepthook = report
    warnings.showwarning = lambda message, kind, *_: say(f"{kind.__name__}: {message}")


def coloured() -> bool:
    """Whether stdout is a terminal and NO_COLOR is not set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def unread() -> bool:
    """Whether the reader of stdout has closed it, as `| head` does; checks without writing."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def data(text: str, *, colours: bool = False) -> None:
    """Write a line of a stream, or a whole document (stdout); with `colours`, a terminal shows its colours."""
    _write(printable(text, colours=colours and coloured()), sys.stdout)


def show(value: Any, rows: Iterable[str], *, as_json: bool) -> None:
    """Write a result (stdout): with `as_json` the value as JSON, otherwise its rows, one line each.

    `value` is a msgspec struct, a dataclass, or a container of them. `rows` are lines; `table` makes aligned ones. No
    row can span two lines or control the terminal.
    """
    if as_json:
        data_json(value)
    else:
        for row in rows:
            data(line(row))


def data_json(value: Any) -> None:
    """Write a result as JSON (stdout)."""
    import msgspec  # slow to import

    data(json.dumps(msgspec.to_builtins(value), indent=2, sort_keys=True))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table. All columns but the last are padded; a line break in a cell becomes a space."""
    lines = [[" ".join(printable(cell).split("\n")) for cell in row] for row in (headings, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:-1], widths[:-1], strict=True)), line[-1]]).rstrip()
        for line in lines
    ]


def refreshed(lines: Callable[[], Iterable[str]], seconds: float) -> None:
    """Write lines every `seconds` (stdout) until Ctrl-C: in place on a terminal, otherwise one after another."""
    if not sys.stdout.isatty():
        while True:
            for line in lines():
                data(line)
            data("")
            time.sleep(seconds)
    from rich.live import Live
    from rich.text import Text

    def seen() -> Text:
        return Text("\n".join(printable(each) for each in lines()))

    with Live(seen(), screen=False, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(seen(), refresh=True)


class Progress:
    """Progress over steps of unequal length: a bar on a terminal, otherwise a line per step.

    `total` and the weight of a step share a unit: expected seconds of work for compile steps.
    """

    def __init__(self, title: str, total: float, count: int) -> None:
        self._title = printable(title)
        self._total = max(total, 1e-9)
        self._count = count
        self._done = 0.0
        self._steps = 0
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, state=f"0/{self._count}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, weight: float) -> None:
        """Record a part of a step: moves the bar, and writes nothing without a terminal."""
        self._done += weight
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def step(self, name: str, weight: float, running: int) -> None:
        """Record a finished step; `running` other steps are under way."""
        self._steps += 1
        self._done += weight
        spent = time.monotonic() - self._started
        left = spent * (self._total - self._done) / self._done if self._done else 0.0
        state = f"{self._steps}/{self._count}, {running} running, {clock(left)} left"
        if self._bar is None:
            say(f"[{state}] {name}")
        else:
            self._bar.update(self._task, completed=self._done, state=state)


def counted(number: int, noun: str) -> str:
    """Format a number of things: `1 file`, `2 files`, `3 repositories`."""
    if number == 1:
        return f"1 {noun}"
    stem = f"{noun[:-1]}ie" if noun.endswith("y") else noun
    return f"{number} {stem}{'es' if stem.endswith(('s', 'x', 'ch')) else 's'}"


def clock(seconds: float) -> str:
    """Format a duration in seconds: `8 s`, `2 min 00 s`, `1 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def age(seconds: float) -> str:
    """Format a duration in seconds, in its largest whole unit: `40 s`, `12 min`, `5 h`, `9 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def size(number: float) -> str:
    """Format a number of bytes: `999 B`, `6.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
