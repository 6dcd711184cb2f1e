"""`inv update`: from a repository with tags, an index with tiny packages and dates, in a checkout of its own."""

from __future__ import annotations

import random
import shutil
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import tomli

from core import lockfile, source, stack
from core.errors import HearthError
from deploy import deploy
from deploy.plan import Options
from lock import nodes, requirements, resolution
from lock.application import application, channels, versions
from lock.preview import Preview, Release
from lock.updates import node_updates, outdated, releases, transaction, update, upstream
from lock.updates.proposal import Proposal, Request
from tests.comfyui import tree as real_tree
from tests.errors import raises
from tests.upstream import NEW, OLD, Checkout, Repository

pytestmark = pytest.mark.installer

REAL = real_tree()


def test_the_newest_good_release_of_comfyui(own: Checkout) -> None:
    before = own.texts()
    assert own.update("comfyui").moves == []
    assert own.texts() == before
    own.git("rm", "--quiet", "-r", "comfy/gone.py", "models")
    commit = own.tag(
        "0.31.0", requirements__txt="six==2\n", manager_requirements__txt="# a comment\nmanager==2\n", fresh__py="",
        **{"web/a.js": "", ".github": "", "pytest__ini": "", "SECURITY__md": "", 'a "b" c/d': ""},
    )  # fmt: skip
    own.tag("0.31.1", requirements__txt="six\naimdo\n-c limits.txt\n", limits__txt="AimDo==0.4.11\n")
    own.tag("0.32.0", requirements__txt="six\naimdo==0.4.11\n")
    own.tag("0.33.0", requirements__txt="six\n")
    own.tag("0.34.0-rc1")
    own.tag("0.34.0", NEW)
    proposed = own.update("comfyui", cooldown="14d", dry_run=True)
    assert own.texts() == before
    made = own.update("comfyui", cooldown="14d")
    assert made == proposed
    assert [(each.old, each.new, each.date) for each in made.moves] == [("0.30.0", "0.31.0", "2026-01-01")]
    why = {each.split(":")[0]: each for each in made.skipped}
    assert why.keys() == {"ComfyUI 0.34.0", "ComfyUI 0.33.0", "ComfyUI 0.32.0", "ComfyUI 0.31.1"}
    assert "cool-down" in why["ComfyUI 0.34.0"]
    assert "it burns" in why["ComfyUI 0.33.0"]
    assert "aimdo 0.4.11: it hangs" in why["ComfyUI 0.32.0"]
    app, text = application(), own.file("recipes/comfyui/app.toml").read_text()
    assert (app.version, app.manager, app.source[0].commit, len(app.source)) == ("0.31.0", "manager==2", commit, 1)
    assert app.paths == (
        'a "b" c',
        "comfy", "comfyui_version.py", "custom_nodes", "folder_paths.py", "fresh.py", "main.py",
        "nodes.py", "requirements.txt", "web",
    )  # fmt: skip
    assert "# My ComfyUI." in text
    assert f'commit = "{commit}" # v0.31.0, 2026-01-01' in text
    assert "# for --enable-manager" in text
    assert resolution.compile_all(check=True) == []
    found = requirements.find("cu130", "linux_x86_64", "3.11")
    assert found is not None
    assert found.versions().items() >= {"six": "2", "manager": "2", "torch": "2.14.0"}.items()
    assert {each for each, text in own.texts().items() if text != before[each]} == set(made.files)
    assert set(transaction.undo()) == {str(own.file(each)) for each in made.files}
    assert own.texts() == before
    with raises("usage", match="no update to undo"):
        transaction.undo()


def fill(own: Checkout, name: str, version: str, *requires: str, **contents: bytes) -> None:
    """Publish a wheel with files; `__` is a dot."""
    own.publish(name, version, *requires)
    with zipfile.ZipFile(own.place / "simple" / name / f"{name}-{version}-py3-none-any.whl", "a") as wheel:
        for file, content in contents.items():
            wheel.writestr(file.replace("__", "."), content)


def sizes(own: Checkout) -> dict[str, tuple[int, int]]:
    """The sizes in app.toml and stacks.toml."""
    tables = {"comfyui": tomli.loads(own.file("recipes/comfyui/app.toml").read_text())}
    tables |= tomli.loads(own.file("config/stacks.toml").read_text())
    return {name: (each["size"], each["files"]) for name, each in tables.items()}


def test_sizes_are_measured(own: Checkout) -> None:
    noise = random.Random(1).randbytes(30_000_000)
    fill(own, "six", "3", **{"six/data": noise, **{f"six/{'long' * 20}/{at}__py": b"x" for at in range(2_000)}})
    fill(own, "torch", "2.14.1", "cuda-toolkit==13.0.3", **{"torch/lib__so": noise})
    own.publish("torchvision", "0.29.1", "torch==2.14.1")
    own.tag("0.31.0", requirements__txt="six==3\n", fresh__bin="z" * 12_000_000)
    own.update("comfyui")
    found = sizes(own)
    assert found["cu130"] == (1, 1)  # did not move
    (size, inodes) = found["comfyui"]
    tree = sum(each.stat().st_size for each in source.fetch(application()).rglob("*") if each.is_file())
    exact = len(noise) + 2 * 2_000 * 4096 + tree  # a block for each file, and for its compiled code
    assert exact < size < exact + 11_000_000
    assert 4_000 < inodes < 4_200
    own.update("stack")
    assert sizes(own) == {"comfyui": (size, inodes), "cu130": (40_000_000, 100)}


def test_a_size_that_cannot_be_measured_stays(own: Checkout) -> None:
    own.ranges = False
    fill(own, "six", "3", **{"six/data": random.Random(1).randbytes(20_000_000)})
    own.tag("0.31.0", requirements__txt="six==3\n")
    made = own.update("comfyui")
    assert [each.new for each in made.moves] == ["0.31.0"]
    assert any("not measured" in each and "parts of files" in each for each in made.warnings)
    assert sizes(own)["comfyui"] == (1, 1)


def test_a_channel_moves_alone(own: Checkout) -> None:
    before = own.texts()

    def move(channel: str, to: str = "", kept: frozenset[str] = frozenset()) -> Proposal:
        return update.update(Request("comfyui", to, None, channel, kept), dry_run=False)[0]

    assert [each.new for each in move("stable").moves] == ["0.30.0"]
    commit = own.tag("0.31.0", requirements__txt="six==2\n")
    assert [(each.name, each.old, each.new) for each in move("latest").moves] == [
        ("ComfyUI (latest)", "0.30.0", "0.31.0")
    ]
    assert channels() == {"stable": "0.30.0", "latest": "0.31.0"}
    assert (application().version, application("latest").source[0].commit) == ("0.30.0", commit)
    resolution.compile_all(check=True)
    found = requirements.find("cu130", "linux_x86_64", "3.11", application("latest").path)
    assert found is not None
    assert found.versions()["six"] == "2"
    assert move("latest").moves == []
    own.tag("0.32.0", requirements__txt="six\n")
    move("")
    assert application().version == "0.32.0"
    assert application("stable").version == "0.30.0"  # kept, because it is a channel's
    move("", "0.31.0", frozenset({"0.32.0"}))
    assert [*versions()] == ["0.31.0", "0.30.0", "0.32.0"]
    resolution.compile_all(check=True)
    transaction.undo()
    assert application().version == "0.32.0"
    assert [*versions()] == ["0.32.0", "0.30.0", "0.31.0"]
    assert not own.file("recipes/comfyui/versions/0.32.0").exists()
    with raises("unknown-name"):
        move("lates")
    with raises("usage"):
        Request("nodes", channel="latest")
    assert own.texts().keys() > before.keys()


@pytest.mark.parametrize("to", ["", "0.30.0", "0.31.0", "0.32.0"])
def test_a_channel_whose_version_was_deleted_is_repaired(own: Checkout, to: str) -> None:
    own.tag("0.31.0", requirements__txt="six==2\n")
    wanted = Request("comfyui", "", None, "latest")
    update.update(wanted, dry_run=False)
    shutil.rmtree(own.file("recipes/comfyui/versions/0.31.0"))
    with raises("config") as caught:
        application("latest")
    assert caught.value.hint == "inv update comfyui --channel latest"
    own.tag("0.32.0", requirements__txt="six==2\n")
    made, _ = update.update(replace(wanted, to=to), dry_run=False)
    assert made.warnings == []
    assert channels() == {"latest": to or "0.32.0"}
    assert application("latest").version == (to or "0.32.0")
    resolution.compile_all(check=True)
    assert application().version == "0.30.0"


def test_an_older_channel_that_was_deleted_becomes_the_pinned_version(own: Checkout) -> None:
    own.file("recipes/comfyui/channels.toml").write_text('stable = "0.29.0"\n')
    update.update(Request("comfyui", "", None, "stable"), dry_run=False)
    assert channels() == {"stable": "0.30.0"}


def test_requirements_of_a_release_may_be_in_several_files(own: Checkout) -> None:
    more = {"requirements/base__txt": "six\n", "limits__txt": "six<2\n"}
    own.tag("0.31.0", requirements__txt="-r requirements/base.txt\n-c limits.txt\n", **more)
    assert own.moved("comfyui") == {"ComfyUI": "0.31.0"}
    assert {"limits.txt", "requirements"} <= {*application().paths}
    found = requirements.find("cu130", "linux_x86_64", "3.11")
    assert found
    assert found.versions()["six"] == "1"


def test_what_a_release_requires_is_fetched_once(own: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    own.tag("0.31.0", requirements__txt="six==2\n")
    own.update("comfyui")
    fetched = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("fetching")]
    assert fetched == ["requirements", "comfyui"]


def test_a_preview_never_prevents_an_update(own: Checkout) -> None:
    own.tag("0.31.0", requirements__txt="six==2\n")

    def look(old: Release, new: Release) -> Preview:
        (name,) = old.packages.keys() & new.packages.keys()
        assert (old.packages[name]["six"], new.packages[name]["six"]) == ("2", "2")
        assert old.tree != new.tree
        return Preview(old=old.version, new=new.version, migrations=("m1",))

    made, _ = update.update(Request("comfyui"), dry_run=True, look=look)
    assert made.preview == Preview(old="0.30.0", new="0.31.0", migrations=("m1",))
    assert any("m1" in line for line in update.rows(made))
    made, _ = update.update(Request("tool"), dry_run=True, look=look)
    assert made.preview is None

    def fail(*_: Release) -> Preview:
        raise ValueError("no way")

    made, _ = update.update(Request("comfyui"), dry_run=False, look=fail)
    assert made.warnings == ["the preview is incomplete: no way"]
    assert application().version == "0.31.0"


def test_a_requested_version(own: Checkout) -> None:
    own.tag("0.33.0", requirements__txt="six\naimdo==0.4.11\n")
    (made,) = own.update("comfyui", "v0.33.0").moves
    assert [each for each in made.notes if "known problem" in each] == [
        "known problem: it burns (https://example.org/2)",
        "known problem: aimdo 0.4.11: it hangs (https://example.org/1)",
    ]
    assert own.moved("comfyui", "0.30.0") == {"ComfyUI": "0.30.0"}
    with raises("unknown-name", match="no tag v0.33.1") as raised:
        own.update("comfyui", "0.33.1")
    assert "'0.33.0'" in raised.value.hint
    with raises("usage"):
        own.update("nodes", "1")
    for part in ("kernels", "comfy"):
        with pytest.raises(HearthError, match=r"kernels|comfy"):
            own.update(part)


def test_what_does_not_fit_changes_nothing(own: Checkout) -> None:
    own.publish("needs", "1", "six<2")
    own.tag("0.31.0")
    own.tag("0.32.0", requirements__txt="six==2\nneeds\n")
    own.tag("0.33.1", requirements__txt="nothing-of-this-name\n")
    own.tag("0.33.2", requirements__txt="torch>=99\nsix\n")
    before = own.texts()
    with raises("resolution", match=r"torch>=99 is required, and the stack cu130 has 2\.14\.0") as raised:
        own.update("comfyui")
    assert 'comfyui = "<0.33.2"' in raised.value.hint
    with raises("resolution", match="no set of versions") as raised:
        own.update("comfyui", "0.33.1")
    assert "nothing-of-this-name" in raised.value.cause
    assert "the newest version that fits: inv update comfyui --to 0.31.0" in raised.value.hint
    assert str(own.root) in raised.value.hint  # not the draft
    with raises("resolution") as raised:
        own.update("comfyui", "0.32.0")
    assert "needs" in raised.value.cause
    assert "inv update comfyui --to 0.31.0" in raised.value.hint
    assert own.texts() == before


def test_tags_that_were_moved_or_deleted(own: Checkout) -> None:
    own.tag("0.31.0")
    own.git("tag", "--force", "v0.30.0")
    with raises("tag-moved"):
        own.update("comfyui", "0.30.0")
    made = own.update("comfyui", dry_run=True)
    assert "the tag v0.30.0 is at commit" in made.warnings[0]
    assert made.moves
    own.git("tag", "--delete", "v0.30.0")
    assert "the tag v0.30.0 of the pinned ComfyUI does not exist" in own.update("comfyui").warnings[0]


def test_what_is_no_comfyui_is_refused(own: Checkout) -> None:
    before = own.texts()
    own.tag("0.31.0", requirements__txt="# nothing\n")
    own.git("rm", "--quiet", "requirements.txt", "nodes.py")
    own.tag("0.32.0")
    for version, cause in (("0.31.0", "its requirements.txt names no packages"), ("0.32.0", "it lacks nodes.py, req")):
        with raises("not-comfyui") as raised:
            own.update("comfyui", version)
        assert raised.value.cause.startswith(cause)
    made = own.update("comfyui")
    assert made.moves == []
    assert [each.split(":")[0] for each in made.skipped] == ["ComfyUI 0.32.0", "ComfyUI 0.31.0"]
    assert "it lacks nodes.py" in made.skipped[0]
    shutil.rmtree(own.place / "upstream")
    with raises("source-unreachable"):
        own.update("comfyui")
    assert own.texts() == before


def test_the_stack_moves_within_its_cuda(own: Checkout) -> None:
    own.publish("torch", "2.14.1", "cuda-toolkit==13.0.3")
    own.publish("torch", "2.14.2", "cuda-toolkit==13.0.3", date=NEW)
    own.publish("torch", "2.15.0", "cuda-toolkit==13.2.2")
    own.publish("torchvision", "0.29.1", "torch==2.14.1")
    own.publish("torchvision", "0.29.2", "torch")
    own.publish("nvidia-cuda-nvcc", "13.0.2")
    with raises("resolution", match=r"torch==2\.15\.0 fits the stack cu130"):
        own.update("stack", "2.15.0")
    made = own.moved("stack", cooldown="14d")
    assert made == {"cu130 torch": "2.14.1", "cu130 torchvision": "0.29.1", "cu130 nvidia-cuda-nvcc": "13.0.2"}
    assert (stack.find_stack().torch, requirements.trio(stack.find_stack())) == (
        "2.14.1", ["torch==2.14.1", "torchvision==0.29.1"],
    )  # fmt: skip
    assert "\"torchvision==0.29.1; sys_platform == 'linux'\", # 0.29.2" in own.file("pyproject.toml").read_text()
    assert '"2.14.1" # the newest' in own.file("config/stacks.toml").read_text()
    lockfile.renew(check=True)
    resolution.compile_all(check=True)
    assert own.moved("stack") == {"cu130 torch": "2.14.2", "cu130 torchvision": "0.29.2"}


def test_the_stack_goes_back(own: Checkout) -> None:
    own.publish("torch", "2.13.0", "cuda-toolkit==13.0.3")
    for version in ("0.27.9", "0.28.0"):
        own.publish("torchvision", version, "torch==2.13.0")
    assert own.moved("stack", "2.13.0") == {"cu130 torch": "2.13.0", "cu130 torchvision": "0.28.0"}
    with raises("resolution", match=r"torch==2\.12\.0 fits the stack cu130"):
        own.update("stack", "2.12.0")


def test_the_tool_moves_and_keeps_the_environments(own: Checkout) -> None:
    locks = {name: text for name, text in own.texts().items() if "/locks/" in name}
    for name in ("uv", "invoke"):
        own.publish(name, "1.1")
        own.publish(name, "1.2", date=NEW)
    assert own.moved("tool", cooldown="14d") == {"uv": "1.1", "invoke": "1.1"}
    lockfile.renew(check=True)
    assert "exclude-newer" not in own.file("uv.lock").read_text()
    assert own.moved("tool") == {"uv": "1.2", "invoke": "1.2"}
    assert own.moved("tool", cooldown="14d") == {}  # nothing moves back
    assert {name: text for name, text in own.texts().items() if "/locks/" in name} == locks


def test_edits_are_kept_and_shown(own: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    own.tag("0.31.0")
    path = own.file("recipes/comfyui/app.toml")
    renew = lockfile.renew

    def edit(*, check: bool) -> None:
        renew(check=check)
        path.write_text("# edited meanwhile\n" + path.read_text())

    with monkeypatch.context() as patch:
        patch.setattr(lockfile, "renew", edit)
        with raises("refused") as raised:
            own.update("comfyui")
    assert "+# edited meanwhile" in raised.value.cause
    assert application().version == "0.30.0"
    own.update("comfyui")
    assert "# edited meanwhile" in path.read_text()
    path.write_text("# mine\n" + path.read_text())
    before = own.texts()
    with raises("refused") as raised:
        transaction.undo()
    assert "+# mine" in raised.value.cause
    assert own.texts() == before


def test_an_update_during_a_deploy_waits_for_its_end(
    own: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All hosts of a group get the same pins."""
    own.tag("0.31.0")
    versions, text = [], ""
    updating: Future[Proposal]

    def on_each(*_: Any, **__: Any) -> list[Any]:
        nonlocal text, updating
        versions.append(application().version)
        updating = pool.submit(own.update, "comfyui")
        while "inv deploy is reading these files" not in text:
            assert not updating.done(), updating.result()
            text += capsys.readouterr().err
            time.sleep(0.01)
        versions.append(application().version)
        return []

    monkeypatch.setattr(deploy, "on_each", on_each)
    with ThreadPoolExecutor() as pool:
        deploy.deploy_each(["local"], Options(), build=None, bundle="", keep_going=False)
        assert [each.new for each in updating.result().moves] == ["0.31.0"]
    assert [*versions, application().version] == ["0.30.0", "0.30.0", "0.31.0"]


def test_nodes_move_and_a_dead_one_stays(own: Checkout) -> None:
    git = {name: Repository(own.place / name) for name in ("Mine", "Dead")}
    first = {name: each.commit(OLD, requirements="six") for name, each in git.items()}
    for each in git.values():
        node_updates.add(each.url, "a test")
    resolution.compile_all(check=False)
    second = git["Mine"].commit(OLD + timedelta(days=1), requirements="six==2")
    third = git["Mine"].commit(NEW, requirements="six>=1")
    assert own.moved("nodes", cooldown="14d") == {"Mine": second[:9]}
    assert own.moved("nodes", cooldown="14d") == {}
    shutil.rmtree(git["Dead"].place)
    wanted = Request("nodes")
    found, failures = outdated.outdated(wanted)
    assert failures.keys() == {"Dead"}
    assert [(each.pinned, each.newest, each.days) for each in found] == [(second[:9], third[:9], 2)]
    made, failures = update.update(wanted, dry_run=False)
    assert failures.keys() == {"Dead"}
    assert [each.new for each in made.moves] == [third[:9]]
    assert {name: each.commit for name, each in nodes.catalogue().nodes.items()} == {
        "Mine": third,
        "Dead": first["Dead"],
    }
    resolution.compile_all(check=True)
    assert own.moved("comfyui") == {}


def test_an_application_of_ones_own(own: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    app = own.place / "app"
    shutil.copytree(REAL / "comfy", app / "src/comfy", ignore=lambda *_: ["ldm", "text_encoders", "k_diffusion"])
    shutil.copy(REAL / "folder_paths.py", app / "src")
    (app / "src/requirements.txt").write_text("six==1")
    (app / "app.toml").write_text(
        'name = "comfyui"\nversion = "1"\ntree = ""\nextra = []\nsize = 1\nfiles = 1\n[[source]]\nfolder = "src"\n'
    )
    monkeypatch.setenv("HEARTH_APP", str(app))
    mine, before = Repository(own.place / "Mine"), own.texts()
    mine.commit(OLD, requirements="six")
    node_updates.add(mine.url, "a test")
    new = mine.commit(NEW, requirements="six<3")
    assert own.moved("nodes") == {"Mine": new[:9]}
    resolution.compile_all(check=True)
    assert [each.name for each in (app / "locks").iterdir()] == ["cu130-linux_x86_64-cp311.txt"]
    assert own.texts() == before  # the lists of the recipe stay
    with raises("config", match="no git source"):
        own.update("comfyui")
    transaction.undo()
    assert not (app / "locks").exists()
    resolution.compile_all(check=False)


def test_outdated_lists_every_part(own: Checkout) -> None:
    own.tag("0.31.0", NEW)
    own.tag("0.32.0", requirements__txt="six\naimdo==0.4.11\n")
    own.publish("torch", "2.14.1", "cuda-toolkit==13.0.3", date=NEW)
    own.publish("torchvision", "0.29.1", "torch==2.14.1")
    own.publish("invoke", "1.1", date=NEW)
    own.publish("invoke", "2.0rc1")
    for name, version in (("one", "1"), ("one", "2"), ("two", "1")):
        own.publish(name, version)
    for name in ("one", "two"):
        recipe = own.file(f"recipes/{name}/recipe.toml")
        recipe.parent.mkdir()
        recipe.write_text(f'name = "{name}"\n[[source]]\nsdist = "{name}"\nversion = "1"\n')
    found, failures = outdated.outdated(Request("all"))
    assert not failures
    assert {(each.part, each.name, each.newest) for each in found if each.newest != each.pinned} == {
        ("comfyui", "ComfyUI", "0.31.0"),
        ("stack", "cu130 torch", "2.14.1"),
        ("stack", "cu130 torchvision", "0.29.1"),
        ("kernels", "one", "2"),
        ("tool", "invoke", "1.1"),
    }
    assert {each.name: each.days for each in found}["ComfyUI"] == 2
    assert "0.32.0: aimdo 0.4.11: it hangs" in next(each.note for each in found if each.name == "ComfyUI")
    assert [*outdated.rows(found, failures)][-1] == "2 up to date, 5 outdated, 0 not examined"
    found, failures = outdated.outdated(Request("all", before=upstream.cutoff("14d")))
    assert {each.name for each in found if each.newest != each.pinned} == {"one"}
    shutil.rmtree(own.place / "upstream")
    shutil.rmtree(own.place / "simple/one")
    found, failures = outdated.outdated(Request("all"))
    assert failures.keys() == {"ComfyUI", "kernel one"}
    assert len(found) == 5


def test_many_requests_share_what_they_can(own: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own.connections
    for name in ("uv", "six", "invoke", "manager") * 3:
        upstream.package(name)
    assert own.connections == before + 1
    for minor in range(31, 50):
        own.tag(f"0.{minor}.0", requirements__txt="six\naimdo==0.4.11\n" if minor > 40 else "six\n")
    asked, problems = [], releases.problems

    def counted(*words: Any) -> list[str]:
        asked.append(words[1])
        return problems(*words)

    monkeypatch.setattr(releases, "problems", counted)
    found, _ = outdated.outdated(Request("comfyui"))
    assert [each.newest for each in found] == ["0.40.0"]
    assert len(found[0].note.split("; ")) == 9  # in order, and none that is older
    assert len(asked) <= 1 + 2 * releases.AHEAD
    own.tag("0.50.0", requirements__txt="six\n")
    asked.clear()
    found, _ = outdated.outdated(Request("comfyui"))
    assert ([each.newest for each in found], asked) == (["0.50.0"], ["0.50.0"])


@pytest.mark.parametrize("text", ["14", "d", "-1d", "1w", "99999d", "14d "])
def test_a_cooldown_has_a_unit(text: str) -> None:
    with raises("usage"):
        upstream.cutoff(text)
