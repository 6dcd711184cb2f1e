"""The version and commit of Hearth in manifests: reported if known, never guessed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from core import files, version, workspace
from core.manifest import Hearth
from tests.repositories import repository

PROJECT = '[project]\nversion = "1.2.3"\n'


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "checkout"
    place.mkdir()
    (place / "pyproject.toml").write_text(PROJECT)
    monkeypatch.setattr(files, "CHECKOUT", place)
    return place


def test_a_checkout_has_a_commit_and_may_be_modified(checkout: Path) -> None:
    commit = repository(checkout, {"pyproject.toml": PROJECT, ".gitignore": "wheelhouse/\n"})
    (checkout / "wheelhouse").mkdir()
    (checkout / "wheelhouse/a.whl").touch()
    assert version.own() == Hearth("1.2.3", commit)
    (checkout / "new.py").touch()
    assert version.own() == Hearth("1.2.3", commit, modified=True)
    (checkout / "new.py").unlink()
    (checkout / ".gitignore").unlink()
    assert version.own().modified


def test_a_commit_that_is_not_known_is_not_reported(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert version.own() == Hearth("1.2.3")
    repository(checkout.parent, {"other": ""})  # a copy of the checkout in a home folder that is a repository
    assert version.own() == Hearth("1.2.3")
    shutil.rmtree(checkout.parent / ".git")
    repository(checkout, {"pyproject.toml": PROJECT})
    with workspace.using(workspace.Workspace.of_bundle(checkout)):
        assert version.own() == Hearth("1.2.3")
    monkeypatch.setenv("PATH", str(checkout))  # without git
    assert version.own() == Hearth("1.2.3")
