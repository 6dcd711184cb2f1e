"""`runtime = "podman"` on a booted Debian 13: a unit of Quadlet runs the real ComfyUI. `nox -s host -- --podman`.

Nested, a machine has no control group controllers, so nothing here limits memory.
"""

from __future__ import annotations

import json
import re
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.fleet import Fleet, fresh, link_environment, within
from tests.host.machine import LOGIN
from tests.host.test_nodes import Garden
from tests.host.test_update import proofs

pytestmark = [pytest.mark.host, pytest.mark.podman]

SETTINGS = '[hosts.spark.override]\nmemory_max = "infinity"\n'
# Podman 5 needs a unified hierarchy; a login's containers mount /proc.
NSPAWN = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1"}
MORE = ("--capability=all", "--drop-capability=CAP_SYS_RESOURCE", "--system-call-filter=add_key keyctl bpf")
ENGINE = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]\npids_limit = 0\n'
HOME = f"home/{LOGIN}/.local/share"


class Contained(Fleet):
    """A fleet whose host `spark` runs ComfyUI in a container."""

    scope = "system"
    runtime = "podman"

    @property
    def prefix(self) -> Path:
        return self.machine.root / ("opt/comfyui" if self.scope == "system" else f"{HOME}/hearth/comfyui")

    def configure(self, text: str = "", profile: str = "cpu", keys: str = "", more: str = "") -> None:
        """`text` is the host's override, `keys` are its own, `more` are further tables."""
        given = f'runtime = "{self.runtime}"\nscope = "{self.scope}"\n{keys}{SETTINGS}{text}{more}'
        super().configure(given, profile)

    def ctl(self, words: str) -> str:
        user = f"--user --machine={LOGIN}@ " if self.scope == "user" else ""
        return self.machine.run(f"systemctl {user}{words}", check=False).strip()


class Rootless(Contained):
    """The same without root."""

    scope = "user"


@pytest.fixture(params=["system", "user"])
def box(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Contained]:
    for name, value in NSPAWN.items():
        monkeypatch.setenv(name, value)
    user = request.param == "user"
    kind: type[Contained] = Rootless if user else Contained
    with fresh(tmp_path, f"podman-{request.param}", kind, bare=user, suite="trixie", more=MORE) as one:
        root, store = one.machine.root, one.machine.place / "containers"
        own = f"{HOME}/containers" if user else "var/lib/containers"
        if user:
            link_environment(one.machine.disk / f"upper/{HOME}/hearth/comfyui")
        # Podman's overlays cannot be on the machine's own overlay.
        store.mkdir()
        one.machine.more += (f"--bind={store}:/{own}",)
        (root / own).mkdir(parents=True, exist_ok=True)
        (root / "etc/containers/containers.conf.d").mkdir(parents=True, exist_ok=True)
        (root / "etc/containers/containers.conf.d/here.conf").write_text(ENGINE)
        one.machine.boot()
        if user:
            one.machine.run(f"find /home/{LOGIN} -type d -exec chown {LOGIN}: {{}} +")  # files are shared
        yield one


def test_a_container_has_a_hosts_life(box: Contained) -> None:
    done = box.deploy()
    assert done.returncode == 0, done.stderr
    assert "the second picture arrived" in done.stderr
    first = box.current()
    assert "nothing to do" in box.deploy("--dry-run").stdout
    pid = int(box.ctl("show --property MainPID --value comfyui"))
    assert "conmon" in box.machine.run(f"cat /proc/{pid}/comm")
    assert "CapEff:\t0000000000000000" in box.machine.run("cat /proc/$(pgrep -f /app/[m]ain.py | head -1)/status")
    assert "no problems found" in box.inv("status", "--host", "spark").stdout
    assert "Starting server" in box.inv("logs", "--host", "spark", "--lines", "500").stdout

    box.machine.run("pkill -KILL -f /app/[m]ain.py")
    assert within(30, lambda: box.ctl("show --property NRestarts --value comfyui") == "1")
    assert box.answers(90)

    box.configure('metadata = "none"\n')
    done = box.deploy()
    assert done.returncode == 0, done.stderr
    assert box.current() != first
    done = box.inv("rollback", "--host", "spark", "--no-trial")
    assert (done.returncode, box.current()) == (0, first), done.stderr

    dies = box.comfyui("dies", {"main.py": (r"\A", "raise SystemExit(3)\n")})
    done = box.deploy("--no-trial", HEARTH_APP=str(dies))
    assert done.returncode != 0
    assert "is restored" in done.stderr, done.stderr
    assert box.current() == first
    assert box.answers(90)

    done = box.inv("nuke", "--host", "spark", "--yes")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in box.prefix.iterdir()] == ["data"]
    assert box.ctl("is-active comfyui") == "inactive"
    assert box.machine.run("pgrep -f /app/[m]ain.py", check=False) == ""


NODE = """
import os
from pathlib import Path

class Mine:
    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return ("",)

NODE_CLASS_MAPPINGS = {"NAME": Mine}
made = Path(__file__).with_name("made.txt")
print("NAME", len(os.environ.get("HF_TOKEN", "")), made.read_text() if made.exists() else "", flush=True)
"""
INSTALL = """
import os
from pathlib import Path
import torch
def refused(path):
    try:
        Path(path).write_text("x")
    except OSError:
        return True
secret = [name for name in os.environ if "TOKEN" in name]
seen = [each for each in ("PREFIX/data", "PREFIX/secrets", "/run/hearth") if os.path.lexists(each)]
Path("made.txt").write_text(f"torch {torch.__version__} {secret} {seen} {refused('PREFIX/x')} {refused('/x')}")
"""
SECRET = "s3cret-[v]alue"
"""The secret as a pattern that does not match itself."""


def log(box: Contained) -> str:
    return box.inv("logs", "--host", "spark", "--lines", "2000").stdout


def test_secrets_nodes_and_proofs_are_as_without_a_container(
    box: Contained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, own = box.machine, f"/{box.prefix.relative_to(box.machine.root)}"
    garden = Garden(tmp_path / "garden", box)
    (tmp_path / "garden/upstream/built").mkdir(parents=True)
    (tmp_path / "garden/upstream/built/install.py").write_text(INSTALL.replace("PREFIX", own))
    table = garden.commit("built", NODE.replace("NAME", "Built"))
    garden.write(f'{table}install = "a test"\n', monkeypatch=monkeypatch)
    (machine.root / "srv/mine").mkdir()
    (machine.root / "srv/mine/__init__.py").write_text(NODE.replace("NAME", "First"))
    keys = 'secrets = ["HF_TOKEN"]\ndevelop = ["/srv/mine"]\nmodes = ["development"]\n'
    box.configure('nodes = ["built"]\n', keys=keys, more=proofs(box, wide={"left": 32}))
    kept = box.inv("secret", "set", "HF_TOKEN", "--host", "spark", "--command", "echo s3cret-value")
    assert kept.returncode == 0, kept.stderr

    done = box.deploy()
    assert done.returncode == 0, done.stderr
    assert "the first of 96x64" in done.stderr
    text = log(box)
    # install.py ran with the release's Python, and saw and wrote nothing of the host.
    made = re.search(r"Built 12 torch \S+ (.*)", text)
    assert made
    assert made[1] == "[] [] True True"
    assert "First 12" in text

    files = "/etc/systemd /run/systemd /run/containers /var/lib/containers /home/deployer/.config"
    files += f" {own}/releases {own}/state"
    assert machine.run(f"grep -rslI '{SECRET}' {files} 2>/dev/null", check=False) == ""
    assert machine.run(f"journalctl --no-pager | grep '{SECRET}'", check=False) == ""
    engine = "podman inspect comfyui" if box.scope == "system" else f"sudo -iu {LOGIN} podman inspect comfyui"
    shown = machine.run(f"{engine}; systemctl show comfyui")
    assert '"Name": "comfyui"' in shown
    assert not re.search(SECRET, shown)
    pid = machine.run("pgrep -f /app/[m]ain.py | head -1").strip()
    assert machine.run(f"tr '\\0' '\\n' < /proc/{pid}/environ | grep '^HF_TOKEN={SECRET}$'")

    (machine.root / "srv/mine/__init__.py").write_text(NODE.replace("NAME", "Second"))
    assert within(60, lambda: "Second 12" in log(box))
    machine.run("rm -r /srv/mine")
    assert box.ctl("restart comfyui") == ""
    assert box.answers(90)


def queue(box: Contained, prefix: str) -> None:
    """Queue a job that takes a second."""
    inputs = {"width": 2000, "height": 1000, "batch_size": 1, "color": zlib.crc32(prefix.encode()) % (1 << 24)}
    save = {"images": ["1", 0], "filename_prefix": prefix}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": save},
    }
    body = json.dumps({"prompt": workflow}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{box.machine.port}/prompt", body)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["prompt_id"]


def test_a_host_moves_into_a_container_and_out_of_it(box: Contained) -> None:
    done = box.deploy()
    assert done.returncode == 0, done.stderr
    boxed, own = box.current(), f"/{box.prefix.relative_to(box.machine.root)}"
    # Debian 13 has no Python 3.11, whose environment the tests have.
    copied = "bin/python3.11 lib/python3.11"
    box.machine.run(f"cd {own}/parts/base-*/usr && tar -cf - {copied} | tar -C /usr -xf -")
    box.runtime = "native"
    box.configure('pythons = ["3.11"]\n')

    def moves(release: str, number: int, *words: str) -> str:
        """Change with jobs in the queue, all of which end; returns the release, which only one process runs."""
        for each in range(5):
            queue(box, f"job{number}-{each}")
        done = box.inv(*words, "--host", "spark", "--no-trial")
        assert done.returncode == 0, done.stderr
        assert len([*(box.prefix / "data/output").glob(f"job{number}-*")]) == 5
        # The engine's command names it, too, until the health command succeeds.
        assert within(30, lambda: box.machine.run("pgrep -fc /app/[m]ain.py", check=False).strip() == "1")
        assert box.ctl("is-active comfyui") == "active"
        assert box.current() == release or not release
        return box.current()

    native = moves("", 1, "deploy")
    assert native != boxed
    moves(boxed, 2, "rollback")
    moves(native, 3, "rollback")
    assert "nothing to do" in box.deploy("--dry-run").stdout
    box.runtime = "podman"
    box.configure()
    moves(boxed, 4, "deploy")
