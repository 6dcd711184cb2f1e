"""`inv sanitise`: files and folders here, and the output folder of a host through its agent."""

from __future__ import annotations

import json
import os
import pwd
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from agent.change.sanitise import sanitise_outputs
from agent.files import AgentError
from agent.layout import Layout
from agent.schema.live import Sanitised
from lock import workflows
from ops import sanitise
from tests import comfyui
from tests.conftest import FIXTURES, Hearth
from tests.errors import kind_of, raises
from tests.unit.test_media import SECRET, noise, png


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Outputs with every kind of file, next to a picture that they link to."""
    root = tmp_path / "data/output"
    (root / "sub/deep").mkdir(parents=True)
    for name in ("output/a.png", "output/sub/deep/b.png", "secret.png"):
        png(tmp_path / "data" / name, noise())
    noise().save(root / "clean.png")
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:200])
    (root / "notes.txt").write_text("text")
    (root / "link.png").symlink_to("../secret.png")
    (root / "folder").symlink_to("..")
    return root


WANTED = {
    "a.png": "dirty", "clean.png": "clean", "cut.png": "failed", "folder": "unknown", "link.png": "unknown",
    "notes.txt": "unknown", "sub/deep/b.png": "dirty",
}  # fmt: skip


def layout(tmp_path: Path, **more: Any) -> Layout:
    values = {"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1}
    return Layout({**values, **more})


def test_a_folder_is_cleaned_without_following_links(outputs: Path) -> None:
    found = [*sanitise.here([str(outputs)], write=False, replace=False)]
    assert {str(Path(each.path).relative_to(outputs)): each.state for each in found} == WANTED
    assert SECRET in (outputs / "a.png").read_bytes()
    found = [*sanitise.here([str(outputs)], write=True, replace=True)]
    states = {name: "written" if state == "dirty" else state for name, state in WANTED.items()}
    assert {str(Path(each.path).relative_to(outputs)): each.state for each in found} == states
    assert SECRET not in (outputs / "a.png").read_bytes() + (outputs / "sub/deep/b.png").read_bytes()
    assert SECRET in (outputs / "../secret.png").read_bytes()


@pytest.mark.process
def test_the_agent_cleans_the_outputs_without_following_links(outputs: Path, tmp_path: Path) -> None:
    def states(paths: list[str], **how: bool) -> dict[str, str]:
        return {each.path: each.state for each in sanitise_outputs(layout(tmp_path), paths, **how)}

    assert states([], write=False, replace=False) == WANTED
    assert states(["sub/"], write=False, replace=False) == {"sub/deep/b.png": "dirty"}
    assert states(["link.png", "none/c.png", "folder/secret.png"], write=True, replace=True) == {
        "folder/secret.png": "failed", "link.png": "unknown", "none/c.png": "failed",
    }  # fmt: skip
    (found,) = sanitise_outputs(layout(tmp_path), ["sub/deep/b.png"], write=True, replace=False)
    assert found.copy == "sub/deep/b.clean.png"
    assert states([], write=True, replace=True)["a.png"] == "written"
    assert SECRET in (outputs / "../secret.png").read_bytes()
    assert SECRET not in (outputs / "a.png").read_bytes()


@pytest.mark.parametrize("path", ["/etc/passwd", "..", "../secret.png", "sub/../../secret.png"])
def test_the_agent_refuses_paths_outside_the_outputs(outputs: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(AgentError) as caught:
        [*sanitise_outputs(layout(tmp_path), [path], write=True, replace=True)]
    assert caught.value.report["kind"] == "usage"
    assert SECRET in (outputs / "../secret.png").read_bytes()


def test_the_agent_follows_the_operators_link_to_the_outputs(outputs: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").symlink_to(outputs)
    found = sanitise_outputs(
        layout(tmp_path, folders={"output": str(tmp_path / "disk")}), [], write=False, replace=False
    )
    assert {each.path: each.state for each in found} == WANTED


def test_nothing_is_cleaned_without_outputs_or_their_file_system(tmp_path: Path) -> None:
    assert [*sanitise_outputs(layout(tmp_path), [], write=True, replace=True)] == []
    with pytest.raises(AgentError) as caught:
        [*sanitise_outputs(layout(tmp_path, mounts={str(tmp_path): "x.mount"}), [], write=True, replace=True)]
    assert caught.value.report["kind"] == "storage"


@pytest.mark.process
def test_many_files_are_cleaned_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/output").mkdir(parents=True)
    for number in range(25):
        (tmp_path / f"data/output/{number:02}.txt").write_bytes(b"x" * 100)
    monkeypatch.setattr("agent.change.sanitise.BYTES", 250)
    found = [each.path for each in sanitise_outputs(layout(tmp_path), [], write=False, replace=False)]
    assert found == [f"{number:02}.txt" for number in range(25)]


# --- the task ----------------------------------------------------------------------------------------------------


def test_exit_codes_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    def code(found: list[Sanitised], *paths: str) -> int:
        return sanitise.show(iter(found), "", paths, as_json=True)

    assert code([Sanitised("a", "clean"), Sanitised("b/c", "unknown", error="e")], "a", "b") == 0
    assert code([Sanitised("a", "dirty", ("Exif",))], "a") == 2
    assert code([Sanitised("a", "dirty", ("Exif",)), Sanitised("b", "failed", error="e")], "a", "b") == 1
    assert code([Sanitised("a", "unknown", error="e")], "./a") == 1
    assert code([Sanitised("a", "written", ("Exif",)), Sanitised("b", "copied", ("Exif",))], "a") == 0
    *_, last = capsys.readouterr().out.strip().split("\n]\n")
    assert [each["state"] for each in json.loads(last)] == ["written", "copied"]


def test_rows_name_what_is_removed_and_count_the_rest() -> None:
    found = [
        Sanitised("a.png", "dirty", ("text workflow", "Exif"), "a.clean.png"),
        Sanitised("b.txt", "unknown", error="it is not a PNG, JPEG, WebP, FLAC, MP4 or WebM file"),
        Sanitised("c.png", "clean"),
    ]
    assert [*sanitise.rows(found, found)] == [
        "a.png -> a.clean.png: would be cleaned: text workflow, Exif",
        "b.txt: it is not a PNG, JPEG, WebP, FLAC, MP4 or WebM file",
        "3 files: 1 would be cleaned, 1 nothing to remove, 1 not supported",
    ]


def test_the_task_takes_several_paths_and_applies_only_if_asked(hearth: Hearth, outputs: Path) -> None:
    raw = (outputs / "a.png").read_bytes()
    words = ["sanitise", str(outputs / "a.png"), str(outputs / "clean.png"), "--json", str(outputs / "sub")]
    done = hearth.inv(*words)
    assert (done.returncode, [each["state"] for each in json.loads(done.stdout)]) == (2, ["dirty", "clean", "dirty"])
    assert (outputs / "a.png").read_bytes() == raw
    assert hearth.inv(*words, "--apply").returncode == 0
    assert (outputs / "a.png").read_bytes() == raw
    assert SECRET not in (outputs / "a.clean.png").read_bytes()
    assert kind_of(hearth.inv("sanitise").stderr) == "usage"
    assert kind_of(hearth.inv(*words, "--replace").stderr) == "usage"
    assert (outputs / "a.png").read_bytes() == raw


@pytest.mark.process
def test_the_task_cleans_the_outputs_of_a_host(hearth: Hearth, outputs: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text(f'[hosts.local]\nprefix = "{tmp_path}"\n')
    hearth.env["HEARTH_HOSTS"] = str(tmp_path / "hosts.toml")
    done = hearth.inv("sanitise", "--host", "local", "--apply", "--replace", "--json")
    states = {name: "written" if state == "dirty" else state for name, state in WANTED.items()}
    assert {each["path"]: each["state"] for each in json.loads(done.stdout)} == states
    assert done.returncode == 1
    assert SECRET not in (outputs / "a.png").read_bytes()
    assert kind_of(hearth.inv("sanitise", "../secret.png", "--host", "local").stderr) == "usage"


# --- what ComfyUI saves, and what the page says -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["png.png", "apng.png", "webp.webp", "video.mp4", "webm.webm", "flac.flac"])
def test_files_that_comfyui_saved_have_no_workflow_afterwards(tmp_path: Path, name: str) -> None:
    shutil.copy(FIXTURES / "workflows" / name, tmp_path)
    assert workflows.read(tmp_path / name)
    (found,) = sanitise.here([str(tmp_path / name)], write=True, replace=True)
    assert found.state == "written"
    with raises("config"):
        workflows.read(tmp_path / name)


def test_the_watermark_uses_only_nodes_of_comfyui(hearth: Hearth) -> None:
    comfyui.read_by(hearth)
    done = hearth.inv("workflows.check", "--file", "docs/how-to/watermark.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 of 1 workflow fits")


@pytest.mark.needs("root")
def test_a_system_services_outputs_are_cleaned_with_its_rights() -> None:
    """Root's picture in the folder is neither read nor replaced, and the service's link to one is not followed."""
    nobody = pwd.getpwnam("nobody").pw_uid
    with TemporaryDirectory(dir="/tmp") as folder:
        root = Path(folder)
        root.chmod(0o755)
        output = root / "data/output"
        output.mkdir(parents=True)
        for name in ("root.png", "own.png", "readable.png"):
            png(output / name, noise())
        png(root / "outside.png", noise())
        (output / "root.png").chmod(0o600)
        (output / "link.png").symlink_to(root / "outside.png")
        for path in (output, output / "own.png", output / "link.png"):
            os.chown(path, nobody, nobody, follow_symlinks=False)
        values = {"prefix": folder, "service": "s", "scope": "system", "user": "nobody", "address": "", "port": 1}
        found = {each.path: each for each in sanitise_outputs(Layout(values), [], write=True, replace=True)}
        assert {name: each.state for name, each in found.items()} == {
            "link.png": "unknown", "own.png": "written", "readable.png": "written", "root.png": "failed",
        }  # fmt: skip
        assert found["root.png"].error == "Permission denied"
        assert SECRET in (output / "root.png").read_bytes()
        assert SECRET in (root / "outside.png").read_bytes()
        assert {(output / name).stat().st_uid for name in ("own.png", "readable.png")} == {nobody}
