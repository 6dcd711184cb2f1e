"""Errors: each has a kind of its class."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest

from core import errors, files

CLASSES = {
    name: each
    for name, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, errors.HearthError) and each is not errors.HearthError
}
KINDS = {kind for each in CLASSES.values() for kind in each.kinds}
PACKAGES = ("core", "kernels", "lock", "deploy", "ops", "gateway", "bench", "tests")


@cache
def nodes(package: str) -> list[tuple[Path, list[ast.AST]]]:
    """The syntax of every file of a package."""
    paths = sorted((files.CHECKOUT / package).rglob("*.py"))
    return [(path, [*ast.walk(ast.parse(path.read_text()))]) for path in paths]


def raised(package: str) -> list[tuple[str, str, ast.expr]]:
    """Where errors are made, their class and the argument that is the kind."""
    found = []
    for path, inside in nodes(package):
        for node in inside:
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))  # X or errors.X
            if name in CLASSES:
                where = f"{path.relative_to(files.CHECKOUT)}:{node.lineno}"
                assert len(node.args) == 2, f"{where}: an error takes a kind and what happened"
                found.append((where, name, node.args[0]))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_errors_are_made_with_a_kind_of_their_class(package: str) -> None:
    found = raised(package)
    assert [
        (where, name, kind.value)
        for where, name, kind in found
        if isinstance(kind, ast.Constant) and kind.value not in CLASSES[name].kinds
    ] == []


def test_every_kind_is_used() -> None:
    literals = {
        node.value
        for package in PACKAGES[:-1]
        for path, inside in nodes(package)
        if path != files.CHECKOUT / "core/errors.py"
        for node in inside
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert KINDS - literals == set()


def test_every_kind_is_explained() -> None:
    for each in CLASSES.values():
        assert each.kinds
        assert all(meaning.endswith(".") for meaning in each.kinds.values())


@pytest.mark.parametrize(
    ("name", "near"),
    [("0.30", "0.30.0"), ("0.3", "0.3.64"), ("0.30.1", "0.30.0"), ("spark", "spark-2"), ("latest", "")],
)
def test_a_name_without_its_end_is_the_nearest(name: str, near: str) -> None:
    said = errors.suggest(name, ["0.3.64", "0.39.0", "0.30.0", "0.33.0", "spark-2", "sparks"])
    assert said.startswith(f"perhaps you meant {near!r}" if near else "known: ")
