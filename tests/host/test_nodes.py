"""Custom nodes on a real host: real git repositories, imported by the real ComfyUI."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core import files, source
from lock import nodes, requirements
from lock.application import application
from tests.errors import kind_of
from tests.host.fleet import Fleet
from tests.host.small import small

pytestmark = pytest.mark.host

GOOD = """\
import json, pathlib
place = pathlib.Path(__file__).parent
with open(place / "count.json", "w") as file:
    json.dump({"started": True}, file)
(place / "presets" / "own.txt").write_text("mine")
NODE_CLASS_MAPPINGS = {}
for name in WHICH:
    NODE_CLASS_MAPPINGS[name] = type(name, (), {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {}}), "RETURN_TYPES": (),
        "FUNCTION": "run", "CATEGORY": "test",
    })
"""


EAGER = """\
import json, pathlib, subprocess, sys
tried = {}
for line in LINES:
    try:
        done = subprocess.run(line.replace("PYTHON", sys.executable).split(), capture_output=True, text=True)
        tried[line] = done.stdout + done.stderr
    except OSError as error:
        tried[line] = error.strerror
pathlib.Path(__file__).with_name("count.json").write_text(json.dumps(tried))
NODE_CLASS_MAPPINGS = {}
"""

INSTALLERS = {
    "usr/bin/git": "git clone x",
    "usr/bin/pip": "pip install x",
    "usr/bin/pip3": "pip3 install x",
    "usr/local/bin/uv": "uv pip install x",
    "usr/lib/python3/dist-packages/pip/__main__.py": "/usr/bin/python3 -m pip install x",
    "usr/lib/python3.11/ensurepip/__main__.py": "PYTHON -m ensurepip",
}
"""Programs and modules on the host, each with the command that finds it there."""


@dataclass
class Garden:
    """A folder with an app.toml, a nodes.toml and locks, and the nodes' repositories."""

    folder: Path
    fleet: Fleet
    app: Path = field(default_factory=lambda: source.fetch(application()))

    def __post_init__(self) -> None:
        self.folder.mkdir()
        text = (files.CHECKOUT / "recipes/comfyui/app.toml").read_text().partition("[[source]]")[0]
        text = re.sub(r"paths = \[.*?\]\n", "", text, flags=re.DOTALL)
        (self.folder / "app.toml").write_text(f'{text}[[source]]\nfolder = "src"\n')
        (self.folder / "src").symlink_to(self.app)

    def commit(self, name: str, code: str) -> str:
        """Commit this code to the node's repository; returns the table that pins it."""
        place = self.folder / "upstream" / name
        (place / "presets").mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text(code)
        (place / "presets/shipped.txt").write_text("as it came")
        (place / "requirements.txt").write_text("torch==1.0\npackaging\n")
        git = ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "one"]):
            subprocess.run([*git, *words], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        names = [str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
        tree = files.tree_hash(place, [each for each in names if not each.startswith(".git/")])
        return (
            f'[nodes.{name}]\nurl = "file://{place}"\ncommit = "{head}"\ntree = "{tree}"\nwhy = "a test"\n'
            'writable = ["count.json", "presets/"]\n'
        )

    def write(self, *tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """List these nodes. The locks are the recipe's, with all their requirements, marked as these nodes'."""
        (self.folder / "nodes.toml").write_text("\n".join(tables))
        monkeypatch.setenv("HEARTH_APP", str(self.folder))
        marked = f"and nodes {requirements.nodes_hash(nodes.catalogue())};"
        (self.folder / "locks").mkdir(exist_ok=True)
        for path in (files.CHECKOUT / "recipes/comfyui/locks").glob("*.txt"):
            text = re.sub(r"and nodes \w+;", marked, path.read_text(), count=1)
            (self.folder / "locks" / path.name).write_text(text)

    def deploy(self, *wanted: str, trial: bool = False) -> subprocess.CompletedProcess[str]:
        self.fleet.configure(f"[hosts.spark.override]\nnodes = {json.dumps(wanted)}\n")
        return self.inv("deploy", *([] if trial else ["--no-trial"]))

    def inv(self, task: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self.fleet.inv(task, "--host", "spark", *words, HEARTH_APP=str(self.folder))


@pytest.fixture
def garden(steady: Fleet, tmp_path: Path) -> Iterator[Garden]:
    yield Garden(tmp_path / "garden", steady)
    steady.machine.run("rm -rf /opt/comfyui/data/nodes")


def test_nodes_are_read_only_with_writable_paths(garden: Garden, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = garden.fleet
    first = garden.commit("good", GOOD.replace("WHICH", '("HearthOne", "HearthTwo")'))
    first += 'system = ["coreutils", "ffmpeg"]\n'
    bad = garden.commit("bad", "import nothing_like_this\n")
    garden.write(first, bad, monkeypatch=monkeypatch)
    done = garden.deploy("good", "bad")
    assert done.returncode == 0, done.stderr
    assert "node bad cannot be imported: No module named 'nothing_like_this'" in done.stderr
    assert "node good needs ffmpeg, missing on the host; on the host: apt-get install ffmpeg" in done.stderr
    assert "HearthOne" in fleet.ask("/object_info")
    kept = fleet.prefix / "data/nodes/good"
    assert json.loads((kept / "count.json").read_text()) == {"started": True}
    assert {path.name for path in (kept / "presets").iterdir()} == {"shipped.txt", "own.txt"}
    place = "/opt/comfyui/current/custom_nodes/good"
    assert "no" in fleet.machine.run(f"runuser -u comfyui -- touch {place}/new 2>/dev/null || echo no")
    facts = fleet.facts()
    assert facts["failed_nodes"] == {"bad": "No module named 'nothing_like_this'"}
    told = json.loads(garden.inv("doctor", "--json").stdout)
    (node,) = [each for each in told if each["check"] == "nodes"] or [{"what": told}]
    assert node["what"] == "node bad cannot be imported: No module named 'nothing_like_this'"
    assert node["remedy"].startswith("inv nodes.update --name bad")

    (kept / "presets/shipped.txt").write_text("edited by its user")
    second = garden.commit("good", GOOD.replace("WHICH", '("HearthOne", "HearthThree")'))
    garden.write(second, bad, monkeypatch=monkeypatch)
    done = garden.deploy("good", "bad")
    assert done.returncode == 0, done.stderr
    assert "sending 1 file," in done.stderr  # one node was changed
    assert len(re.findall(r"-> make node-", done.stderr)) == 1
    assert "node types that no longer exist: HearthTwo" in done.stderr
    assert (kept / "presets/shipped.txt").read_text() == "edited by its user"

    release = fleet.current()
    required = bad.replace('why = "a test"', 'why = "a test"\nrequired = true')
    garden.write(second, required, monkeypatch=monkeypatch)
    refused = garden.deploy("good", "bad", trial=True)
    assert refused.returncode == 66, refused.stderr
    assert "required node bad cannot be imported" in refused.stderr
    assert fleet.current() == release


def test_unresolved_nodes_are_refused(garden: Garden, monkeypatch: pytest.MonkeyPatch) -> None:
    first = garden.commit("good", GOOD.replace("WHICH", '("HearthOne",)'))
    garden.write(first, monkeypatch=monkeypatch)
    (garden.folder / "nodes.toml").write_text(garden.commit("good", "NODE_CLASS_MAPPINGS = {}\n"))
    done = garden.deploy("good")
    assert done.returncode == 26, done.stderr
    assert "inv lock" in done.stderr


def test_altered_node_is_refused(garden: Garden, monkeypatch: pytest.MonkeyPatch) -> None:
    # code that no other test fetches: cached code is not fetched again
    table = garden.commit("good", GOOD.replace("WHICH", '("HearthGone",)'))
    garden.write(re.sub('tree = "[0-9a-f]+"', f'tree = "{"0" * 64}"', table), monkeypatch=monkeypatch)
    altered = garden.deploy("good")
    garden.write(table.replace(str(garden.folder / "upstream/good"), "/nowhere/at/all"), monkeypatch=monkeypatch)
    gone = garden.deploy("good")
    assert (kind_of(altered.stderr), kind_of(gone.stderr)) == ("hash-mismatch", "source-unreachable")
    assert "differs from the recipe's pin" in altered.stderr


def test_nodes_cannot_see_git_or_installers(service: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, garden = service.machine, Garden(tmp_path / "garden", service, small(tmp_path, "small") / "src")
    for name in INSTALLERS:
        path = machine.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("print('works')\n" if path.suffix else "#!/bin/sh\necho works\n")
        path.chmod(0o755)
    lines = list(INSTALLERS.values())
    garden.write(garden.commit("eager", EAGER.replace("LINES", repr(lines))), monkeypatch=monkeypatch)
    try:
        done = garden.deploy("eager")
        python = "/opt/comfyui/current/env/bin/python"
        outside = [machine.run(f"runuser -u comfyui -- {line.replace('PYTHON', python)}").strip() for line in lines]
    finally:
        machine.run(f"cd / && rm -r {' '.join(each.removesuffix('/__main__.py') for each in INSTALLERS)}")
    assert done.returncode == 0, done.stderr
    assert outside == ["works"] * len(lines)
    tried = json.loads((garden.fleet.prefix / "data/nodes/eager/count.json").read_text())
    assert list(tried) == lines
    assert not [line for line, said in tried.items() if "works" in said]
    assert tried["git clone x"] == "Permission denied"
    machine.run("rm -rf /opt/comfyui/data/nodes")
