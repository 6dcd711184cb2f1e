"""Uploads to a host, received by the real agent: in turn, concurrent, interrupted, cleaned up."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.change import releases, runs, trees
from agent.deletion import remove
from agent.files import AgentError, write
from agent.layout import Layout
from agent.locks import flock
from agent.processes import wait_for
from agent.schema.change import App, CutOver, Prune, Release, Tool, packed
from agent.schema.manifest import ReleaseManifest
from core import files

pytestmark = pytest.mark.process

DATA = os.urandom(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
HALF = len(DATA) // 2


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})


class Upload:
    """A client that sends `DATA`."""

    def __init__(self, layout: Layout, offset: int = 0, silence: int = 60) -> None:
        code = f"import sys; from agent import main; from agent.change import runs; runs.SILENCE = {silence}; "
        code += "sys.exit(main.main(['receive']))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=files.CHECKOUT
        )
        self.begun = time.monotonic()
        values = {"site": vars(layout.site), "sha256": DIGEST, "size": len(DATA), "offset": offset}
        self.send(json.dumps(values).encode() + b"\n")

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end(self, data: bytes = b"") -> Any:
        """Send the rest; returns the answer."""
        output, _ = self.process.communicate(data, timeout=30)
        assert self.process.returncode in (0, 3)
        return json.loads(output)


def half(layout: Layout, **values: Any) -> Upload:
    """An upload at its half."""
    one = Upload(layout, **values)
    one.send(DATA[:HALF])
    part = layout.incoming / f"{DIGEST}.part"
    assert wait_for(lambda: part.exists() and part.stat().st_size == HALF, 10)
    return one


def there(layout: Layout) -> list[str]:
    return sorted(path.name for path in layout.incoming.iterdir())


def test_interrupted_upload_is_resumed(layout: Layout) -> None:
    assert half(layout).end() == {"size": HALF}
    assert Upload(layout, HALF).end(DATA[HALF:]) == {"size": len(DATA)}
    assert there(layout) == [DIGEST]
    assert (layout.incoming / DIGEST).read_bytes() == DATA
    assert Upload(layout).end() == {"size": len(DATA)}  # nothing to do
    assert there(layout) == [DIGEST]


@pytest.mark.parametrize("offset", [0, HALF - 5])
def test_silent_upload_blocks_no_other(layout: Layout, offset: int) -> None:
    silent = half(layout)
    other = Upload(layout, offset)
    assert other.end(DATA[offset:]) == {"size": len(DATA)}
    assert time.monotonic() - other.begun < 10
    assert (layout.incoming / DIGEST).read_bytes() == DATA
    assert there(layout) == [DIGEST, f"{DIGEST}.part"]
    assert silent.end(DATA[HALF:]) == {"size": len(DATA)}  # only slow
    assert there(layout) == [DIGEST]


def test_truncated_copy_is_deleted(layout: Layout) -> None:
    silent = half(layout)
    assert Upload(layout, HALF).end(DATA[HALF:-1]) == {"size": len(DATA) - 1}
    assert there(layout) == [f"{DIGEST}.part"]
    silent.end()


def test_silent_upload_ends_and_can_be_resumed(layout: Layout) -> None:
    silent = half(layout, silence=1)
    assert silent.process.wait(10) == 3
    assert time.monotonic() - silent.begun < 8
    assert "no data arrived for 1 seconds" in silent.end()["error"]["what"]
    assert Upload(layout, HALF).end(DATA[HALF:]) == {"size": len(DATA)}


def test_a_slow_upload_is_not_taken_for_a_silent_one(layout: Layout) -> None:
    slow = Upload(layout, silence=1)
    for number in range(6):
        time.sleep(0.4)
        slow.send(DATA[number * 1000 : number * 1000 + 1000])
    assert slow.end(DATA[6000:]) == {"size": len(DATA)}


def test_deleted_upload_is_an_error(layout: Layout) -> None:
    one = half(layout)
    for path in layout.incoming.iterdir():
        path.unlink()
    error = one.end(DATA[HALF:])["error"]
    assert (error["what"], error["hint"]) == ("the partly transferred file was deleted", "run the same command again")
    error = Upload(layout, HALF).end(DATA[HALF:])["error"]  # and not only at its end
    assert error["what"] == "the partly transferred file was deleted"
    assert Upload(layout).end(DATA) == {"size": len(DATA)}


def test_damaged_upload_is_deleted(layout: Layout) -> None:
    assert Upload(layout).end(DATA[1:] + DATA[:1])["error"]["what"] == "the file was damaged during the transfer"
    assert there(layout) == []


def test_pruning_keeps_uploads_of_other_clients(layout: Layout) -> None:
    layout.incoming.mkdir(parents=True)
    used, young, old, ahead, busy = ("a" * 64, "b" * 64, "c" * 64, "d" * 64, f"{'e' * 64}.part")
    for name in (used, f"{used}.part", young, f"{young}.part", old, f"{old}.part", ahead, busy):
        (layout.incoming / name).touch()
    day = time.time() - 25 * 3600
    for name, at in ((old, day), (f"{old}.part", day), (busy, day), (ahead, time.time() + 25 * 3600)):
        os.utime(layout.incoming / name, (at, at))  # `ahead`: the clock was set back since
    plan = {"run": "r", "steps": [{"kind": "env", "wheels": [{"file": "x.whl", "sha256": used}]}, {"kind": "prune"}]}
    write(layout.pending, json.dumps(plan))
    with flock(layout.incoming / busy):
        releases.prune(layout, Prune("t", "w", "u", ()), lambda _: None)
    assert there(layout) == [young, f"{young}.part", busy]


def test_pruning_while_a_client_sends(layout: Layout) -> None:
    one = half(layout)
    write(layout.pending, json.dumps({"run": "r", "steps": []}))
    releases.prune(layout, Prune("t", "w", "u", ()), lambda _: None)
    assert one.end(DATA[HALF:]) == {"size": len(DATA)}


REUSES = packed(App("t", "w", "u", "app-2", "python3", reuse={"a.py": "app-1/a.py"}))
WRITES = packed(Release("t", "w", "u", ReleaseManifest(id="two", parts={"app": "app-2", "env": "env-1"})))
CUTS = packed(CutOver("t", "w", "u", 0, False, "two", "yes"))


@pytest.mark.parametrize("gone", ["", "parts/app-1", "parts/env-1", "releases/two"])
def test_plan_with_pruned_files_is_refused(layout: Layout, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run deployed, pruned and rolled back: the current release is the one that the plan expects."""
    for name in ("parts/app-1", "parts/env-1"):
        (layout.prefix / name).mkdir(parents=True)
    write(layout.releases / "two/release.json", json.dumps(WRITES["release"]))
    if gone:
        remove(layout.prefix / gone)
    begun: list[str] = []
    monkeypatch.setattr(sys, "argv", [__file__])  # what is kept as the agent
    monkeypatch.setattr(runs, "manager_of", lambda _: SimpleNamespace(start_apply=lambda: begun.append("")))
    steps = [CUTS] if gone.startswith("releases") else [REUSES, WRITES, CUTS]
    plan = {"run": "r", "who": "a@b", "action": "deploy", "release": "two", "base": "", "steps": steps}
    if not gone:
        runs.submit(layout, plan)
        return
    with pytest.raises(AgentError) as caught:
        runs.submit(layout, plan)
    assert caught.value.report["kind"] == "busy"
    assert not begun and not layout.pending.exists()


def test_tool_is_synced_before_its_rename(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut in a first deploy left uv's file empty, and the host then trusted its name."""
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()))
    write(layout.incoming / DIGEST, DATA)
    synced.clear()
    trees.tool(layout, Tool("t", "w", "u", "uv-1", DIGEST), print)
    tool = layout.state / "tools/uv-1"
    assert [each.parent for each in synced] == [tool.parent, tool.parent.parent]
    assert tool.read_bytes() == DATA
    assert os.access(tool, os.X_OK)
