"""Atomic creation of files and folders, also by threads of one process; and the files of a tree."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core import files
from kernels import toolchain
from tests.errors import raises


def test_threads_make_the_same_folder_in_turn(tmp_path: Path) -> None:
    def make(number: int) -> None:
        with files.atomic_dir(tmp_path / "made") as part:
            (part / "by").write_text(str(number))
            time.sleep(0.01)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made/by").read_text() in "01234567"


def test_a_body_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), files.atomic_dir(tmp_path / "made") as part:
        (part / "half").write_text("")
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".made.999999999").mkdir()
    with files.atomic_dir(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_leftover_of_the_same_process_id_does_not_block(tmp_path: Path) -> None:
    """In a container, every run has the same process id."""
    for name in ("made", "file"):
        (tmp_path / f".{name}.{os.getpid()}").mkdir()
        (tmp_path / f".{name}.{os.getpid()}/half").touch()
    with files.atomic_dir(tmp_path / "made"):
        pass
    files.write(tmp_path / "file", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "made"]


HOLD = """
import sys, time
from pathlib import Path
from core import files
with files.atomic_dir(Path(sys.argv[1])) as part:
    (part / "half").touch()
    print(part, flush=True)
    time.sleep(60)
"""


def test_drafts_live_as_long_as_their_process(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path / "made")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=files.CHECKOUT) as other:
        assert other.stdout
        part = Path(other.stdout.readline().strip())
        (tmp_path / "made").mkdir()  # a request for it now sweeps, and creates nothing
        with files.atomic_dir(tmp_path / "made"):
            pass
        assert (part / "half").exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
    with files.atomic_dir(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.process
def test_concurrent_processes_keep_each_others_drafts(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from core import files\n"
        "for number in range(40):\n"
        "    with files.draft(Path(sys.argv[1])) as part:\n"
        "        part.write_text('x'); assert part.read_text() == 'x'; part.replace(sys.argv[1])"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "it")]
    running = [subprocess.Popen(words, cwd=files.CHECKOUT) for _ in range(4)]
    assert [each.wait() for each in running] == [0, 0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_links_of_processes_with_the_same_id_replace_each_other(tmp_path: Path) -> None:
    """Threads stand for containers here, in which all process ids are the same."""
    targets = [Path(f"target{number}") for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda target: toolchain._link(tmp_path / "link", target), targets))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    assert (tmp_path / "link").readlink() in targets


def test_special_files_and_outside_links_are_refused(tmp_path: Path) -> None:
    outside, root = tmp_path / "secret", tmp_path / "tree"
    outside.write_text("PRIVATE")
    root.mkdir()
    (root / "a.py").write_text("x")
    (root / "same.py").symlink_to("a.py")
    assert [name for name, _ in files.tree(root)] == ["a.py", "same.py"]
    odd = root / "sub/odd"
    odd.parent.mkdir()
    listening = socket.socket(socket.AF_UNIX)
    makers: tuple[Callable[[], object], ...] = (
        lambda: odd.symlink_to(outside),
        lambda: odd.symlink_to("/"),
        lambda: odd.symlink_to(root),
        lambda: odd.symlink_to("nothing"),
        lambda: os.mkfifo(odd),
        lambda: listening.bind(str(odd)),
    )
    with listening:
        for maker in makers:
            maker()
            for read in (files.tree, files.tree_hash):
                with raises("unsafe-tree", match=r"sub/odd is a (link to|device, pipe or socket)"):
                    read(root)
            odd.unlink()
    (root / os.fsdecode(b"caf\xe9")).touch()
    with raises("unsafe-tree", match=r"caf.*xe9' is not UTF-8"):
        files.tree_hash(root)
