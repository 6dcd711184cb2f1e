"""Types may be used by several threads for the first time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from core import files

CODE = """
import sys, threading
from dataclasses import make_dataclass
from core.typed import convert

sys.setswitchinterval(1e-6)
for _ in range(300):
    inner = make_dataclass("Inner", [("a", dict[str, list[int]]), ("b", tuple[str, ...])])
    outer = make_dataclass("Outer", [("first", inner), ("others", list[inner]), ("last", inner | None)])
    one = {"a": {"x": [1]}, "b": ["y"]}
    plain = {"first": one, "others": [one], "last": one}
    ready, answers = threading.Barrier(6), []

    def ask():
        ready.wait()
        answers.append(convert(plain, outer))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for each in threads: each.start()
    for each in threads: each.join()
    assert len(answers) == 6 and answers == [convert(plain, outer)] * 6
"""


@pytest.mark.process
def test_threads_may_be_the_first_to_use_a_type() -> None:
    """As when several hosts are asked for their status. With msgspec.convert, nearly every such process crashes."""
    done = subprocess.run([sys.executable, "-c", CODE], cwd=files.CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
