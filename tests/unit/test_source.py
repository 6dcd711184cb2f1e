"""Sources from real git repositories."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from core import source


def repository(place: Path, files: dict[str, str], *more: tuple[str, ...]) -> str:
    """A repository with one commit that holds these files; returns the commit."""
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    git = ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    served = [("config", "uploadpack.allowAnySHA1InWant", "true"), ("config", "uploadpack.allowFilter", "true")]
    for words in (("init", "--quiet"), *served, *more, ("add", "-A"), ("commit", "--quiet", "-m", "one")):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository with a submodule, reached at https://example.org/ by the user's own url.<mirror>.insteadOf."""
    repository(tmp_path / "mirror/part", {"inner.py": "inner"})
    add = ("submodule", "--quiet", "add", f"file://{tmp_path}/mirror/part", "part")
    commit = repository(tmp_path / "mirror/whole", {"one.py": "1", "docs/big.md": "2", "docs/keep/a": "3"}, add)
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
def test_what_is_wanted_of_a_commit_is_fetched_and_no_more(
    upstream: str, limits: dict[str, tuple[str, ...]], expected: set[str]
) -> None:
    where = source.Source(git="https://example.org/whole", commit=upstream)
    tree = source.fetch(source.pin(source.Pinned(name="it", version="1", source=(where,), tree="", **limits)))  # type: ignore[arg-type]
    assert {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()} == expected
