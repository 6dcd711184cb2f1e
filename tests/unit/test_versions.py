"""Several versions of ComfyUI: channels, bounds of stacks, and trees that the lock does not cover or that are none."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from invoke.context import Context

from core import files, lockfile, workspace
from core.stack import find_stack, stacks
from core.workspace import Workspace
from deploy import profile as loaded
from deploy import release_refusals
from deploy.host import Host, Target
from deploy.inputs import Inputs, gather
from deploy.plan import Options, make
from deploy.selection import choose
from lock import application as applications
from lock import audit, nodes, requirements, resolution, tasks
from lock.application import PINNED
from ops import profiles, status, workflows
from tests import comfyui
from tests.errors import raises
from tests.plans import FRESH, reasons, spark

APP = 'name = "comfyui"\nversion = "{}"\ntree = ""\nextra = []\nsize = 1\nfiles = 1\n[[source]]\nfolder = "src"\n'
TREE = {
    "comfy/cli_args.py": "parser.add_argument('--cpu', action='store_true')\n",
    "folder_paths.py": "folder_names_and_paths = {}\n",
    "requirements.txt": "torch\nsix\n",
    "nodes.py": 'NODE_CLASS_MAPPINGS = {"KSampler": 1}\n',
}
LIST = "torch==2.14.1\n    # via -r hearth.txt\nsix==1.17.0\n    # via -r comfyui.txt\n"


@dataclass
class Own:
    """A folder with versions of a small ComfyUI; the first one is pinned."""

    place: Path

    def add(self, version: str, listed: str = LIST, stack: str = "cu130", **tree: str) -> Path:
        place = self.place / "versions" / version if (self.place / "app.toml").exists() else self.place
        for name, text in (TREE | {name.replace("__", "/"): text for name, text in tree.items()}).items():
            (place / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "src" / name).write_text(text)
        (place / "locks").mkdir()
        for python in ("3.11", "3.12"):
            name = requirements.LockedList(stack, "linux_aarch64", python, "").name
            (place / "locks" / f"{name}.txt").write_text(listed)
        (place / "app.toml").write_text(APP.format(version))
        return place

    def channels(self, text: str) -> None:
        (self.place / "channels.toml").write_text(text)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    found = Own(tmp_path / "app")
    found.place.mkdir()
    found.add("0.30.0")
    monkeypatch.setenv("HEARTH_APP", str(found.place))
    return found


def host(which: str, **values: object) -> Target:
    """A Spark that selects a version, with its profile's kernels and nodes left out."""
    target = spark(comfyui=which)
    profile = msgspec.structs.replace(target.profile, kernels=(), nodes=(), flags={}, **values)
    return replace(target, profile=profile)


# --- selection -------------------------------------------------------------------------------------------------------


def test_a_host_gets_the_version_that_it_selects(own: Own) -> None:
    newer, newest = own.add("0.46.0", LIST.replace("1.17.0", "1.18.0")), own.add("0.100.0")
    own.channels('stable = "0.46.0"\nlatest = "0.100.0"\n')
    assert list(applications.versions().items()) == [("0.30.0", own.place), ("0.46.0", newer), ("0.100.0", newest)]
    for which, version in {PINNED: "0.30.0", "stable": "0.46.0", "latest": "0.100.0", "0.46.0": "0.46.0"}.items():
        target = host(which)
        stock = gather(target)
        assert (target.comfyui, stock.application.version) == (version, version)
        assert stock.application.path == applications.versions()[version]
        (six,) = {lock.versions()["six"] for lock in stock.locks.values()}
        assert six == ("1.18.0" if version == "0.46.0" else "1.17.0")
        selection, against = choose(target, FRESH, stock)
        assert not against
        assert selection
        assert selection.application.version == version
    assert Host().comfyui == PINNED


def test_a_profile_is_explained_for_the_version_of_a_host(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.add("0.46.0")
    own.channels('latest = "0.46.0"\n')
    (tmp_path / "hosts.toml").write_text(
        '[hosts.a]\naddress = "a"\nprofile = "cpu"\ncomfyui = "latest"\n[hosts.b]\naddress = "b"\nprofile = "cpu"\n'
    )
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    profile = {"cpu": loaded.Profile(summary="s", pythons=("3.12",), start_seconds=1, flags={
        "--new": loaded.Setting(why="w", comfyui=">=0.46"),
    })}  # fmt: skip
    monkeypatch.setattr(loaded, "profiles", lambda: profile)
    for name, version in {"": "0.30.0", "a": "0.46.0", "b": "0.30.0"}.items():
        found = profiles.one("cpu", name)
        assert found.comfyui == version
        assert bool(found.lines[0].stacks) == (version == "0.46.0")
        assert f"with ComfyUI {version} and" in "\n".join(profiles.rows(found, explain=True))
    with raises("unknown-name"):
        profiles.one("cpu", "c")


@pytest.mark.parametrize(
    ("which", "hint"),
    [
        ("0.46", "perhaps you meant '0.46.0'"),
        ("lates", "perhaps you meant 'latest'"),
        ("9.9", "inv update comfyui --to"),
        ("../app", "known: "),
        ("stable", "inv update comfyui --channel stable"),
        ("latest", "inv update comfyui --channel latest"),
    ],
)
def test_an_unknown_version_names_near_ones_and_the_command(own: Own, which: str, hint: str) -> None:
    own.add("0.46.0")
    own.channels('latest = "0.47.0"\n')
    with raises("config") as raised:
        gather(host(which))
    assert hint in raised.value.hint
    host(which).site  # noqa: B018  what needs no version works: stop, logs, rollback


@pytest.mark.parametrize(
    ("text", "match"),
    [('newest = "1"\n', "newest"), ("stable = 1\n", "str"), ("stable\n", "not TOML")],
)
def test_channels_are_checked(own: Own, text: str, match: str) -> None:
    own.channels(text)
    with raises("config", match=match):
        applications.application("stable")


@pytest.mark.parametrize("version", ["", "mine", "0.46.1"])
def test_the_version_of_a_folder_is_checked(own: Own, version: str) -> None:
    (own.add("0.46.0") / "app.toml").write_text(APP.format(version))
    with raises("config", match=r"0\.46\.0/app\.toml"):
        applications.versions()


def test_versions_that_nothing_selects_are_listed(own: Own) -> None:
    paths = {version: own.add(version) for version in ("0.45.0", "0.46.0", "0.47.0")}
    own.channels('stable = "0.45.0"\n')
    assert applications.unused([PINNED, "0.46.0"]) == [paths["0.47.0"]]
    assert applications.unused(["latest"]) == [paths["0.46.0"], paths["0.47.0"]]
    (own.place / "app.toml").write_text(APP.format("0.47.0"))  # the pinned version moved there
    assert applications.unused(["0.46.0", "0.47.0"]) == [paths["0.47.0"]]
    assert applications.find("0.47.0") == own.place


def test_lock_names_versions_that_nothing_selects(
    own: Own, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used, left = own.add("0.45.0"), own.add("0.46.0")
    (own.place / "hosts.toml").write_text('[hosts.far]\naddress = "far"\nprofile = "cpu"\ncomfyui = "0.45.0"\n')
    monkeypatch.setenv("HEARTH_HOSTS", str(own.place / "hosts.toml"))
    monkeypatch.setattr(lockfile, "renew", lambda **_: None)
    monkeypatch.setattr(resolution, "compile_all", lambda **_: [])
    tasks.lock(Context(), check=True)
    said = capsys.readouterr().err
    assert f"rm -r {left}\n" in said
    assert str(used) not in said


def test_the_pinned_version_stays_known_when_another_one_replaces_it(own: Own) -> None:
    applications.set_channel("stable", "0.30.0")
    kept = applications.copied("0.30.0")
    assert applications.find("stable") == own.place  # the same, so far
    (own.place / "app.toml").write_text(APP.format("0.46.0"))
    assert applications.find("stable") == kept
    assert requirements.find("cu130", "linux_aarch64", "3.11", kept) is not None
    applications.set_channel("latest", "0.46.0")
    assert applications.channels() == {"stable": "0.30.0", "latest": "0.46.0"}
    with raises("unknown-name"):
        applications.set_channel("newest", "0.46.0")


def test_hosts_with_one_profile_and_other_versions_have_other_inputs(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    own.add("0.46.0")
    seen: list[str] = []

    class AskedError(Exception):
        """The agent was asked."""

    class Agent:
        def call(self, *_: object, **__: object) -> object:
            raise AskedError

    known: dict[str, object] = {}

    def gathered(target: Target) -> Inputs:
        seen.append(target.comfyui)
        return gather(target)

    monkeypatch.setattr(status, "gather", gathered)
    for which in (PINNED, "0.46.0", PINNED):
        with pytest.raises(AskedError):
            status._one(Agent(), host(which), known)  # type: ignore[arg-type]
    assert seen == ["0.30.0", "0.46.0"]


def test_audit_and_workflows_know_every_version(own: Own) -> None:
    place = own.add("0.46.0", LIST.replace("1.17.0", "1.18.0"))
    own.channels('latest = "0.46.0"\n')
    found = audit.locked()
    assert "cu130-linux_aarch64-cp311" in found.packages["six", "1.17.0"]
    assert found.packages["six", "1.18.0"] == [f"0.46.0/cu130-linux_aarch64-cp{each}" for each in ("311", "312")]
    assert [each.version for each in found.repositories] == ["0.30.0", "0.46.0"]
    assert workflows.tree("latest") == workflows.tree("0.46.0") == place / "src"
    with raises("config", match="is not a ComfyUI"):
        workflows.compare(f"{own.place}/versions")


def test_a_bundle_has_one_version(own: Own) -> None:
    checkout = own.place.parent / "checkout"
    shutil.copytree(own.place, checkout / "recipes/comfyui")
    here = Workspace.of_bundle(own.place.parent)
    with workspace.using(here):
        for which in (PINNED, "stable", "latest", "0.30.0"):
            assert applications.application(which).path == checkout / "recipes/comfyui"
        with raises("config") as raised:
            applications.version("0.46.0")
    assert "inv bundle" in raised.value.hint


# --- bounds of stacks ------------------------------------------------------------------------------------------------


def test_a_stack_has_no_lists_for_versions_that_it_does_not_run() -> None:
    assert {stack.name for stack, _, _ in requirements.combinations("0.31.9")} == {"cu124", "cu130"}
    assert {stack.name for stack, _, _ in requirements.combinations("0.32.0")} == {"cu130"}
    assert not find_stack("cu124").runs("0.32.0rc1")
    assert find_stack("cu124").runs("0.31.0+mine")
    assert not any(stack.runs("0.30.0") for stack in stacks().values() if stack.builds_only)


def test_a_stack_that_does_not_run_the_version_is_refused_with_the_newest_that_fits(own: Own) -> None:
    own.add("0.31.0", stack="cu124")
    own.add("0.46.0")
    facts = replace(FRESH, machine="x86_64")
    target = host("0.46.0", stack="cu124")
    (refusal,) = make(target, facts, gather(target), Options()).refusals
    assert refusal.kind == "unfit-stack"
    assert '"0.31.0"' in refusal.remedy
    assert release_refusals.unfit_stack(host("0.31.0", stack="cu124")) == []
    # nor is such a stack offered for an old driver
    for which, offered in (("0.30.0", True), ("0.46.0", False)):
        (old,) = release_refusals.gpu(host(which), replace(facts, driver="550.90"))
        assert (old.kind, '"cu124"' in old.remedy) == ("old-driver", offered)


@pytest.mark.parametrize("text", ["0.32", "<abc", "<0.32;"])
def test_a_bound_is_a_version_range(text: str, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    old = (files.CHECKOUT / "config/stacks.toml").read_text()
    (tmp_path / "config/stacks.toml").write_text(old.replace('"<0.32"', f'"{text}"'))
    with workspace.using(replace(workspace.current(), checkout=tmp_path)), raises("config", match="cu124"):
        stacks()


# --- trees that the lock does not cover ------------------------------------------------------------------------------


def test_the_lock_covers_the_pinned_comfyui() -> None:
    app, known = applications.application(), nodes.catalogue()
    wanted = [*requirements.required(app, known), app.manager]
    for stack, platform, python in requirements.combinations(app.version):
        lock = requirements.find(stack.name, platform.value, python, app.path)
        assert lock
        assert requirements.uncovered(lock, wanted, [requirements.MANAGER]) == {}
        assert app.manager in requirements.uncovered(lock, wanted, [])  # a host gets it only when it is enabled


@pytest.mark.parametrize(
    ("edit", "lacking"),
    [
        (("einops\n", ""), set()),  # an older ComfyUI, which required less
        (("einops\n", "einops\nsome-other-package\n"), {"some-other-package"}),
        (("comfy-kitchen==0.2.26", "comfy-kitchen==0.2.41"), {"comfy-kitchen==0.2.41"}),
        (("numpy>=1.25.0", "NumPy >= 99"), {"NumPy>=99"}),
        (("numpy>=1.25.0", 'numpy>=99 ; sys_platform == "win32"\n'), set()),
        (("numpy>=1.25.0", 'numpy>=99 ; platform_machine == "aarch64"'), {'numpy>=99; platform_machine == "aarch64"'}),
        (("torch\n", "torch>=99\n"), {"torch>=99"}),
        (("einops\n", "imageio-ffmpeg\n"), {"imageio-ffmpeg"}),  # only a node's package
    ],
)
def test_a_tree_that_the_lock_does_not_cover_is_refused(
    edit: tuple[str, str], lacking: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = files.CHECKOUT / "recipes/comfyui"
    (tmp_path / "src").mkdir()
    for path in comfyui.tree().iterdir():
        (tmp_path / "src" / path.name).symlink_to(path)
    text = (comfyui.tree() / "requirements.txt").read_text()
    assert edit[0] in text
    (tmp_path / "src/requirements.txt").unlink()
    (tmp_path / "src/requirements.txt").write_text(text.replace(*edit))
    app = (recipe / "app.toml").read_text().partition("[[source]]")[0]
    (tmp_path / "app.toml").write_text(f'{app}[[source]]\nfolder = "src"\n')  # without lists of its own: the recipe's
    shutil.copy(recipe / "nodes.toml", tmp_path)
    monkeypatch.setenv("HEARTH_APP", str(tmp_path))
    monkeypatch.setattr(files, "tree_hash", lambda _: "t" * 64)
    target = host(PINNED)
    planned = make(target, FRESH, gather(target), Options())
    assert reasons(planned) == ["uncovered"] * bool(lacking)
    selection, _ = choose(target, FRESH, gather(target))
    assert selection
    wanted = requirements.required(selection.application, nodes.catalogue())
    assert requirements.uncovered(selection.lock, wanted, []).keys() == lacking
    assert all(each in planned.refusals[0].what for each in lacking)


@pytest.mark.usefixtures("own")
def test_overrides_and_extra_packages_count() -> None:
    app = msgspec.structs.replace(applications.application(), extra=("lacking",))
    known = nodes.Catalogue(
        override={
            "six": nodes.Override(why="w", requirement="seven>=7"),
            "torch": nodes.Override(why="w"),
        }
    )
    wanted = requirements.required(app, known)
    assert wanted == ["seven>=7", "lacking"]
    lock = requirements.LockedList("cu130", "linux_aarch64", "3.11", LIST.replace("six==1.17.0", "seven==7"))
    assert requirements.uncovered(lock, wanted, []) == {"lacking": ""}
    assert requirements.uncovered(lock, ["seven<7"], []) == {"seven<7": "7"}
    address = "seven @ https://example.org/seven-{}-py3-none-any.whl#sha256=" + "0" * 64
    assert requirements.uncovered(lock, [address.format("7")], []) == {}
    assert requirements.uncovered(lock, [address.format("8")], []).keys() == {address.format("8")}


def test_a_version_without_lists_is_refused(own: Own) -> None:
    shutil.rmtree(own.add("0.46.0") / "locks")
    with raises("lock-stale", match=r"ComfyUI 0\.46\.0"):  # the recipe's lists are for another version
        gather(host("0.46.0"))


# --- trees that are no ComfyUI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["comfy/cli_args.py", "folder_paths.py", "requirements.txt"])
@pytest.mark.parametrize("damage", ["missing", "folder", "bytes"])
def test_a_tree_that_is_no_comfyui_is_an_error(own: Own, name: str, damage: str) -> None:
    path = own.place / "src" / name
    path.unlink()
    if damage == "folder":
        path.mkdir()
        (path / "x").touch()
    if damage == "bytes":
        path.write_bytes(b"six\n\xff\xfe = 1\n")
    for read in (lambda: gather(host(PINNED)), lambda: resolution.compile_all(check=False)):
        with raises("config") as raised:
            read()
        assert name in raised.value.cause or "is not a requirement" in raised.value.what


@pytest.mark.parametrize("text", ["", "[[source]]\nfolder = 'nowhere'\n", "[[source]]\nfolder = 'app.toml'\n"])
def test_a_source_that_does_not_exist_is_an_error(own: Own, text: str) -> None:
    head = APP.format("0.30.0").partition("[[source]]")[0]
    (own.place / "app.toml").write_text(f"{head}{text or 'source = []'}")
    with raises("config"):
        applications.application()
