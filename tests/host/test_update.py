"""An update of ComfyUI on a real host and the way back. The older version is made of the pinned one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core import files
from core.typed import convert
from lock import interface
from lock.application import application
from lock.interface import Change, Interface
from lock.requirements import LockedList
from tests import comfyui
from tests.comfyui import swap
from tests.host.fleet import PREFIX, Fleet
from tests.host.test_deploy import machine_since

pytestmark = pytest.mark.host

OLD = "0.29.0"
MIGRATION = "0006_add_loader_path"

EDITS = {
    **comfyui.OLDER,
    "comfyui_version.py": swap(("0.30.0", OLD)),
    "comfy/cli_args.py": swap(
        ('add_argument("--disable-nvml-pressure"', 'add_argument("--older", dest="disable_nvml_pressure"')
    ),
    "requirements.txt": swap(("psutil\n", "")),
    f"alembic_db/versions/{MIGRATION}.py": None,
}
"""The older version: other nodes, flags and requirements, and one migration less."""

PROPOSED = f"update/comfyui-{application().version}"
COMFYUI, LOCK = "comfyui.txt", "cu130-linux_x86_64-cp311"


def repository(place: Path) -> dict[str, str]:
    """A repository with both versions as tags; returns the variables with which git finds it."""
    work, git_dir = comfyui.derived(place / "older", EDITS), place / "upstream"
    git = ["git", f"--git-dir={git_dir}", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.compression=0"]
    subprocess.run(["git", "init", "--quiet", "--bare", str(git_dir)], check=True)
    for setting in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        subprocess.run([*git, "config", setting, "true"], check=True)
    shutil.copytree(work, place / "copy")  # without links to the cache
    for version, tree in ((OLD, place / "copy"), (application().version, comfyui.tree())):
        for words in (["add", "-A", "--force"], ["commit", "--quiet", "-m", version], ["tag", f"v{version}"]):
            subprocess.run([*git, f"--work-tree={tree}", *words], check=True)
    (url,) = (each.git for each in application().source if each.git)
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{git_dir}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
    }


def checkout(place: Path) -> Path:
    """A checkout of a user: one stack, platform and Python, and no nodes, so that one list is resolved."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=files.CHECKOUT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if not name.startswith(("tests/", "docs/", "bench/", "recipes/comfyui/locks/")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files.CHECKOUT / name, place / name)
    app, locked = place / "recipes/comfyui/app.toml", lock(files.CHECKOUT)
    files.write(place / "recipes/comfyui/locks" / f"{LOCK}.txt", locked.text.encode())
    (place / "recipes/comfyui/nodes.toml").unlink()
    extra = f"extra = {json.dumps([*locked.versions([])])}"  # so that the environment stays the same
    app.write_text(re.sub(r"^extra = .*$", extra, app.read_text(), flags=re.MULTILINE))
    stacks = place / "config/stacks.toml"
    (text,) = re.findall(r"^\[cu130\]$.*?(?=^\[|\Z)", stacks.read_text(), re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(pythons|platforms) = .*$", r"\1 = []", text, flags=re.MULTILINE)
    stacks.write_text(text.replace("pythons = []", 'pythons = ["3.11"]').replace("[]", '["linux_x86_64"]'))
    return place


def git(place: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", place, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def committed(place: Path) -> Path:
    """Make a checkout a repository with one commit."""
    git(place, "init", "--quiet", "--initial-branch=main")
    for name in ("name", "email"):
        git(place, "config", f"user.{name}", "a@b")
    git(place, "add", "--all")
    git(place, "commit", "--quiet", "-m", "mine")
    return place


def lock(place: Path) -> LockedList:
    return LockedList("cu130", "linux_x86_64", "3.11", (place / f"recipes/comfyui/locks/{LOCK}.txt").read_text())


def texts(place: Path) -> dict[str, str]:
    """The files that an update may change."""
    patterns = ("recipes/comfyui/**/*", "config/*.toml", "pyproject.toml", "uv.lock")
    found = [each for pattern in patterns for each in place.glob(pattern)]
    return {str(each): each.read_text() for each in found if each.is_file()}


def reported(fleet: Fleet) -> Interface:
    """The node types of the running ComfyUI."""
    with urllib.request.urlopen(f"http://127.0.0.1:{fleet.machine.port}/object_info", timeout=60) as answer:
        return interface.reported(json.load(answer))


def padded(**sides: int) -> str:
    """A workflow without models: a blue picture with grey sides, saved."""
    pad = {"left": 0, "top": 0, "right": 0, "bottom": 0, "feathering": 0, **sides}
    blue = {"width": 64, "height": 64, "batch_size": 1, "color": 255}
    return json.dumps({
        "1": {"class_type": "EmptyImage", "inputs": blue},
        "2": {"class_type": "ImagePadForOutpaint", "inputs": {"image": ["1", 0], **pad}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "mine"}},
    })  # fmt: skip


def proofs(fleet: Fleet, **sides: dict[str, int]) -> str:
    """The host's proofs, by name, and what else its configuration says."""
    listed = []
    for name, each in sides.items():
        (fleet.place / f"{name}.json").write_text(padded(**each))
        size = f"{64 + each.get('left', 0)}x{64 + each.get('top', 0)}"
        listed.append(f'[[hosts.spark.prove]]\nfile = "{fleet.place}/{name}.json"\nsize = "{size}"\n')
    return f"""{"".join(listed)}[hosts.spark.override.flags]
"--preview-method" = {{ value = "auto", comfyui = ">=0.30", why = "only the newer version gets it" }}
[hosts.gb10]
address = "gb10"
profile = "dgx-spark"
[hosts.gb10.override.flags]
"--older" = {{ why = "the newer version lacks it" }}
"""


def answer(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def user(steady: Fleet, tmp_path: Path) -> Iterator[Fleet]:
    """The steady machine's user: another checkout, with the older ComfyUI pinned and in service.

    Afterwards the pinned ComfyUI migrates the older database again.
    """
    user = Fleet(steady.machine, steady.place, env=repository(tmp_path))
    user.checkout = checkout(tmp_path / "checkout")
    done = user.inv("update", "comfyui", "--to", OLD)
    assert done.returncode == 0, done.stderr
    # a database of before the last migration
    user.machine.run(f"systemctl stop comfyui; rm -f {PREFIX}/data/user/comfyui.db*")
    user.becomes(proofs(user))
    yield user
    steady.becomes()
    assert MIGRATION in steady.database()


def propose(user: Fleet, before: dict[str, str]) -> None:
    """A proposal whose trial fails on the host: it is reported, and neither the checkout nor the host changes."""
    first, since, report = user.current(), machine_since(user), user.place / "proposal"
    committed(user.checkout)
    user.configure(proofs(user, left={"left": 16}, flat={}))
    where = ("--propose", "--host", "spark", "--output", str(report))
    failed = user.inv("update", "comfyui", "--to", application().version, *where)
    assert failed.returncode == 66, failed.stderr
    assert "left.json: " in failed.stderr
    found = json.loads((report / "report.json").read_text())
    assert found["trial"]["kind"] == "unhealthy"
    assert "flat.json made a picture of a single colour" in found["trial"]["error"]
    assert found["branch"] == PROPOSED
    assert found["summary"].endswith("the trial on spark failed")
    assert (user.current(), machine_since(user), texts(user.checkout)) == (first, since, before)
    assert git(user.checkout, "status", "--porcelain") == ""


def test_an_update_is_previewed_proved_rolled_back_and_undone(user: Fleet) -> None:
    first, types, database, before = user.current(), reported(user), user.database(), texts(user.checkout)
    older = lock(user.checkout)
    assert not [each for each in database if each.startswith(MIGRATION)]
    propose(user, before)
    saved = user.prefix / "data/user/default/workflows/mine.json"
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps({"1": {"class_type": "ImageSaver", "inputs": {}}}))

    made = answer(user.inv("update", "comfyui", "--to", application().version, "--json"))["preview"]
    assert ("comfyui.txt" in older.requesters("psutil"), "comfyui.txt" in lock(user.checkout).requesters("psutil")) == (
        False,
        True,
    )
    assert [(each["owner"], each["flag"], each["kind"]) for each in made["flags"]] == [
        ("host gb10", "--older", "removed")
    ]
    assert (made["migrations"], made["restores"]) == ([MIGRATION], True)
    assert git(user.checkout, "diff", "--name-only", PROPOSED) == ""  # what was proposed
    changes = convert(made["types"]["ComfyUI"], list[Change])

    try:
        (plan,) = answer(user.deploy("--dry-run", "--json"), 2)
    finally:
        saved.unlink()
    (found,) = plan["preview"]["workflows"]
    assert (found["file"], [each["type"] for each in found["findings"]]) == ("spark:mine.json", ["ImageSaver"])

    user.configure(proofs(user, left={"left": 16}, top={"top": 16}))
    done = user.deploy()
    assert done.returncode == 0, done.stderr
    assert "trial: the second picture arrived" in done.stderr
    assert "sending" not in done.stderr  # the steady release has the same tree
    for name in ("left", "top"):
        assert re.search(rf"proof .*{name}.json: [\d.]+ s, with release {first} [\d.]+ s", done.stderr)
    second = user.current()
    assert [*interface.compare(types, reported(user))] == changes
    assert MIGRATION in user.database()
    system = user.ask("/system_stats")["system"]
    assert isinstance(system, dict)
    assert system["argv"][-2:] == ["--preview-method", "auto"]
    user.configure(proofs(user))
    assert user.deploy("--dry-run").returncode == 0  # a changed proof is no new release
    told = user.inv("diff", "previous", "current", "--host", "spark").stdout
    assert "flag --preview-method: none -> auto\n" in told
    assert "shared parts: env" in told

    planned = user.inv("rollback", "--host", "spark", "--dry-run").stderr
    assert f"a newer ComfyUI has migrated the database: {first} gets the copy from " in planned
    back = user.inv("rollback", "--host", "spark")
    assert back.returncode == 0, back.stderr
    assert "trial: the second picture arrived" in back.stderr  # on that database, too
    assert f"cannot open ComfyUI's database ({MIGRATION}); it gets the copy from " in back.stderr
    assert (user.current(), user.database()) == (first, database)
    assert [path.name for path in (user.prefix / "state/databases").iterdir()] == [second]
    undone = user.inv("update", "--undo")
    assert undone.returncode == 0, undone.stderr
    assert texts(user.checkout) == before
    assert user.deploy("--dry-run").returncode == 0
