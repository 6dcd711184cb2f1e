"""What clients send to a host, by the agent as it runs there: one after the other, at once, interrupted, cleaned up."""

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
from agent.files import Fault, write
from agent.layout import Layout
from agent.locks import flock
from agent.processes import wait_for
from agent.schema.change import App, CutOver, Prune, Release, Tool, packed
from core import files

DATA = os.urandom(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
HALF = len(DATA) // 2


@pytest.fixture
def site(tmp_path: Path) -> Layout:
    return Layout({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})


class Upload:
    """A client that sends `DATA`."""

    def __init__(self, site: Layout, offset: int = 0, silence: int = 60) -> None:
        code = f"import sys; from agent import main; from agent.change import runs; runs.SILENCE = {silence}; "
        code += "sys.exit(main.main(['receive']))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=files.CHECKOUT
        )
        self.begun = time.monotonic()
        values = {"site": site.json, "sha256": DIGEST, "size": len(DATA), "offset": offset}
        self.send(json.dumps(values).encode() + b"\n")

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end(self, data: bytes = b"") -> Any:
        """Send the last of it; the answer."""
        output, _ = self.process.communicate(data, timeout=30)
        assert self.process.returncode in (0, 3)
        return json.loads(output)


def half(site: Layout, **values: Any) -> Upload:
    """An upload that has come half the way."""
    one = Upload(site, **values)
    one.send(DATA[:HALF])
    part = site.incoming / f"{DIGEST}.part"
    assert wait_for(lambda: part.exists() and part.stat().st_size == HALF, 10)
    return one


def there(site: Layout) -> list[str]:
    return sorted(path.name for path in site.incoming.iterdir())


def test_an_upload_that_was_cut_short_is_resumed(site: Layout) -> None:
    assert half(site).end() == {"size": HALF}
    assert Upload(site, HALF).end(DATA[HALF:]) == {"size": len(DATA)}
    assert there(site) == [DIGEST]
    assert (site.incoming / DIGEST).read_bytes() == DATA
    assert Upload(site).end() == {"size": len(DATA)}  # there is nothing to do
    assert there(site) == [DIGEST]


@pytest.mark.parametrize("offset", [0, HALF - 5])
def test_an_upload_that_is_silent_holds_nobody_up(site: Layout, offset: int) -> None:
    silent = half(site)
    other = Upload(site, offset)
    assert other.end(DATA[offset:]) == {"size": len(DATA)}
    assert time.monotonic() - other.begun < 10
    assert (site.incoming / DIGEST).read_bytes() == DATA
    assert there(site) == [DIGEST, f"{DIGEST}.part"]
    assert silent.end(DATA[HALF:]) == {"size": len(DATA)}  # it was only slow
    assert there(site) == [DIGEST]


def test_a_copy_that_is_cut_short_is_not_kept(site: Layout) -> None:
    silent = half(site)
    assert Upload(site, HALF).end(DATA[HALF:-1]) == {"size": len(DATA) - 1}
    assert there(site) == [f"{DIGEST}.part"]
    silent.end()


def test_an_upload_from_which_nothing_comes_ends_and_can_be_resumed(site: Layout) -> None:
    silent = half(site, silence=1)
    assert silent.process.wait(10) == 3
    assert time.monotonic() - silent.begun < 8
    assert "nothing came for 1 seconds" in silent.end()["fault"]["what"]
    assert Upload(site, HALF).end(DATA[HALF:]) == {"size": len(DATA)}


def test_a_slow_upload_is_not_taken_for_a_silent_one(site: Layout) -> None:
    slow = Upload(site, silence=1)
    for number in range(6):
        time.sleep(0.4)
        slow.send(DATA[number * 1000 : number * 1000 + 1000])
    assert slow.end(DATA[6000:]) == {"size": len(DATA)}


def test_whoever_sends_what_another_run_deletes_is_told(site: Layout) -> None:
    one = half(site)
    for path in site.incoming.iterdir():
        path.unlink()
    fault = one.end(DATA[HALF:])["fault"]
    assert (fault["what"], fault["hint"]) == ("what was sent so far was deleted", "run the same command again")
    fault = Upload(site, HALF).end(DATA[HALF:])["fault"]  # and not only when all is sent
    assert fault["what"] == "what was sent so far was deleted"
    assert Upload(site).end(DATA) == {"size": len(DATA)}


def test_what_was_sent_damaged_is_deleted(site: Layout) -> None:
    assert Upload(site).end(DATA[1:] + DATA[:1])["fault"]["what"] == "what was sent is damaged"
    assert there(site) == []


def test_pruning_deletes_what_is_used_up_or_old_and_nothing_of_another_client(site: Layout) -> None:
    site.incoming.mkdir(parents=True)
    used, young, old, ahead, busy = ("a" * 64, "b" * 64, "c" * 64, "d" * 64, f"{'e' * 64}.part")
    for name in (used, f"{used}.part", young, f"{young}.part", old, f"{old}.part", ahead, busy):
        (site.incoming / name).touch()
    day = time.time() - 25 * 3600
    for name, at in ((old, day), (f"{old}.part", day), (busy, day), (ahead, time.time() + 25 * 3600)):
        os.utime(site.incoming / name, (at, at))  # `ahead`: the clock has been set back since
    plan = {"run": "r", "steps": [{"kind": "env", "wheels": [{"file": "x.whl", "sha256": used}]}, {"kind": "prune"}]}
    write(site.pending, json.dumps(plan))
    with flock(site.incoming / busy):
        releases.prune(site, Prune("t", "w", "u", ()), lambda _: None)
    assert there(site) == [young, f"{young}.part", busy]


def test_pruning_while_a_client_sends(site: Layout) -> None:
    one = half(site)
    write(site.pending, json.dumps({"run": "r", "steps": []}))
    releases.prune(site, Prune("t", "w", "u", ()), lambda _: None)
    assert one.end(DATA[HALF:]) == {"size": len(DATA)}


REUSES = packed(App("t", "w", "u", "app-2", "python3", reuse={"a.py": "app-1/a.py"}))
WRITES = packed(Release("t", "w", "u", {"id": "two", "parts": {"app": "app-2", "env": "env-1"}}))
CUTS = packed(CutOver("t", "w", "u", 0, False, "two", "yes"))


@pytest.mark.parametrize("gone", ["", "parts/app-1", "parts/env-1", "releases/two"])
def test_a_plan_that_rests_on_what_another_run_pruned_is_refused(
    site: Layout, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one deployed, pruned and went back: what is current is as the plan expects it."""
    for name in ("parts/app-1", "parts/env-1"):
        (site.prefix / name).mkdir(parents=True)
    write(site.releases / "two/release.json", json.dumps(WRITES["release"]))
    if gone:
        remove(site.prefix / gone)
    begun: list[str] = []
    monkeypatch.setattr(sys, "argv", [__file__])  # what is kept as the agent
    monkeypatch.setattr(runs, "manager_of", lambda _: SimpleNamespace(start_apply=lambda: begun.append("")))
    steps = [CUTS] if gone.startswith("releases") else [REUSES, WRITES, CUTS]
    plan = {"run": "r", "who": "a@b", "action": "deploy", "release": "two", "base": "", "steps": steps}
    if not gone:
        assert runs.submit(site, plan) == {"run": "r"}
        return
    with pytest.raises(Fault) as caught:
        runs.submit(site, plan)
    assert caught.value.report["kind"] == "busy"
    assert not begun and not site.pending.exists()


def test_a_tool_is_on_the_disk_before_it_has_its_name(site: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut in a first deploy left uv's file empty, and the host trusted its name ever after."""
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()))
    write(site.incoming / DIGEST, DATA)
    synced.clear()
    trees.tool(site, Tool("t", "w", "u", "uv-1", DIGEST), print)
    tool = site.state / "tools/uv-1"
    assert [each.parent for each in synced] == [tool.parent, tool.parent.parent]
    assert tool.read_bytes() == DATA
    assert os.access(tool, os.X_OK)
