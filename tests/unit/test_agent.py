"""The agent's own rules, with a real uv and real wheels."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent import comfyui, journal, runs, services, steps
from agent.files import Fault, append, write
from agent.site import Site


def at(place: Path) -> Site:
    return Site({"prefix": str(place), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A wheel with these files, as small as one can be."""
    info = f"{name}-1.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1-py3-none-any.whl"
    record = f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in {**files, **meta}.items():
            archive.writestr(each, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            record += f"{each},sha256={digest},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", record)
    return path


def make(tmp_path: Path, one: dict[str, str], two: dict[str, str]) -> Path:
    """An environment of the wheels `one` and `two`, made as on a host without a network; the part."""
    site = Site({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})
    uv = shutil.which("uv")
    assert uv
    (site.state / "tools").mkdir(parents=True)
    (site.state / "tools/uv").symlink_to(uv)
    site.incoming.mkdir()
    wheels, lines = [], []
    for name, files in (("one", one), ("two", two)):
        path = wheel(tmp_path, name, files)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(site.incoming / digest)
        wheels.append({"file": path.name, "sha256": digest})
        lines.append(f"{name}==1 --hash=sha256:{digest}\n")
    step = {"part": "env-test", "python": sys.executable, "tool": "uv", "wheels": wheels, "offline": True}
    steps.env(site, {**step, "repair": False, "requirements": "".join(lines)}, lambda _: None)
    return site.parts / "env-test"


def test_packages_that_overwrite_each_others_modules_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Fault) as raised:
        make(tmp_path, {"cv2/__init__.py": "whose = 1"}, {"cv2/__init__.py": "whose = 2"})
    report = raised.value.report
    assert report["what"] == "one and two both bring cv2/__init__.py, and one has overwritten the other's"
    assert "[override.two]" in report["hint"]
    assert not list((tmp_path / "parts").iterdir())


def test_packages_that_share_what_does_no_harm_are_not(tmp_path: Path) -> None:
    shared = {"space/__init__.py": "", "LICENSE": "a"}
    one = {**shared, "space/one.py": "", "tests/__init__.py": "a = 1"}
    two = {**shared, "space/two.py": "", "tests/__init__.py": "a = 2", "LICENSE": "b"}
    place = make(tmp_path, one, two)
    assert {path.name for path in place.glob("lib/*/site-packages/space/*.py")} == {"__init__.py", "one.py", "two.py"}


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (["A", "B", "C"], ["node types that are gone: C"]),  # as an older Hearth kept them
        (
            {"A": "custom_nodes.one", "B": "comfy_extras.old", "C": "nodes"},
            ["node types that are gone: C", "node types that another node provides now: A (two, before one)"],
        ),
        ({"A": "custom_nodes.two", "B": "comfy_extras.new"}, []),
    ],
)
def test_node_types_that_are_gone_or_another_nodes_are_told(before: object, said: list[str]) -> None:
    after = {"A": "custom_nodes.two", "B": "comfy_extras.new"}
    notes: list[str] = []
    comfyui.say_changed_types({"types": before}, {"types": after}, notes.append)
    assert [note.replace("custom_nodes.", "") for note in notes] == said


def test_a_line_of_the_history_that_a_power_cut_tore_is_left_out(tmp_path: Path) -> None:
    site = at(tmp_path)
    assert journal.last(journal.history(site)) == {}
    append(site.history, {"action": "deploy", "run": "1"})
    with site.history.open("a") as file:
        file.write('{"action": "depl')
    assert journal.last(journal.history(site))["run"] == "1"
    append(site.history, {"action": "restart", "run": "3"})
    assert [each["run"] for each in journal.history(site)] == ["1", "3"]
    assert journal.last(journal.history(site), *journal.DEPLOYS)["run"] == "1"


def test_following_a_run_that_nobody_can_go_on_with_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = at(tmp_path)
    write(site.pending, json.dumps({"run": "r"}))
    started: list[Site] = []
    monkeypatch.setattr("agent.runs.time.sleep", lambda _: None)
    manager = SimpleNamespace(go=lambda: started.append(site))
    monkeypatch.setattr("agent.runs.manager_of", lambda _: manager)
    following = runs.follow(site, "r")
    assert [next(following) for _ in range(3)] == [{"event": "alive"}] * 3
    with pytest.raises(Fault, match="ends each time it is started"):
        next(following)
    assert len(started) == 3


def test_the_last_words_are_those_of_the_run_before_when_the_next_has_said_nothing_yet(tmp_path: Path) -> None:
    manager = services.Supervised(at(tmp_path))
    write(manager.output, "starting\nI am broken\n")
    write(manager.record, json.dumps({"offset": manager.output.stat().st_size}))
    assert manager.log(25) == []
    assert services.last_words(manager) == ["starting", "I am broken"]
    with manager.output.open("a") as log:
        log.write("once more\n")
    assert services.last_words(manager) == ["once more"]
