"""Files that change together: old or new, never mixed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from core import files, workspace
from lock.updates import transaction
from lock.updates.transaction import Change, Record
from tests.errors import raises
from tests.upstream import Checkout

CODE = Path(__file__).parents[2]
OLD_FILES = {**dict.fromkeys("abc", "old"), "gone": "old"}
NEW_FILES = {**dict.fromkeys("abc", "new"), "fresh": "new"}


def record(root: Path) -> Record:
    names = sorted({*OLD_FILES, *NEW_FILES})
    return Record({str(root / name): Change(OLD_FILES.get(name), NEW_FILES.get(name)) for name in names})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "checkout"
    made.mkdir()
    reset(made)
    monkeypatch.setattr(files, "CHECKOUT", made)
    return made


def reset(root: Path) -> None:
    for name in NEW_FILES:
        (root / name).unlink(missing_ok=True)
    for name, text in OLD_FILES.items():
        (root / name).write_text(text)


def present(root: Path) -> dict[str, str]:
    """The files that people see; drafts of killed runs are hidden."""
    return {each.name: each.read_text() for each in root.iterdir() if each.is_file()}


KILL = """
import json, os, sys
from pathlib import Path
from core import files
files.CHECKOUT = root = Path(sys.argv[1])
from lock.updates import transaction
from tests.kills import killer
from tests.unit.test_transaction import present, record, reset

def change():
    with transaction.changing():
        transaction.switch(record(root))

def killed_at(calls):
    counted = killer(calls)
    Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)
    change() if sys.argv[2] == "do" else transaction.undo()
    os._exit(0)

for count in range(100):
    reset(root)
    if sys.argv[2] == "undo":
        change()
    child = os.fork() or killed_at(count)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = present(root)
    transaction.complete()
    names = sorted(each.name for each in (root / ".update").iterdir() if each.is_file())
    print(json.dumps([status, left, present(root), names]))
    if status != -9:
        break
"""


@pytest.mark.process
@pytest.mark.parametrize("verb", ["do", "undo"])
def test_a_killed_change_is_old_or_new(root: Path, verb: str) -> None:
    before, after = (OLD_FILES, NEW_FILES) if verb == "do" else (NEW_FILES, OLD_FILES)
    words = [sys.executable, "-c", KILL, str(root), verb]
    done = subprocess.run(words, cwd=CODE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for status, *_ in runs] == [-9] * (len(runs) - 1) + [0]
    assert any(left not in (before, after) for _, left, *_ in runs)
    first = next(index for index, (_, _, completed, _) in enumerate(runs) if completed == after)
    assert 0 < first < len(runs) - len(NEW_FILES)
    assert [completed for _, _, completed, _ in runs] == [before] * first + [after] * (len(runs) - first)
    kept = {True: ["last.json", "lock", "read.lock"], False: ["lock", "read.lock"]}
    assert all(names == kept[completed == NEW_FILES] for _, _, completed, names in runs)


def test_a_full_disk_leaves_the_old_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, writes = files.write, 0
    total = len(NEW_FILES) + 1  # and the record

    def write(path: Path, content: str | bytes) -> None:
        nonlocal writes
        writes += 1
        if writes > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    monkeypatch.setattr(files, "write", write)
    for allowed in range(total):  # noqa: B007  `write` reads it
        writes = 0
        with pytest.raises(OSError, match="No space"), transaction.changing():
            transaction.switch(record(root))
        transaction.complete()
        assert present(root) == OLD_FILES
        assert [each.name for each in root.iterdir() if each.is_dir()] == [".update"]
    writes, allowed = 0, total
    with transaction.changing():
        transaction.switch(record(root))
    assert present(root) == NEW_FILES


def test_edits_of_an_interrupted_change_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "sync", stop)
        with pytest.raises(KeyboardInterrupt), transaction.changing():
            transaction.switch(record(root))
    (root / "b").write_text("mine")
    for completing in (transaction.complete, transaction.reading().__enter__):
        with raises("refused") as raised:
            completing()
        assert raised.value.cause.splitlines()[-2:] == ["-old", "+mine"]
        assert (root / "b").read_text() == "mine"
    (root / "b").write_text("old")
    with transaction.reading():
        assert present(root) == NEW_FILES


def test_two_changes_take_turns(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor() as pool, transaction.changing():
        running = pool.submit(change, root)
        while "another update is running" not in (said := capsys.readouterr().err):
            assert not said
            time.sleep(0.01)
        assert present(root) == OLD_FILES
        (root / "a").write_text("mine")
    with raises("refused") as raised:
        running.result()
    assert "+mine" in raised.value.cause
    assert present(root) == {**OLD_FILES, "a": "mine"}


def said(wanted: str, running: Future[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Wait until another thread has said this."""
    text = ""
    while wanted not in text:
        assert not running.done(), running.result()
        text += capsys.readouterr().err
        time.sleep(0.01)


def test_a_change_waits_for_all_that_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor() as pool, transaction.reading():
        with transaction.reading():
            running = pool.submit(change, root)
            said("is reading these files", running, capsys)
        time.sleep(0.05)
        assert present(root) == OLD_FILES
    running.result()
    assert present(root) == NEW_FILES


def test_readers_wait_for_a_change_that_is_being_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    halfway, go_on, replace = Event(), Event(), Path.replace

    def slowly(path: Path, target: Path) -> Path:
        made = replace(path, target)
        if target == root / "b":
            halfway.set()
            go_on.wait(60)
        return made

    def read() -> dict[str, str]:
        with transaction.reading():
            return present(root)

    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:
        patch.setattr(Path, "replace", slowly)
        writing = pool.submit(change, root)
        assert halfway.wait(60)
        assert present(root) not in (OLD_FILES, NEW_FILES)
        reading = pool.submit(read)
        said("another update is running", reading, capsys)
        go_on.set()
        writing.result()
        assert reading.result() == NEW_FILES


def change(root: Path) -> None:
    with transaction.changing():
        transaction.switch(record(root))


def test_texts_are_exact(root: Path) -> None:
    """Line ends come back as they were."""
    (root / "a").write_bytes(b"old\r\n")
    change = Record({str(root / "a"): Change("old\r\n", "new\n")})
    with transaction.changing():
        transaction.switch(change)
    transaction.undo()
    assert (root / "a").read_bytes() == b"old\r\n"


@pytest.mark.installer
def test_a_copy_of_the_checkout_with_a_change(own: Checkout) -> None:
    before, gone = own.texts(), own.file("recipes/comfyui/app.toml")
    fresh = own.file("recipes/comfyui/versions/1/app.toml")
    changes = {str(gone): Change("", None), str(fresh): Change(None, "new")}
    with transaction.applied(Record(changes)):
        copy = workspace.current().checkout
        assert (copy / "recipes/comfyui/versions/1/app.toml").read_text() == "new"
        assert not (copy / "recipes/comfyui/app.toml").exists()
        assert (copy / "config/stacks.toml").read_text() == before["config/stacks.toml"]
    assert (own.texts(), copy.exists()) == (before, False)
