"""Layers: tasks.py -> ops -> deploy -> lock; kernels -> core. Each door out has one doorkeeper."""

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
    "lock": {"core"},
    "deploy": {"core", "lock"},
    "ops": {"core", "lock", "deploy", "kernels"},
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
            # the schema of the wire is everybody's
            found.add("agent.schema" if node.module.startswith("agent.schema") else node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(files.CHECKOUT)))
def test_layers(path: Path) -> None:
    layer = path.relative_to(files.CHECKOUT).parts[0]
    others = imported(path) & set(LAYERS)
    assert others <= LAYERS[layer] | {layer}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(files.CHECKOUT)))
def test_only_the_shell_starts_processes(path: Path) -> None:
    name = str(path.relative_to(files.CHECKOUT))
    # smoke.py runs in the wheel's own interpreter, agent and exporter on hosts
    assert "subprocess" not in imported(path) or name == "core/shell.py" or name.startswith(ON_HOSTS)


FRONT = [*(path for path in SOURCES if path.relative_to(files.CHECKOUT).parts[0] not in ("agent", "exporter"))]


@pytest.mark.parametrize("path", FRONT, ids=lambda path: str(path.relative_to(files.CHECKOUT)))
def test_only_the_console_writes_to_the_terminal(path: Path) -> None:
    if path.match("core/console.py") or path.match("kernels/smoke.py"):  # the second runs in the wheel's interpreter
        return
    found: list[str] = []
    whole = ast.parse(path.read_text())
    # what a module does as a program of its own is written to who starts that
    whole.body = [
        each for each in whole.body if not (isinstance(each, ast.If) and "__name__" in ast.unparse(each.test))
    ]
    for node in ast.walk(whole):
        if isinstance(node, ast.Name) and node.id in ("print", "input", "breakpoint"):
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in WRITERS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("Exit", "sys.exit", "SystemExit"):
            # invoke prints an Exit's message, and Python what is no number
            found += [
                ast.unparse(node) for each in node.args if not (isinstance(each, ast.Name) and each.id == "status")
            ]
        elif isinstance(node, ast.ImportFrom) and node.module in ("getpass", "sys", "warnings"):
            found += [each.name for each in node.names if each.name in ("getpass", "stdout", "stderr", "warn")]
    assert not found
    assert not imported(path) & {"argparse", "curses", "logging", "pprint", "readline", "rich", "traceback"}


WRITERS = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__", "getpass.getpass", "warnings.warn"}


def test_only_one_module_knows_ssh() -> None:
    for library in ("fabric", "paramiko", "keyring"):
        assert [path.name for path in SOURCES if library in imported(path)] in (["connection.py"], [])
    assert {path.name for path in SOURCES if '["ssh"' in path.read_text()} == {"connection.py"}


def test_the_agent_has_nothing_but_the_standard_library() -> None:
    for path in (files.CHECKOUT / "agent").rglob("*.py"):
        assert imported(path) <= {*sys.stdlib_module_names, "agent", "agent.schema"}


def test_the_exporter_has_prometheus_client_too_and_what_it_uses_of_the_agent_is_sent() -> None:
    pending = list((files.CHECKOUT / "exporter").glob("*.py"))
    for path in pending:
        assert imported(path) <= {*sys.stdlib_module_names, "agent", "agent.schema", "exporter", "prometheus_client"}
    used: set[str] = set()
    while pending:
        named = set(re.findall(r"from agent\.([\w.]+) import", pending.pop().read_text())) - used
        named = {name.replace(".", "/") for name in named} - used
        pending += [files.CHECKOUT / f"agent/{name}.py" for name in named]
        used |= named
    assert set(exporter.AGENT) == {*used, "__init__", "look/__init__", "schema/__init__"}


def test_recipes_and_config_hold_no_logic() -> None:
    found = [path.name for top in ("recipes", "config") for path in (files.CHECKOUT / top).rglob("*.py")]
    assert set(found) <= {"smoke.py"}


def test_no_file_is_named_after_nothing() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    assert not [path for path in SOURCES if path.name in vague]
