"""Terminal output: escaping, and numbers in readable form."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable

import pytest

from agent.schema.change import Erase
from agent.schema.live import Job, LogLine
from core import console, files
from core.console import age, clock, counted, printable, size
from core.errors import ConnectError
from deploy import change, fleet, outcome
from deploy.change import Outcome
from deploy.plan import Plan
from lock.updates import node_updates
from lock.updates.node_updates import Change
from ops import doctor, jobs, logs, status


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (4000, "1 h 06 min")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (6273566, "6.3 MB"), (5.7e9, "5.7 GB"), (5e12, "5000.0 GB")]
)
def test_size(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "file", "0 files"),
        (1, "file", "1 file"),
        (2, "node type", "2 node types"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (3, "repository", "3 repositories"),
    ],
)
def test_counted(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0 s"), (59.9, "59 s"), (3599, "59 min"), (90000, "1 d")])
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("text", "coloured", "plain"),
    [
        ("plain", "plain", "plain"),
        ("\x1b[32mgreen\x1b[0m and not", "\x1b[32mgreen\x1b[0m and not\x1b[0m", "green and not"),
        ("a\x1b]0;title\x07b\x1b[2Jc\x9be\x08f", "ab[2Jcef", "ab[2Jcef"),
        ("a\x1bP1q\x1b\\b\x9dx\x9cc\x1b]d\ne\x07f", "abc]d\nef", "abc]d\nef"),
        ("a\x1b[1mb\x1b]8;;http://x\x1b\\c", "a\x1b[1mbc\x1b[0m", "abc"),
        ("tab\tand ü and 絵", "tab\tand ü and 絵", "tab\tand ü and 絵"),
        ("photo\u202egnp.exe", "photognp.exe", "photognp.exe"),
        (os.fsdecode(b"na\xefve"), "na\\udcefve", "na\\udcefve"),
    ],
)
def test_only_colour_sequences_are_kept(text: str, coloured: str, plain: str) -> None:
    assert printable(text, colours=True) == coloured
    assert printable(text) == plain


ALPHABET = [
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u00ad\u180e\u200b\u2060\u206a\ufeff\ufff9\U000e0041\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\udc80\ud800",
    *(
        "\x1b[",
        "\x1b]",
        "\x1bP",
        "\x1b_",
        "\x1b^",
        "\x1bX",
        "[31m",
        "52;c;",
        "\x1b\\",
        "[red]",
        "m",
        "0",
        ";",
        "ü",
        "絵",
        " ",
        "x",
    ),
]


def writers() -> list[Callable[[str], object]]:
    return [
        console.say,
        console.data,
        lambda text: console.data(text, colours=True),
        lambda text: console.show([], [text], as_json=False),
        lambda text: console.show({text: text}, [], as_json=True),
        lambda text: console.show([], console.table([text, "b"], [[text, text]]), as_json=False),
        lambda text: console.confirm(text),
        lambda text: console.confirm_name(text, "word"),
        lambda text: console.Progress(text, 1, 1).step(text, 1, 1),
    ]


def test_own_text_survives_hostile_values() -> None:
    chance = random.Random(seed := random.randrange(10**6))
    for _ in range(5000):
        hostile = "".join(chance.choices(ALPHABET, k=chance.randrange(1, 12)))
        for before, after in (("ab ", " cd"), ("next: ", "next: inv\nerror"), ("", "Hearth"), ("1\n", "\n(of 2)")):
            shown = printable(before + hostile + after)
            assert shown.startswith(before), (seed, hostile, shown)
            assert shown.endswith(after), (seed, hostile, shown)
            within = console.line(hostile)
            assert within.isprintable(), (seed, hostile, within)
            assert printable(before + within + after) == before + within + after


def test_hostile_value_does_not_break_a_line() -> None:
    assert console.line("\x1b[31mred\x1b[0m\r\n\tforged\x1b]0;t\x07\x1b]") == "red\\n\\tforged]"


def test_long_texts_are_made_printable_in_time() -> None:
    for piece in ("\x9d", "\x1b]", "\x1b[", "\x1b[0", "\x90x", "\x1b]x\x07"):
        begun = time.process_time()
        console.line(piece * 300_000)
        assert time.process_time() - begun < 10


def test_python_output_is_guarded() -> None:
    code = """
import sys, threading, warnings
from core import console, files
console.guard()
class Dies:
    def __del__(self): raise ValueError("\\x1b]0;d\\x07")
warnings.warn("\\x1b]0;w\\x07")
thread = threading.Thread(target=lambda: 1 / len("\\x1b]0;t\\x07"[9:])); thread.start(); thread.join()
Dies()
raise ValueError("\\x1b]0;x\\x07 seen")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=files.CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "UserWarning" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert done.stderr.endswith("ValueError:  seen\n")
    assert done.stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_are_removed(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
    """For any text from a host, a repository or a file name, and every way to write text."""
    written = io.BytesIO()
    chance = random.Random(seed := random.randrange(10**6))
    for name, encoding in (("stdout", "utf-8"), ("stderr", "ascii")):
        stream = io.TextIOWrapper(written, encoding, write_through=True)
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: terminal})())
    for _ in range(300):
        text = "".join(chance.choices(ALPHABET, k=chance.randrange(1, 30)))
        for write in writers():
            written.truncate(0)
            written.seek(0)
            write(text)
            shown = written.getvalue().decode()
            plain = re.sub(r"\x1b\[[0-9;]*m", "", shown) if terminal else shown
            bad = [
                each for each in plain if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp") and each not in "\t\n"
            ]
            assert not bad, (seed, text, shown)


def test_a_cell_does_not_break_its_line() -> None:
    rows = console.table(["id", "state"], [["one\nforged  well", "failed"]])
    assert rows == ["id                state", "one forged  well  failed"]


def test_a_result_is_json_or_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Change("node", "a", "b", ("one",), (), ())]
    console.show(found, ["a\nrow"], as_json=False)
    assert capsys.readouterr() == ("a\\nrow\n", "")
    console.show(found, ["a row"], as_json=True)
    out, err = capsys.readouterr()
    assert (json.loads(out)[0]["commits"], err) == (["one"], "")


FORGED = "x\n  error: forged\x1b]\nnext: inv nuke"


def test_lines_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    """Text from a host, a repository or a job stays on its own line."""
    one: fleet.Answer[status.Status] = fleet.Answer("box", None, ConnectError("unreachable", FORGED, hint=FORGED))
    job = Job(FORGED, FORGED, 1, node=FORGED, node_type=FORGED, error=FORGED)
    console.show([], status.rows([one]), as_json=False)
    console.show([], jobs.rows({"box": [job]}), as_json=False)
    findings = [doctor.Finding("box", "nodes", "error", FORGED, FORGED)]
    console.show(findings, doctor.rows(["box"], findings), as_json=False)
    changes = [Change("n", "a" * 40, "b" * 40, (FORGED,), (FORGED,), (FORGED,), (FORGED,), FORGED)]
    console.show(changes, node_updates.rows(changes), as_json=False)
    outcomes = [Outcome("box", "r", "", True, state=FORGED)]
    console.show(outcomes, outcome.rows(outcomes, dry_run=False), as_json=False)
    change.show(Plan("", "r", (Erase(FORGED, FORGED, ""),), notes=(FORGED,)))
    logs._print([LogLine(FORGED), LogLine(note=FORGED)], "box", alone=True, as_json=False)
    said = capsys.readouterr()
    assert "forged" in said.out
    assert "forged" in said.err
    for each in (*said.out.splitlines(), *said.err.splitlines()):
        assert not each.strip().startswith(("error: forged", "next: inv nuke")), each
