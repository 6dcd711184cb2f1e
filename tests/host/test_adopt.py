"""Adopting a manually installed ComfyUI, and undoing that."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.errors import kind_of
from tests.host.fleet import PREFIX, Fleet, fresh
from tests.host.machine import free_port
from tests.host.test_faults import cut_power, kill_agent, wait_for_step
from tests.host.test_nodes import GOOD, Garden

pytestmark = pytest.mark.host

OLD = "/opt/comfyui/ComfyUI"
UNIT = "/etc/systemd/system/comfyui.service"

MAIN = """\
import http.server, pathlib, sys

JOBS = pathlib.Path("jobs.json")

class Old(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        jobs = JOBS.read_bytes() if JOBS.exists() else b'{"queue_running": [], "queue_pending": []}'
        self.wfile.write(jobs if self.path == "/queue" else b'"the old one"')

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Old).serve_forever()
"""
"""A stand-in for the old ComfyUI: installing a real one would only take minutes longer."""

SERVICE = """\
[Unit]
Description=ComfyUI Stable Diffusion Service
After=network.target

[Service]
Type=simple
User=anna
WorkingDirectory=/opt/comfyui/ComfyUI
Environment=PATH=/opt/comfyui/ComfyUI/.venv/bin
Environment=OMP_NUM_THREADS=20
ExecStart=/opt/comfyui/ComfyUI/.venv/bin/python main.py --listen 0.0.0.0 --port PORT --highvram --preview-method auto
Restart=always
RestartSec=10

[Install]
WantedBy=multi-user.target
"""

USERS = f"""\
set -e
groupadd comfyui-users
useradd --create-home --uid 1500 --groups comfyui-users anna
useradd --uid 1501 --groups comfyui-users bert
python3 -m venv --without-pip {OLD}/.venv
mkdir -p {OLD}/.venv/lib/python3.11/site-packages/torch-2.9.1+cu130.dist-info /srv/loras /srv/more/vae
chown -R anna:comfyui-users {OLD}
find {OLD}/models {OLD}/output -type d -exec chmod 2775 {{}} +
chown bert {OLD}/output/berts
chmod 400 {OLD}/models/checkpoints/one.safetensors
chown root: {OLD}/output/berts/roots.png
systemctl daemon-reload
systemctl enable --now comfyui
"""


def git(place: Path, *words: str) -> str:
    argv = ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "safe.directory=*", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def state(root: Path) -> dict[str, tuple[int, int, int, str]]:
    """Owner, group, mode and content (for folders: ACLs) of every file in a tree, or of one file."""
    found: dict[str, tuple[int, int, int, str]] = {}
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_dir():
            content = " ".join(os.listxattr(path))
        elif stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(root))] = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), content)
    return found


class Old:
    """A machine with a manually installed ComfyUI, and the client's known nodes."""

    def __init__(self, fleet: Fleet, garden: Garden) -> None:
        self.fleet = fleet
        self.garden = garden
        self.place = fleet.machine.root / OLD.lstrip("/")
        self.unit = fleet.machine.root / UNIT.lstrip("/")

    def build(self) -> None:
        """Create the installation: code and nodes as clones, data with links, several owners, many small pictures."""
        place, upstream = self.place, self.garden.folder / "upstream"
        for name, text in (("main.py", MAIN), ("comfyui_version.py", '__version__ = "0.3.40"\n'), ("comfy/a.py", "")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "one"]):
            git(place, *words)
        git(place, "remote", "add", "origin", "https://name:word@github.com/comfyanonymous/ComfyUI")
        for name in ("good", "edited", "unknown"):
            git(place, "clone", "--quiet", f"file://{upstream / name}", f"custom_nodes/{name}")
        (place / "custom_nodes/edited/__init__.py").write_text("edited = True\n")
        # A reader of a repository must not run the programs that its configuration names.
        git(place / "custom_nodes/unknown", "config", "core.fsmonitor", "touch /tmp/hearth-ran-this; false")
        (place / "custom_nodes/single.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
        (place / "extra_model_paths.yaml").write_text(
            "more:\n  base_path: /srv/more\n  vae: vae\n  loras: other/lora\n"
        )
        data = {
            "models/checkpoints/one.safetensors": "weights",
            "models/configs/ü b.yaml": "x",
            "input/photo.png": "photo",
            "output/berts/roots.png": "art",
            "user/default/workflows/mine.json": '{"nodes": []}',
            **{f"output/{number % 400}/{number}.png": str(number) for number in range(8000)},
        }
        for name, text in data.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        (place / "models/loras").symlink_to("/srv/loras")
        os.link(place / "input/photo.png", place / "input/the-same.png")
        with sqlite3.connect(place / "user/comfyui.db") as database:
            database.execute("create table old (x)")
        database.close()
        self.unit.write_text(SERVICE.replace("PORT", str(self.fleet.machine.port)))
        self.fleet.machine.run(USERS)

    def adopt(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.fleet.inv("adopt", "--host", "spark", *words)

    def serves(self, within: float = 20) -> bool:
        end = time.monotonic() + within
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.fleet.machine.port}/", timeout=5) as answer:
                    return bool(json.load(answer) == "the old one")
            except (OSError, ValueError):
                time.sleep(0.2)
        return False

    def state(self) -> dict[str, tuple[int, int, int, str]]:
        enabled = self.fleet.machine.run("systemctl is-enabled comfyui", check=False)
        return state(self.place) | {f"unit {enabled}": state(self.unit)["."]}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    tmp_path = tmp_path_factory.mktemp("adopt")
    with fresh(tmp_path, "adopt", Fleet) as fleet, pytest.MonkeyPatch.context() as patch:
        fleet.machine.boot()
        fleet.machine.run("apt-get update -qq && apt-get install -qq -y --no-install-recommends git python3-venv")
        garden = Garden(tmp_path / "garden", fleet)
        known = garden.commit("good", GOOD.replace("WHICH", '("HearthAdopted",)'))
        for name in ("edited", "unknown"):
            garden.commit(name, GOOD.replace("WHICH", '("HearthOther",)'))
        garden.write(known, monkeypatch=patch)
        one = Old(fleet, garden)
        one.build()
        assert one.serves()
        yield one


def test_installation_is_surveyed_and_proposed(old: Old) -> None:
    before = old.state()
    refused = old.fleet.deploy()
    assert refused.returncode == 63, refused.stderr
    assert f"{UNIT} is not Hearth's" in refused.stderr
    assert "inv adopt --host spark" in refused.stderr
    done = old.adopt("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    installation = found["installation"]
    assert (installation["version"], installation["torch"], installation["python"]) == ("0.3.40", "2.9.1+cu130", "3.11")
    assert installation["url"] == "https://github.com/comfyanonymous/ComfyUI"
    assert installation["commit"] == git(old.place, "rev-parse", "HEAD")
    (host,) = tomllib.loads(found["snippet"])["hosts"].values()
    assert (host["listen"], host["port"], host["members"]) == ("0.0.0.0", old.fleet.machine.port, ["anna", "bert"])
    assert host["model_roots"] == ["/srv/more"]
    assert host["override"]["nodes"] == ["good"]
    assert host["override"]["flags"].keys() == {"--preview-method"}
    assert found["nodes"] == {"good": "pinned at the same commit"}
    (command,) = found["add"]
    commit = git(old.place / "custom_nodes/unknown", "rev-parse", "HEAD")
    assert command.startswith(f"inv nodes.add file://{old.garden.folder}/upstream/unknown@{commit} ")
    left = dict(found["left"])
    assert left["node edited"].startswith("it was edited (__init__.py)")
    assert "single file" in left["node single.py"]
    assert "exclude each other" in left["flag --highvram"]
    assert "variable OMP_NUM_THREADS" in left
    assert "loras in /srv/more/other/lora (extra_model_paths.yaml)" in left
    assert {name: count for name, (_, _, count) in found["moves"].items()} == {
        "models": 3, "input": 2, "output": 8001, "user": 2
    }  # fmt: skip
    assert "tmp/hearth-ran-this" not in old.fleet.machine.run("ls -d /tmp/*", check=False)
    text = old.adopt()
    assert "node edited" in text.stdout
    assert found["snippet"] in text.stdout
    assert old.state() == before
    assert old.serves(1)


def test_unadoptable_installations_have_distinct_errors(old: Old) -> None:
    none = old.adopt("--path", "/srv")
    undo = old.adopt("--undo", "--yes")
    assert {kind_of(none.stderr), kind_of(undo.stderr)} == {"no-installation"}
    assert "no ComfyUI was found on spark" in none.stderr
    assert "there is no adopted installation on spark" in undo.stderr
    machine = old.fleet.machine
    machine.run(f"mkdir -p /home/anna/comfy && cp -r {OLD} /home/anna/comfy && rm -r /home/anna/comfy/ComfyUI/output")
    two = old.adopt()
    assert (two.returncode, kind_of(two.stderr)) == (69, "no-installation")
    assert f"spark has 2 installations of ComfyUI: {OLD}, /home/anna/comfy/ComfyUI" in two.stderr
    start = f"cd /home/anna/comfy/ComfyUI; setsid python3 main.py --port {free_port()} >/tmp/loose 2>&1 & echo $!"
    pid = machine.run(start).strip()
    machine.run(f"until grep -q main.py /proc/{pid}/cmdline; do sleep 0.1; done")
    loose = old.adopt("--path", "/home/anna/comfy/ComfyUI", "--apply", "--yes")
    machine.run(f"kill {pid}; rm -r /home/anna/comfy")
    assert loose.returncode == 63, loose.stderr
    assert f"runs without a system unit: pid {pid} of root" in loose.stderr


def test_adopt_waits_for_jobs_of_the_old_installation(old: Old) -> None:
    before = old.state()
    (old.place / "jobs.json").write_text('{"queue_running": [[0, "job-7"]], "queue_pending": []}')
    busy = old.adopt("--apply", "--drain", "1", "--yes")
    (old.place / "jobs.json").unlink()
    assert (busy.returncode, kind_of(busy.stderr)) == (64, "drain"), busy.stderr
    assert "1 running (job-7)" in busy.stderr
    assert old.state() == before
    assert old.serves(1)
    assert old.adopt("--undo", "--yes").returncode == 69


def test_killed_adoption_resumes_and_undo_restores_modes(old: Old) -> None:
    before = old.state()
    fleet, since = old.fleet, time.time()
    plan = old.adopt("--apply", "--dry-run")
    assert plan.returncode == 2, plan.stderr
    assert old.state() == before
    client = fleet.start("adopt", "--host", "spark", "--apply", "--yes", "--json")
    for step in ("stop comfyui.service", f"move {OLD}/models", f"move {OLD}/output", f"move {OLD}/user"):
        wait_for_step(fleet, step, since)
        kill_agent(fleet, client.pid)
    said, _ = client.communicate(timeout=180)
    assert client.returncode == 0, said
    assert not old.serves(1)
    moved = {f"{name}/{each}" for name in ("models", "input", "output", "user") for each in state(old.place)}
    data = state(fleet.prefix / "data")
    for name, (_, _, _, content) in before.items():
        if name.split("/")[0] in ("models", "input", "output", "user"):
            assert data[name][3] == content, name
            assert name not in moved
    uid = int(fleet.machine.run("id -u comfyui"))
    alien = {name for name, (owner, *_) in data.items() if owner != uid} - {"custom_nodes"}  # owned by root, and empty
    # two hard links of one file, one with a third link elsewhere, and a file of another owner
    assert alien == {"input/photo.png", "input/the-same.png", "output/berts", "output/berts/roots.png"}
    for name in alien:
        assert data[name] == before[name]
    assert data["output"][2] == 0o2775
    assert data["models/checkpoints/one.safetensors"][2] == 0o660
    assert not old.unit.exists()
    again = old.adopt("--apply", "--dry-run")
    assert again.returncode == 0, again.stderr

    since = time.time()
    client = fleet.start("adopt", "--host", "spark", "--undo", "--yes")
    wait_for_step(fleet, "restore the old ComfyUI", since)
    cut_power(fleet, client.pid)
    said, _ = client.communicate(timeout=180)
    assert client.returncode == 60, said
    attached = fleet.inv("attach", "--host", "spark")
    assert attached.returncode == 0, attached.stderr
    assert old.state() == before
    assert old.serves()
    assert old.adopt("--undo", "--yes").returncode == 69


def test_adopted_installation_deploys_without_loss(old: Old) -> None:
    before = old.state()
    fleet = old.fleet
    # An earlier trial of Hearth: existing files in the data stay.
    taken = fleet.prefix / "data/models/configs"
    fleet.machine.run(f"mkdir -p {PREFIX}/data/models/configs; echo mine > '{PREFIX}/data/models/configs/ü b.yaml'")
    adopted = old.adopt("--apply", "--yes")
    assert adopted.returncode == 0, adopted.stderr
    assert f"data/ has one of that name: {OLD}/models/configs/ü b.yaml" in adopted.stderr
    assert (taken / "ü b.yaml").read_text() == "mine\n"
    done = old.garden.deploy("good")
    assert done.returncode == 0, done.stderr
    assert "HearthAdopted" in fleet.ask("/object_info/HearthAdopted")
    loader = json.dumps(fleet.ask("/object_info/CheckpointLoaderSimple"))
    assert "one.safetensors" in loader
    with urllib.request.urlopen(
        f"http://127.0.0.1:{fleet.machine.port}/api/userdata?dir=workflows", timeout=5
    ) as answer:
        assert json.load(answer) == ["mine.json"]
    data = fleet.data()
    for name, (_, _, _, content) in before.items():
        if name.split("/")[0] in ("models", "input", "output") and len(content) == 64 and "ü" not in name:
            assert data[name] == content, name
    assert "system.posix_acl_default" in os.listxattr(fleet.prefix / "data/output")
    assert "system.posix_acl_default" not in os.listxattr(fleet.prefix / "data/output/berts")
    (fleet.prefix / "data/output/new.png").write_text("made since")

    back = old.adopt("--undo", "--yes")
    assert back.returncode == 0, back.stderr
    assert old.serves()
    after = old.state()
    assert {name: after.get(name) for name in before} == before
    assert (old.place / "output/new.png").read_text() == "made since"
    assert list((old.place / "user").glob("comfyui.db.newer-*"))
