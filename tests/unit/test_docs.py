"""The docs are true: the reference is what the tasks say, examples can be typed, the schema is today's, links lead."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import msgspec
import pytest
from invoke.parser import Parser

import tasks
from core import errors, files
from core.manifest import Manifest
from docs import generate

REFERENCE = generate.PAGE.read_text()
PAGES = [*files.CHECKOUT.glob("*.md"), *(files.CHECKOUT / "docs").rglob("*.md")]


@pytest.mark.parametrize("name", sorted(tasks.ns.task_names))
def test_every_task_is_in_the_reference_with_its_flags(name: str) -> None:
    section = REFERENCE.partition(f"### {name}\n")[2].partition("\n##")[0]
    assert tasks.ns[name].__doc__.partition("\n")[0] in section
    for argument in generate.contexts()[name].args.values():
        assert argument.help, f"{argument.name} has no help"
        flag = argument.names[0]
        assert f"`--{flag}" in section or f"`{flag.upper()}`" in section, flag
        if isinstance(argument.default, str) and argument.default:
            assert argument.help.endswith(f"(default: {argument.default})")


def test_the_reference_is_todays() -> None:
    """Written anew with: python -m docs.generate."""
    assert generate.render() == REFERENCE


@pytest.mark.parametrize("name", sorted(tasks.ns.task_names))
def test_every_task_has_examples_that_invoke_understands(name: str) -> None:
    lines = str(inspect.getdoc(tasks.ns[name])).splitlines()
    assert not [line for line in lines if line.startswith("inv ")], "an example that is not indented"
    examples = [shlex.split(line, comments=True) for line in lines if line.startswith("    inv ")]
    assert examples
    for _, *words in examples:
        (found,) = Parser(contexts=generate.contexts().values()).parse_argv(words)
        assert found.name == name


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
