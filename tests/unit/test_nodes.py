"""Custom nodes as data: refusals, selection, and the packages that a selection of nodes needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lock import nodes, requirement_files, requirements, resolution
from lock.application import application
from tests.errors import raises

NODE = 'url = "https://example.org/{name}"\ncommit = "' + "a" * 40 + '"\ntree = "t"\nwhy = "a test"\n'


def node(name: str, more: str = "") -> str:
    return f"[nodes.{name}]\n{NODE.format(name=name)}{more}\n"


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEARTH_APP", str(tmp_path))
    return tmp_path / "nodes.toml"


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (node("up").replace("nodes.up", 'nodes."../up"'), "config", "is not a valid node name"),
        (node("a").replace("a" * 40, "main"), "config", "not a full commit hash"),
        (node("a").replace("https://example.org/a", "/tmp/a"), "config", "not the address"),
        (node("a", 'writable = ["../../etc"]'), "config", "not below the node"),
        (node("a", 'system = ["-o=x"]'), "config", "is not a valid name of a Debian package"),
        (node("a", 'writable = ["/etc"]'), "config", "not below the node"),
        (node("a") + node("b").replace("example.org/b", "example.org/A.git"), "config", "are the same node"),
        (node("a") + node("A").replace("example.org/A", "example.org/b"), "config", "are the same node"),
        (node("a", 'requires = ["b"]') + node("b", 'requires = ["a"]'), "config", "a -> b -> a"),
        (node("a", 'requires = ["c"]') + node("b"), "unknown-name", "requires 'c'"),
        (node("a") + '[sets]\nmine = ["aa"]', "unknown-name", "set mine names 'aa'"),
        (node("a", 'whi = "x"'), "config", "whi"),
        ("nodes = [", "config", "is not TOML"),
    ],
)
def test_invalid_catalogue_is_refused(listed: Path, text: str, error: str, said: str) -> None:
    listed.write_text(text)
    with raises(error) as raised:
        nodes.catalogue()
    assert said in str(raised.value)


def test_sets_and_required_nodes_are_selected(listed: Path) -> None:
    text = node("a", 'requires = ["c"]') + node("b") + node("c") + '[sets]\nmine = ["a"]\n[left-out]\nd = "it is bad"\n'
    listed.write_text(text)
    found = nodes.catalogue()
    assert list(nodes.choose(found, ["mine"])) == ["a", "c"]
    assert list(nodes.choose(found, ["b", "mine"])) == ["a", "b", "c"]
    assert nodes.choose(found, []) == {}
    with raises("unknown-name", match="perhaps you meant 'mine'"):
        nodes.choose(found, ["mines"])
    with raises("config", match="it is bad"):
        nodes.choose(found, ["d"])


def test_the_known_nodes_load_and_each_set_can_be_chosen() -> None:
    found = nodes.catalogue()
    assert found.nodes
    for name in found.sets:
        assert nodes.choose(found, [name])
    assert all(each.why for each in found.nodes.values())
    assert all(each.why for each in found.override.values())


def test_overridden_packages_are_not_locked() -> None:
    for stack, platform, python in requirements.combinations(application().version):
        lock = requirements.find(stack.name, platform.value, python)
        assert lock
        there = re.findall(r"^([\w.-]+)==", lock.text, re.MULTILINE)
        replaced = [
            name for name, each in nodes.catalogue().override.items() if each.requirement.partition("=")[0] != name
        ]
        assert not set(there) & set(replaced)


LISTED = """\
# Compiled
base==1 \\
    --hash=sha256:aa
    # via -r comfyui.txt
deep-one==2 \\
    --hash=sha256:bb \\
    --hash=sha256:cc
    # via
    #   only-a
    #   other
only-a==3 \\
    --hash=sha256:dd
    # via -r a.node.txt
other==4 \\
    --hash=sha256:ee
    # via
    #   -r b.node.txt
torch==5 \\
    --hash=sha256:ff
    # via
    #   -r hearth.txt
    #   only-a
wheel-a @ https://example.org/1/Wheel.a-1.0%2Bcu130-py3-none-any.whl#sha256=00 \\
    --hash=sha256:00
    # via
    #   -c a.constraints.txt
    #   -r a.node.txt
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([], ["base==1", "torch==5"]),
        (["a"], ["base==1", "deep-one==2", "only-a==3", "torch==5", "wheel-a"]),
        (["b"], ["base==1", "deep-one==2", "other==4", "torch==5"]),
    ],
)
def test_a_host_gets_the_packages_that_its_nodes_reach(chosen: list[str], expected: list[str]) -> None:
    text = requirements.LockedList("cu130", "linux_x86_64", "3.12", LISTED).select(chosen)
    assert [line.split()[0] for line in text.splitlines() if not line.startswith(" ")] == expected
    assert ("sha256:bb" in text) == ("deep-one==2" in expected)
    assert "via" not in text


def test_a_wheel_by_address_has_a_version_and_is_found_offline() -> None:
    lock = requirements.LockedList("cu130", "linux_x86_64", "3.12", LISTED)
    assert lock.versions(["a"])["wheel-a"] == "1.0+cu130"
    assert requirements.offline(lock.select(["a"])).splitlines()[-2:] == [
        "wheel-a==1.0+cu130 \\",
        "    --hash=sha256:00",
    ]


@pytest.mark.parametrize("line", ["thing", "thing @ https://x/thing-1.tar.gz", "thing>=1"])
def test_an_unknown_line_of_a_list_is_an_error(line: str) -> None:
    with raises("lock-stale", match="pins no package"):
        requirements.LockedList("cu130", "linux_x86_64", "3.12", f"{LISTED}{line}\n").select(["a"])


def asked(tmp_path: Path, lines: str, override: dict[str, nodes.Override] | None = None) -> list[str]:
    (tmp_path / "requirements.txt").write_text(lines)
    listed = requirement_files.read(tmp_path)
    return requirements.pinnable("a", listed.requirements, nodes.Catalogue(override=override or {}))


def test_stack_torch_overrides_a_nodes_torch(tmp_path: Path) -> None:
    text = "torch==2.1\nTorchVision\ntorchsde # a comment\ntorchmetrics>1\n# nothing\n\nnumpy<2"
    assert asked(tmp_path, text) == ["torchsde", "torchmetrics>1", "numpy<2"]


@pytest.mark.parametrize(
    "line",
    [
        "git+https://example.org/x/thing.git",
        "git+https://example.org/x/thing.git@main#egg=thing",
        "thing @ https://example.org/thing-1.0.zip",
        "thing @ git+https://example.org/x/thing",
        "thing @ git+https://example.org/x/thing#sha256=" + "0" * 64,
        "thing @ https://example.org/thing-1.0-py3-none-any.whl?sha256=" + "0" * 64,
        "thing @ https://example.org/thing-1.0-py3-none-any.whl#sha256=00",
        "thing @ https://example.org/thing-1.0.tar.gz#sha256=" + "0" * 64,  # building it would run its code
        "thing @ https://example.org/thing.whl#sha256=" + "0" * 64,
        "-e git+https://example.org/x/y.git#egg=thing",
        "https://example.org/thing-1.0-py3-none-any.whl ; sys_platform == 'linux'",
    ],
)
def test_unpinnable_requirement_needs_an_override(tmp_path: Path, line: str) -> None:
    with raises("config", match="not a wheel that a hash pins"):
        asked(tmp_path, line)
    assert asked(tmp_path, line, {"thing": nodes.Override(why="")}) == []
    assert asked(tmp_path, line, {"thing": nodes.Override(why="", requirement="thing==1")}) == ["thing==1"]


@pytest.mark.parametrize("name", ["", "thing @ "])
@pytest.mark.parametrize("by", ["#sha256=", " --hash=sha256:"])
def test_an_address_with_its_hash_is_kept(tmp_path: Path, name: str, by: str) -> None:
    line = "https://example.org/thing-1.0-py3-none-any.whl{}" + "0" * 64
    assert asked(tmp_path, name + line.format(by)) == [f"thing @ {line.format('#sha256=')}"]


@pytest.mark.parametrize(
    "line",
    [
        "https://example.org/thing-1.0-cp312-cp312-win_amd64.whl ; sys_platform == 'win32'",
        "https://example.org/thing-1.0-cp312-cp312-win_amd64.whl; platform_system == 'Windows'",
        "thing @ https://example.org/thing.zip; sys_platform == 'darwin'",
        "git+https://example.org/x/thing.git ; python_version < '3.9'",
        "thing ; os_name == 'nt' or platform_machine == 'AMD64'",
    ],
)
def test_what_never_applies_is_not_asked_for(tmp_path: Path, line: str) -> None:
    assert asked(tmp_path, f"{line}\nsix") == ["six"]


@pytest.mark.parametrize("line", ["-e .", ".", "./wheels/thing.whl", "file:.", "numpy>=1.x", "six six"])
def test_a_requirement_that_is_none_names_the_way_out(tmp_path: Path, line: str) -> None:
    with raises("config", match="not a requirement that can be pinned") as raised:
        asked(tmp_path, line)
    assert "`extra`" in raised.value.hint


@pytest.mark.parametrize(
    "line",
    [
        "a @ https://host/${UV_INDEX_PRIVATE_PASSWORD}/a.whl#sha256=" + "0" * 64,
        "a @ https://host/a.whl#sha256=" + "0" * 64 + "&x=\\",
        "a @ https://host/a.whl\n--index-url=https://evil/simple\n#sha256=" + "0" * 64,
        "a @ https://host/a.whl\r-r/etc/passwd#sha256=" + "0" * 64,
        "a; " + "(" * 900 + "os_name == 'x'" + ")" * 900,
        "https://" + "/a@" * 9_000 + " x",
        "a>=" + "1" * 5_000,
        "--index-url https://evil/simple",
        "-e .",
        "-r /etc/passwd",
        "a --config-settings=x",
        "a # b",
    ],
)
def test_uv_options_in_requirements_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = [{json.dumps(line)}]")
    with raises("config", match="not a requirement that can be pinned"):
        requirements.pinnable("it", requirement_files.read(tmp_path).requirements, nodes.Catalogue())
    with raises("config", match="is not a requirement"):
        requirements.plain(line)


def test_unchanged_requirements_need_no_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src/comfy").mkdir(parents=True)
    (tmp_path / "locks").mkdir()
    for name, text in {"comfy/cli_args.py": "", "folder_paths.py": "", "requirements.txt": "six\n"}.items():
        (tmp_path / "src" / name).write_text(text)
    (tmp_path / "app.toml").write_text(
        'name = "comfyui"\nversion = "0.1"\ntree = ""\nextra = []\nsize = 1\nfiles = 1\n[[source]]\nfolder = "src"\n'
    )
    monkeypatch.setenv("HEARTH_APP", str(tmp_path))
    known = nodes.catalogue()
    asked = requirements.requirement_inputs(application(), known)
    for stack, platform, python in requirements.combinations():
        path = tmp_path / "locks" / f"{requirements.LockedList(stack.name, platform.value, python, '').name}.txt"
        path.write_text(f"# before\n# What they ask for: {resolution.asked_hash(asked, known, stack)}\nsix==1.17.0\n")
    monkeypatch.setenv("PATH", "")  # no uv: nothing can be resolved
    assert len(resolution.compile_all(check=False)) == len(requirements.combinations())
    assert all(path.read_text().endswith("\nsix==1.17.0\n") for path in (tmp_path / "locks").iterdir())
    assert resolution.compile_all(check=True) == []
    (tmp_path / "src/requirements.txt").write_text("six<1\n")
    with raises("program-missing"):
        resolution.compile_all(check=False)
