"""The docs are true: every task and exit code is in the reference, the schema is today's, links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import msgspec
import pytest
from invoke.tasks import Task

import tasks
from core import errors, files
from core.manifest import Manifest

REFERENCE = (files.CHECKOUT / "docs/reference/tasks.md").read_text()
PAGES = [*files.CHECKOUT.glob("*.md"), *(files.CHECKOUT / "docs").rglob("*.md")]


@pytest.mark.parametrize("name", sorted(tasks.ns.task_names))
def test_every_task_is_in_the_reference_with_its_flags(name: str) -> None:
    task = tasks.ns[name]
    assert isinstance(task, Task)
    assert task.__doc__
    section = REFERENCE.partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert section
    for argument in task.get_arguments():
        assert argument.help, f"{argument.name} has no help"
        flag = str(argument.name).replace("_", "-")
        assert f"--{flag}" in section or flag.upper() in section, flag


def test_every_error_has_its_own_exit_code_and_is_in_the_reference() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.HearthError)]
    codes = [each.exit_code for each in classes]
    assert len(codes) == len(set(codes))
    for code in codes:
        assert re.search(rf"^\| {code} \|", REFERENCE, re.MULTILINE), code


def test_the_manifest_schema_is_todays() -> None:
    """Written anew with: python -m tests.unit.test_docs."""
    assert (files.CHECKOUT / "docs/reference/manifest.schema.json").read_text() == schema()


def schema() -> str:
    return json.dumps(msgspec.json.schema(Manifest), indent=2) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:core|kernels|docs|bench|tests|config|recipes)/[\w./-]+\.\w+)`", text):
        assert name == "config/hosts.toml" or (files.CHECKOUT / name).exists(), name  # that one is the user's


def test_decisions_are_short() -> None:
    for page in (files.CHECKOUT / "docs/decisions").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 40


if __name__ == "__main__":
    (files.CHECKOUT / "docs/reference/manifest.schema.json").write_text(schema())
