"""The house keeps its layers: tasks -> ops, deploy, kernels -> core, and each door out has one doorkeeper."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from core import files

LAYERS = {"agent": set(), "core": set(), "kernels": {"core"}, "deploy": {"core"}, "ops": {"core", "deploy", "kernels"}}
SOURCES = [path for layer in LAYERS for path in sorted((files.CHECKOUT / layer).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The top-level modules a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(files.CHECKOUT)))
def test_layers(path: Path) -> None:
    layer = path.relative_to(files.CHECKOUT).parts[0]
    others = imported(path) & set(LAYERS)
    assert others <= LAYERS[layer] | {layer}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(files.CHECKOUT)))
def test_only_the_shell_starts_processes_and_only_the_console_prints(path: Path) -> None:
    name = str(path.relative_to(files.CHECKOUT))
    # smoke.py runs in the wheel's own interpreter, the agent on hosts
    assert "subprocess" not in imported(path) or name == "core/shell.py" or name.startswith("agent/")
    if name not in ("core/console.py", "kernels/smoke.py") and not name.startswith("agent/"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_only_one_module_knows_ssh() -> None:
    for library in ("fabric", "paramiko", "keyring"):
        assert [path.name for path in SOURCES if library in imported(path)] in (["connection.py"], [])


def test_the_agent_has_nothing_but_the_standard_library() -> None:
    for path in (files.CHECKOUT / "agent").glob("*.py"):
        assert imported(path) <= {*sys.stdlib_module_names, "agent"}


def test_recipes_and_config_hold_no_logic() -> None:
    found = [path.name for top in ("recipes", "config") for path in (files.CHECKOUT / top).rglob("*.py")]
    assert set(found) <= {"smoke.py"}


def test_no_file_is_named_after_nothing() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    assert not [path for path in SOURCES if path.name in vague]
