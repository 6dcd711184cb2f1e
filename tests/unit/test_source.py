"""Sources from real git repositories."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from core import files, foreign, source
from tests.errors import raises
from tests.repositories import repository

pytestmark = pytest.mark.process  # git


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository with a submodule, reached at https://example.org/ by the user's own url.<mirror>.insteadOf."""
    repository(tmp_path / "mirror/part", {"inner.py": "inner"})
    add = ("submodule", "--quiet", "add", f"file://{tmp_path}/mirror/part", "part")
    named = (
        "config",
        "-f",
        str(tmp_path / "mirror/whole/.gitmodules"),
        "submodule.part.url",
        "https://example.org/part",
    )
    commit = repository(tmp_path / "mirror/whole", {"one.py": "1", "docs/big.md": "2", "docs/keep/a": "3"}, add, named)
    settings = {f"url.file://{tmp_path}/mirror/.insteadOf": "https://example.org/", "protocol.file.allow": "always"}
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for number, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    return commit


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, {".gitmodules", "one.py", "docs/big.md", "docs/keep/a"}),
        ({"without": ("docs",)}, {".gitmodules", "one.py"}),
        ({"paths": ("docs/keep", "one.py")}, {"one.py", "docs/keep/a"}),
        ({"submodules": ("part",), "without": ("docs",)}, {".gitmodules", "one.py", "part/inner.py"}),
    ],
)
def test_only_needed_paths_are_fetched(upstream: str, limits: dict[str, tuple[str, ...]], expected: set[str]) -> None:
    where = source.Source(git="https://example.org/whole", commit=upstream)
    tree = source.fetch(source.pin(source.Pinned(name="it", version="1", source=(where,), tree="", **limits)))  # type: ignore[arg-type]
    assert {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("url", ["{tmp}/mirror/part", "file://{tmp}/mirror/part", "http://example.org/part", "ext::id"])
def test_remote_submodule_cannot_use_local_paths(upstream: str, tmp_path: Path, url: str) -> None:
    assert upstream
    add = ("config", "-f", str(tmp_path / "mirror/whole/.gitmodules"), "submodule.part.url", url.format(tmp=tmp_path))
    commit = repository(tmp_path / "mirror/whole", {"two.py": "2"}, add)
    where = source.Source(git="https://example.org/whole", commit=commit)
    recipe = source.Pinned(name="it", version="1", source=(where,), tree="", submodules=("part",))
    with raises("unsafe-tree", match="submodule 'part' comes from"):
        source.pin(recipe)


def objects(place: Path, levels: list[list[tuple[str, str, str]]]) -> str:
    """A commit of trees given as rows of mode, name and content; `tree` stands for the tree before."""
    repository(place, {"x": ""})

    def git(*words: str, given: str = "") -> str:
        done = subprocess.run(
            ["git", "-C", str(place), *words], input=given, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    last = ""
    for rows in levels:
        lines = [
            f"040000 tree {last}\t{name}"
            if mode == "tree"
            else f"{mode} blob {git('hash-object', '-w', '--stdin', given=content)}\t{name}"
            for mode, name, content in rows
        ]
        last = git("mktree", "-z", given="\0".join(lines) + "\0")
    return git("-c", "user.name=a", "-c", "user.email=a@b", "commit-tree", "-m", "odd", last)


SHAPES = {
    "a line feed in a name": ([[("100644", "a\nb.py", "")]], "is not allowed as a file name"),
    "an escape in a name": ([[("100644", "a\x1b]0;x", "")]], "is not allowed as a file name"),
    "text turned around": ([[("100644", "a\u202eyp.b", "")]], "is not allowed as a file name"),
    "a long name": ([[("100644", "a" * 300, "")]], "is too long"),
    "many levels": ([[("100644", "x", "")], *[[("tree", "d", "")] for _ in range(600)]], "too deep"),
    "a link to nothing": ([[("120000", "l", "")]], "is a link to a path that does not exist"),
    "a link with a zero": ([[("120000", "l", "a\0b")]], "is a link to a path that does not exist"),
    "a long link": ([[("120000", "l", "a/" * 3000)]], "is a link to a path that does not exist"),
    "a huge file": ([[("100644", "zeros", "0" * 3000)]], "is too large, at 'zeros'"),
    "a file many times": ([[("100644", "a", "0" * 900)], *[[("tree", f"{n}", "") for n in range(9)]]], "is too large"),
    "trees many times": (
        [[("100644", f"{n}", "") for n in range(10)], *[[("tree", f"{n}", "") for n in range(10)] for _ in range(4)]],
        "has too many files",
    ),
}


@pytest.mark.parametrize(("levels", "said"), SHAPES.values(), ids=SHAPES)
def test_hostile_commit_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: list[list[tuple[str, str, str]]], said: str
) -> None:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "LARGEST", 2000)
    monkeypatch.setattr(foreign, "TOTAL", 5000)
    monkeypatch.setattr(source, "LISTED", 1_000_000)
    commit = objects(tmp_path / "repo", levels)
    where = source.Source(git=f"file://{tmp_path}/repo", commit=commit)
    with raises("unsafe-tree", match=said):
        source.pin(source.Pinned(name="it", version="1", source=(where,), tree=""))


def test_edited_cached_tree_is_not_sent(upstream: str) -> None:
    where = source.Source(git="https://example.org/whole", commit=upstream)
    pinned = source.pin(source.Pinned(name="it", version="1", source=(where,), tree=""))
    (source.intact(pinned) / "one.py").write_text("other")
    assert source.fetch(pinned)
    with raises("hash-mismatch", match=r"rm -r .* to fetch it"):
        source.intact(pinned)


def packed(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(f"it-1/{name}")
    found.type, found.linkname = kind, target
    return found


def chained(kind: bytes, count: int, size: int) -> bytes:
    """Nested headers of long names."""
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = kind, size
    return (head.tobuf(tarfile.GNU_FORMAT) + b"a" * size + b"\0" * (-size % 512)) * count


def deep() -> bytes:
    """Links whose real path exceeds the path limit, and a file through them (CVE-2025-4517)."""
    step, rows, way = "d" * 247, [], ""
    for letter in "abcdefghijklmnop":
        rows += [(member(f"{way}{step}", tarfile.DIRTYPE), b""), (member(f"{way}{letter}", tarfile.SYMTYPE, step), b"")]
        way += f"{step}/"
    out = "/".join("abcdefghijklmnop") + "/" + "l" * 254
    rows += [(member(out, tarfile.SYMTYPE, "../" * 16), b"")]
    rows += [(member("escape", tarfile.SYMTYPE, out + "/../../outside"), b""), (member("escape/written"), b"x")]
    return packed(*rows)


ESCAPED = "written-through-a-link-of-an-archive"

ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a hard link": lambda: packed((member("a"), b"x"), (member("b", tarfile.LNKTYPE, "it-1/a"), b"")),
    "a device": lambda: packed((member("null", tarfile.CHRTYPE), b"")),
    "a pipe": lambda: packed((member("pipe", tarfile.FIFOTYPE), b"")),
    "a link out": lambda: packed((member("a", tarfile.SYMTYPE, "../../../../../../etc/passwd"), b"")),
    "through a link": lambda: packed((member("a", tarfile.SYMTYPE, "/tmp"), b""), (member(f"a/{ESCAPED}"), b"x")),
    "by its name": lambda: packed((member("../../out"), b"x")),
    "the same name twice": lambda: packed((member("a"), b"x"), (member("a"), b"y")),
    "a file and a folder": lambda: packed((member("a"), b"x"), (member("a/b"), b"y")),
    "a folder and a file": lambda: packed((member("a/b"), b"y"), (member("a"), b"x")),
    "a huge file": lambda: packed((member("a"), b"0" * 3000)),
    "many files": lambda: packed(*((member(f"{n}"), b"0" * 1000) for n in range(9))),
    "long names in one another": lambda: chained(tarfile.GNUTYPE_LONGNAME, 3000, 1),
    "a long name": lambda: chained(tarfile.GNUTYPE_LONGNAME, 1, 30_000_000),
    "pax in one another": lambda: chained(tarfile.XHDTYPE, 3000, 1),
    "a sparse file": lambda: packed((member("a", tarfile.GNUTYPE_SPARSE), b"")),
    "cut short": lambda: packed((member("a"), b"0" * 1000))[:700],
    "no archive": lambda: b"x" * 5000,
    "a path longer than a path may be": deep,
}


@pytest.mark.parametrize("make", ARCHIVES.values(), ids=ARCHIVES)
def test_invalid_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], bytes]) -> None:
    monkeypatch.setattr(files, "LARGEST", 2000)
    monkeypatch.setattr(foreign, "TOTAL", 5000)
    (tmp_path / "outside").mkdir()
    (tmp_path / "it.tar.gz").write_bytes(gzip.compress(make()))
    (tmp_path / "tree").mkdir()
    tracemalloc.start()
    with raises("unsafe-tree"):
        source.unpack(tmp_path / "it.tar.gz", foreign.Tree(tmp_path / "tree", "it"), lambda name: name)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert not any((tmp_path / "outside").iterdir())
    assert not Path("/tmp", ESCAPED).exists()
