"""The house keeps its layers: tasks -> ops, deploy, kernels -> core, and each door out has one doorkeeper."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from core import files
from deploy import exporter

LAYERS = {
    "agent": set(),
    "exporter": {"agent"},
    "core": set(),
    "kernels": {"core"},
    "deploy": {"core"},
    "ops": {"core", "deploy", "kernels"},
}
ON_HOSTS = ("agent/", "exporter/")
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
    # smoke.py runs in the wheel's own interpreter, agent and exporter on hosts
    assert "subprocess" not in imported(path) or name == "core/shell.py" or name.startswith(ON_HOSTS)
    if name not in ("core/console.py", "kernels/smoke.py") and not name.startswith(ON_HOSTS):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_only_one_module_knows_ssh() -> None:
    for library in ("fabric", "paramiko", "keyring"):
        assert [path.name for path in SOURCES if library in imported(path)] in (["connection.py"], [])
    assert {path.name for path in SOURCES if '["ssh"' in path.read_text()} == {"connection.py"}


def test_the_agent_has_nothing_but_the_standard_library() -> None:
    for path in (files.CHECKOUT / "agent").glob("*.py"):
        assert imported(path) <= {*sys.stdlib_module_names, "agent"}


def test_the_exporter_has_prometheus_client_too_and_what_it_uses_of_the_agent_is_sent() -> None:
    pending = list((files.CHECKOUT / "exporter").glob("*.py"))
    for path in pending:
        assert imported(path) <= {*sys.stdlib_module_names, "agent", "exporter", "prometheus_client"}
    used: set[str] = set()
    while pending:
        named = set(re.findall(r"from agent\.(\w+) import", pending.pop().read_text())) - used
        pending += [files.CHECKOUT / f"agent/{name}.py" for name in named]
        used |= named
    assert set(exporter.AGENT) == {*used, "__init__"}


def test_recipes_and_config_hold_no_logic() -> None:
    found = [path.name for top in ("recipes", "config") for path in (files.CHECKOUT / top).rglob("*.py")]
    assert set(found) <= {"smoke.py"}


def test_no_file_is_named_after_nothing() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    assert not [path for path in SOURCES if path.name in vague]
