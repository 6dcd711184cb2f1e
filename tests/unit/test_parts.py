"""Parts and their stamps: large trees, few processes, and a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent import parts
from agent.files import write
from agent.layout import Layout
from agent.locks import free
from agent.look.facts import _parts
from agent.processes import wait_for
from core import files


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes forked in this test."""
    made: list[int] = []
    real = os.fork

    def fork() -> int:
        child = real()
        made.extend([child] if child else [])
        return child

    monkeypatch.setattr(os, "fork", fork)
    return made


def test_a_folder_of_more_folders_than_a_pipe_holds_has_a_stamp(tmp_path: Path) -> None:
    for number in range(1200):
        (tmp_path / str(number)).mkdir()
    # Pipes of 4 KiB hold the numbers of 1024 folders; default pipes would need 16,384.
    code = "import fcntl, os, sys; from pathlib import Path; from agent.parts import stamp\nreal = os.pipe\n"
    code += "def pipe(): ends = real(); fcntl.fcntl(ends[1], 1031, 4096); return ends  # F_SETPIPE_SZ\n"
    code += "os.pipe = pipe\nprint(stamp(Path(sys.argv[1])))"
    words = [sys.executable, "-c", code, str(tmp_path)]

    def stamp() -> str:
        return subprocess.run(words, cwd=files.CHECKOUT, capture_output=True, text=True, timeout=20, check=True).stdout

    before = stamp()
    assert stamp() == before
    (tmp_path / "1199/file").touch()
    assert stamp() != before


def test_a_small_part_needs_no_process_of_its_own(tmp_path: Path, forks: list[int]) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    before = parts.stamp(tmp_path)
    (tmp_path / "a/b/file").touch()
    assert parts.stamp(tmp_path) != before
    assert forks == []


def test_many_parts_are_verified_by_one_process(tmp_path: Path, forks: list[int]) -> None:
    layout = Layout({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})
    for number in range(30):
        with parts.part(layout, f"node-{number}") as place:
            (place / "file").write_text("as it was made")
    (layout.parts / "node-7/file").chmod(0o644)
    layout.state.mkdir()
    write(layout.state / "verified.json", '{"node-3": 1e12}')  # by a clock that has since been set back
    found = _parts(layout, 300)()
    assert {name for name, error in found.items() if error} == {"node-7"}
    assert len(found) == 30
    assert len(forks) == 1


def test_children_of_a_killed_process_release_its_lock(tmp_path: Path) -> None:
    """Its answer is longer than a pipe holds, and has no reader."""
    lock = tmp_path / "lock"
    code = "import sys, time; from pathlib import Path; from agent.locks import flock; from agent.parts import forked\n"
    code += "with flock(Path(sys.argv[1])):\n"
    code += "    both = [forked(lambda: 'x' * 1_000_000) for _ in range(2)]\n    print('begun', flush=True)\n"
    code += "    time.sleep(1000)"
    words = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(words, cwd=files.CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"begun\n"
        assert not free(lock)
        one.send_signal(signal.SIGKILL)
    assert wait_for(lambda: free(lock), 10)
