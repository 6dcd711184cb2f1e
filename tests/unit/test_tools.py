"""uv and git behave the same with any environment and settings of the caller."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from agent.schema.uv import index_settings
from core import shell, source, tools
from kernels import recipe
from kernels import source as kernel_source
from lock import nodes
from lock.updates import upstream
from tests.conftest import FIXTURES
from tests.errors import raises
from tests.repositories import repository

HOSTILE = {
    ".gitattributes": "*.txt text eol=crlf\n*.id ident\n*.upper filter=upper\n*.lfs filter=lfs\n"
    "*.enc working-tree-encoding=UTF-16\n",
    "a.txt": "one\ntwo\n",
    "b.txt": "crlf\r\n",
    "c.id": "$Id$\n",
    "d.upper": "small\n",
    "e.lfs": "version https://git-lfs.github.com/spec/v1\n",
    "f.enc": "text\n",
    "g.py": "x = 1\n",
}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose git configuration changes bytes and runs programs, with a misleading caller's environment."""
    home, ran = tmp_path / "home", tmp_path / "ran"
    (home / "hooks").mkdir(parents=True)
    (home / "template/hooks").mkdir(parents=True)
    for hook in (
        home / "hooks/post-checkout",
        home / "hooks/reference-transaction",
        home / "template/hooks/post-checkout",
    ):
        hook.write_text(f"#!/bin/sh\necho hook >> {ran}\n")
        hook.chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[core]\nautocrlf = true\neol = crlf\nhooksPath = {home}/hooks\nsymlinks = true\n"
        f'fsmonitor = "echo monitor >> {ran}; true"\nattributesFile = {home}/attributes\n'
        f"[init]\ntemplateDir = {home}/template\n[submodule]\nrecurse = true\n"
        '[filter "upper"]\nsmudge = tr a-z A-Z\nclean = cat\nrequired = true\n'
        '[filter "lfs"]\nsmudge = echo smudged\nprocess = false\nrequired = true\n'
        '[log]\nshowSignature = true\n[protocol "ext"]\nallow = always\n[apply]\nignoreWhitespace = change\n'
    )
    (home / "attributes").write_text("* text eol=crlf filter=upper\n")
    for name, value in {
        "HOME": str(home),
        "GIT_DIR": str(tmp_path / "no-such"),
        "GIT_WORK_TREE": "/nowhere",
        "GIT_INDEX_FILE": "/nowhere/index",
        "GIT_OBJECT_DIRECTORY": "/nowhere/objects",
        "GIT_TEMPLATE_DIR": str(home / "template"),
        "GIT_NAMESPACE": "other",
        "GIT_ALLOW_PROTOCOL": "ext",
        "GIT_TRACE": "1",
        "GIT_CONFIG_PARAMETERS": "'core.autocrlf=true'",
        "LC_ALL": "de_DE.UTF-8",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    return ran


def plain(place: Path, contents: dict[str, str], *more: tuple[str, ...]) -> str:
    """A repository created by a git that ignores this machine's settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_TEMPLATE_DIR"):
            patch.delenv(name, raising=False)
        for name in ("GIT_NAMESPACE", "GIT_ALLOW_PROTOCOL", "GIT_TRACE", "GIT_CONFIG_PARAMETERS"):
            patch.delenv(name, raising=False)
        patch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
        place.mkdir(parents=True)
        attributes = place / ".git/info/attributes"
        subprocess.run(["git", "init", "--quiet", str(place)], check=True)
        attributes.parent.mkdir(exist_ok=True)
        attributes.write_text("* -text !filter !ident !working-tree-encoding\n")
        return repository(place, contents, *more)


@pytest.mark.parametrize("limits", [{}, {"without": ("g.py",)}], ids=["whole", "limited"])
def test_source_bytes_ignore_git_configuration(
    hostile: Path, tmp_path: Path, limits: dict[str, tuple[str, ...]]
) -> None:
    commit = plain(tmp_path / "repo", HOSTILE)
    where = source.Source(git=f"file://{tmp_path}/repo", commit=commit)
    tree = source.fetch(source.pin(source.Pinned(name="it", version="1", source=(where,), tree="", **limits)))  # type: ignore[arg-type]
    found = {path.name: path.read_bytes().decode() for path in tree.iterdir()}
    assert found == {name: text for name, text in HOSTILE.items() if name not in limits.get("without", ())}
    assert not hostile.exists()


def test_submodule_bytes_ignore_git_configuration(hostile: Path, tmp_path: Path) -> None:
    plain(tmp_path / "part", HOSTILE)
    add = ("submodule", "--quiet", "add", f"file://{tmp_path}/part", "part")
    commit = plain(
        tmp_path / "whole", {"one.py": ""}, add, ("config", "-f", ".gitmodules", "submodule.part.url", "../part")
    )
    node = nodes.Node(url=f"file://{tmp_path}/whole", commit=commit, tree="", why="w", submodules=("part",))
    tree = source.fetch(source.pin(node.pinned("it")))
    assert {path.name: path.read_bytes().decode() for path in (tree / "part").iterdir()} == HOSTILE
    assert not hostile.exists()
    other = nodes.Node(url=node.url, commit=commit, tree="", why="w", submodules=("one.py",))
    with raises("config", match=r"has no submodule 'one\.py'"):
        source.pin(other.pinned("it"))


def test_patches_ignore_git_configuration(hostile: Path, tmp_path: Path) -> None:
    tiny = recipe.load_recipe(FIXTURES / "recipes/tiny")
    shutil.copytree(tiny.path / "src", tmp_path / "src")
    before = (tmp_path / "src/tiny/__init__.py").read_bytes()
    kernel_source._apply(tiny, tiny.patches[0], tmp_path / "src")
    after = (tmp_path / "src/tiny/__init__.py").read_bytes()
    assert after != before
    assert b"\r" not in after
    assert not hostile.exists()
    (tmp_path / "src/tiny/__init__.py").write_bytes(before.replace(b" = ", b"  =  "))
    with raises("patch", match="0001"):
        kernel_source._apply(tiny, tiny.patches[0], tmp_path / "src")


def test_update_checks_ignore_the_callers_git_configuration(hostile: Path, tmp_path: Path) -> None:
    commit = plain(tmp_path / "repo", {"a.py": ""})
    assert upstream.newest(f"file://{tmp_path}/repo") == commit
    assert upstream.holds(f"file://{tmp_path}/repo", commit, commit) is True
    assert not hostile.exists()


@pytest.mark.parametrize("url", ["ext::sh -c 'touch {ran}'", "--upload-pack=touch {ran}"])
def test_repository_addresses_run_no_program(hostile: Path, url: str) -> None:
    address = url.format(ran=hostile)
    assert upstream.holds(address, "a" * 40, "b" * 40) is None
    with pytest.raises(Exception, match="cannot be reached"):
        upstream.newest(address)
    assert not hostile.exists()


def test_the_users_own_mirror_and_credentials_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = plain(tmp_path / "repo", {"a.py": ""})
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.gitconfig").write_text(f'[url "file://{tmp_path}/"]\ninsteadOf = https://example.org/\n')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert upstream.newest("https://example.org/repo") == commit
    monkeypatch.setenv("GIT_SSH_COMMAND", "ssh -i key")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    told = tools.git("-c", "alias.told=!env", "told").stdout.splitlines()
    assert {"GIT_SSH_COMMAND=ssh -i key", "HTTPS_PROXY=http://proxy:1"} <= set(told)


LINKS = {
    "to a file elsewhere": ("web.js", "{secret}"),
    "to a folder elsewhere": ("web", "{folder}"),
    "by a relative way out": ("sub/web.js", "../../../../../../../../../../../../{secret}"),
    "to another link that leads out": ("second.js", "first.js"),
    "to a folder of the tree": ("more", "sub"),
    "to nothing": ("web.js", "nothing"),
    "to git's own files": ("web.js", ".git/config"),
    "to itself": ("web.js", "web.js"),
}


@pytest.mark.process
@pytest.mark.parametrize(("name", "target"), LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("limits", [{}, {"without": ("docs",)}], ids=["whole", "limited"])
def test_a_repository_with_a_link_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, target: str, limits: dict[str, tuple[str, ...]]
) -> None:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    secret = tmp_path / "secrets/id_ed25519"
    secret.parent.mkdir()
    secret.write_text("PRIVATE KEY")
    links = {"first.js": str(secret)} if target == "first.js" else {}
    commit = linked(tmp_path / "repo", {**links, name: target.format(secret=secret, folder=secret.parent)})
    node = nodes.Node(url=f"file://{tmp_path}/repo", commit=commit, tree="", why="w", **limits)  # type: ignore[arg-type]
    with raises("unsafe-tree", match=r"(web|first|second|more)\S* is a link to"):
        source.pin(node.pinned("it"))
    pinned = nodes.Node(url=node.url, commit=commit, tree="a" * 64, why="w", **limits)  # type: ignore[arg-type]
    with raises("unsafe-tree", match="is a link to"):
        nodes.fetch({"it": pinned})
    assert "PRIVATE KEY" not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "cache").rglob("*") if path.is_file()
    )


def linked(place: Path, links: dict[str, str]) -> str:
    """A repository with two files and these links."""
    (place / "sub").mkdir(parents=True)
    for name, target in links.items():
        (place / name).symlink_to(target)
    return repository(place, {"__init__.py": "x = 1\n", "sub/inner.py": "y = 2\n"})


def test_a_link_to_a_file_of_the_tree_is_that_file_and_a_pin_stays_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    commit = linked(tmp_path / "repo", {"same.py": "sub/inner.py", "sub/again.py": "../same.py"})
    node = nodes.Node(url=f"file://{tmp_path}/repo", commit=commit, tree="", why="w")
    pinned = source.pin(node.pinned("it"))
    tree = source.fetch(pinned)
    assert not [path for path in tree.rglob("*") if path.is_symlink()]
    assert (tree / "sub/again.py").read_text() == (tree / "same.py").read_text() == "y = 2\n"
    # as computed when links were followed
    digest = hashlib.sha256()
    for name in sorted(("__init__.py", "same.py", "sub/again.py", "sub/inner.py")):
        content = hashlib.sha256((tmp_path / "repo" / name).read_bytes()).hexdigest()
        digest.update(f"{name}\0-\0{content}\n".encode())
    assert pinned.tree == digest.hexdigest()


def wheel(place: Path, name: str) -> Path:
    path = place / f"{name}-1-py3-none-any.whl"
    about = f"{name}-1.dist-info"
    texts = {
        f"{name}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in texts.items():
            archive.writestr(inner, text)
        archive.writestr(f"{about}/RECORD", "".join(f"{each},,\n" for each in [*texts, f"{about}/RECORD"]))
    return path


MISLEADING = {
    "target": '[pip]\ntarget = "{elsewhere}"\n',
    "prefix": '[pip]\nprefix = "{elsewhere}"\n',
    "exclude-newer": 'exclude-newer = "2001-01-01T00:00:00Z"\n',
    "required-version": 'required-version = ">=99"\n',
    "no-binary": '[pip]\nno-binary = [":all:"]\n',
    "not TOML": "[[[",
}


@pytest.mark.parametrize("text", MISLEADING.values(), ids=MISLEADING)
def test_uv_target_ignores_uv_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "config/uv").mkdir(parents=True)
    (tmp_path / "config/uv/uv.toml").write_text(text.format(elsewhere=elsewhere))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = wheel(tmp_path, "alone")
    tools.uv("pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", tmp_path / "here", found)
    assert (tmp_path / "here/alone.py").exists()
    assert not elsewhere.exists()


def test_uv_gets_no_variable_that_chooses_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "constraints").write_text("alone==2\n")
    for name, value in {
        "UV_CONSTRAINT": str(tmp_path / "constraints"),
        "UV_BUILD_CONSTRAINT": str(tmp_path / "missing"),
        "UV_CONFIG_FILE": str(tmp_path / "missing.toml"),
        "UV_EXCLUDE_NEWER": "2001-01-01T00:00:00Z",
        "UV_FIND_LINKS": str(tmp_path / "missing"),
        "UV_WORKING_DIRECTORY": str(tmp_path / "missing"),
        "UV_LINK_MODE": "symlink",
        "UV_NO_BINARY": "1",
        "VIRTUAL_ENV": str(tmp_path / "missing"),
        "PYTHONHOME": str(tmp_path / "missing"),
    }.items():
        monkeypatch.setenv(name, value)
    found = wheel(tmp_path, "alone")
    tools.uv("pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", tmp_path / "here", found)
    assert (tmp_path / "here/alone.py").is_file()
    assert not (tmp_path / "here/alone.py").is_symlink()


def test_the_users_index_is_used_from_the_environment_and_from_uvs_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config/uv").mkdir(parents=True)
    said = tmp_path / "config/uv/uv.toml"

    def asked() -> str:
        words = ("pip", "install", "--no-deps", "--python", sys.executable, "--target", tmp_path / "here", "alone")
        with raises("process") as raised:
            tools.uv(*words)
        return raised.value.cause

    said.write_text('[[index]]\nurl = "http://127.0.0.1:1/from-file"\ndefault = true\n')
    assert "127.0.0.1:1/from-file" in asked()
    assert tools.index() == "http://127.0.0.1:1/from-file"
    said.write_text('index-url = "http://127.0.0.1:1/older-form"\n')
    assert "127.0.0.1:1/older-form" in asked()
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:1/from-environment")
    assert "127.0.0.1:1/from-environment" in asked()


def test_settings_of_indexes_become_variables() -> None:
    said = {
        "index": [
            {"url": "https://a/simple", "default": True},
            {"name": "own", "url": "https://b/simple"},
            {"url": "https://c/simple"},
            {"name": "torch", "url": "https://d/simple", "explicit": True},
        ],
        "native-tls": True,
        "system-certs": False,
        "allow-insecure-host": ["e", "f"],
        "exclude-newer": "7 days",
        "pip": {"extra-index-url": ["https://g", "https://h"], "target": "/x"},
    }
    expected = {
        "UV_DEFAULT_INDEX": "https://a/simple",
        "UV_INDEX": "own=https://b/simple https://c/simple",
        "UV_NATIVE_TLS": "true",
        "UV_INSECURE_HOST": "e f",
        "UV_EXTRA_INDEX_URL": "https://g https://h",
    }
    assert index_settings(said) == expected


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print(*range(20), sep='\\n'); exit(3)", "12\n13\n14\n15\n16\n17\n18\n19"),
        ("exit(3)", "it wrote no message; its exit status is 3"),
        ("import os; os.kill(os.getpid(), 9)", "it was killed by signal 9 (Killed)"),
        ("import os; print('x', flush=True); os.kill(os.getpid(), 9)", "x\nit was killed by signal 9 (Killed)"),
    ],
)
def test_a_failed_program_always_has_a_cause(code: str, says: str) -> None:
    with raises("process") as caught:
        shell.run([sys.executable, "-c", code])
    assert caught.value.cause == says
