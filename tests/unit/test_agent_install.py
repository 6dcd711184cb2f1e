"""The agent's own code on a host: where it is unpacked and run, and what is deleted."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from agent import install, main
from agent.files import link
from agent.layout import Layout
from deploy import archive, connection
from deploy.look import find_target
from tests.errors import raises

pytestmark = pytest.mark.process

WHERE = "import sys\nprint(f'[\"{sys.argv[0]}\"]')\n"


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """This machine's layout with a state folder, as after a deploy."""
    place = tmp_path / "prefix"
    (tmp_path / "hosts.toml").write_text(f'[hosts.local]\nprofile = "cpu"\nscope = "user"\nprefix = "{place}"\n')
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    (place / "state").mkdir(parents=True)
    return Layout(vars(find_target("local").site))


def call() -> object:
    with connection.connect(find_target("local")) as agent:
        return agent.call("history")


def unpacked(layout: Layout) -> Path:
    return layout.state / "agents" / hashlib.sha256(archive.packed_agent()).hexdigest()[:16]


def test_the_second_command_runs_the_unpacked_agent_which_has_its_bytecode(layout: Layout) -> None:
    assert call() == []
    place = unpacked(layout)
    sources = list(place.rglob("*.py"))
    assert len(sources) > 30
    assert len(list(place.rglob("*.pyc"))) == len(sources)
    assert {path.stat().st_mode & 0o777 for path in sources} == {0o644}
    (place / "__main__.py").write_text(WHERE)  # the archive and its hash are unchanged
    for path in place.glob("__pycache__/__main__*"):
        path.unlink()
    assert call() == [str(place)]


def test_nothing_is_unpacked_where_nothing_was_deployed(layout: Layout) -> None:
    layout.state.rmdir()
    assert call() == []
    assert list(layout.prefix.iterdir()) == []


@pytest.mark.parametrize("folder", [".", "state", "state/agents", "state/agents/HASH"])
def test_an_agent_that_others_could_write_is_not_run(layout: Layout, folder: str) -> None:
    assert call() == []
    (unpacked(layout) / "__main__.py").write_text(WHERE)
    for path in unpacked(layout).glob("__pycache__/__main__*"):
        path.unlink()
    place = layout.prefix / folder.replace("HASH", unpacked(layout).name)
    for mode in (0o775, 0o757):
        place.chmod(mode)
        assert call() == []
    place.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(place, 12345, 0)
        assert call() == []
        os.chown(place, 0, 0)
    assert call() == [str(unpacked(layout))]


def test_a_link_of_another_user_is_not_followed(layout: Layout) -> None:
    assert call() == []
    theirs = layout.prefix / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    unpacked(layout).rename(theirs / "agent")
    (theirs / "agent/__main__.py").write_text(WHERE)
    unpacked(layout).symlink_to(theirs / "agent")
    assert call() == []


def test_an_altered_archive_is_neither_run_nor_unpacked(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = layout.prefix / "forged"
    for content in (archive.packed_agent()[:-1], b"", b"print('[1]')"):
        forged.write_bytes(content)
        monkeypatch.setattr(archive, "agent_file", lambda: forged)
        with raises("step-failed"):
            call()
    assert list(layout.state.iterdir()) == []


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from agent import install, main
from agent.layout import Layout
import json
install.install(Layout(json.loads(sys.argv[2])))
print("done")
"""


def installing(layout: Layout) -> list[str]:
    import json

    return [sys.executable, "-c", CODE, str(archive.agent_file()), json.dumps(vars(layout.site))]


def test_killed_unpacking_leaves_a_complete_agent_or_none(layout: Layout) -> None:
    name = unpacked(layout).name
    whole = len(archive.packed_agent())
    for delay in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        process = subprocess.Popen(installing(layout), cwd="/")
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if unpacked(layout).exists():
            assert len(list(unpacked(layout).rglob("*.pyc"))) == len(list(unpacked(layout).rglob("*.py"))) > 30
        if os.path.lexists(layout.agent):
            assert layout.agent.readlink() == Path(f"agents/{name}")
            assert (layout.agent / "__main__.py").exists()
    assert subprocess.run(installing(layout), cwd="/", capture_output=True, text=True, check=True).stdout == "done\n"
    assert sum(path.stat().st_size for path in unpacked(layout).rglob("*.py")) < whole
    assert call() == []


def test_a_plan_replaces_an_agent_that_was_not_trusted(layout: Layout) -> None:
    planted = unpacked(layout) / "__main__.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(WHERE)
    subprocess.run(installing(layout), cwd="/", capture_output=True, check=True)
    assert "from agent.main import main" in planted.read_text()
    assert [path.name for path in planted.parents[1].iterdir()] == [planted.parent.name]


def test_linked_and_recent_agents_are_kept(layout: Layout) -> None:
    for name in ("unit", "release", "recent", "old", ".draft.1"):
        place = layout.state / "agents" / name
        place.mkdir(parents=True)
        if name != "recent":
            os.utime(place, (1, 1))
    link(layout.agent, "agents/unit")
    link(layout.releases / "one/agent", "../../state/agents/release")
    install.prune(layout)
    assert {path.name for path in (layout.state / "agents").iterdir()} == {"unit", "release", "recent"}


def test_every_verb_names_a_function() -> None:
    for module, name, _ in main.VERBS.values():
        assert callable(getattr(import_module(module), name))
