"""Rules that linters cannot check. Layers, cycles and banned modules are in pyproject.toml: import-linter and ruff."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from core import files
from deploy import archive

CLIENT = [
    path
    for room in ("core", "kernels", "lock", "deploy", "ops", "gateway")
    for path in (files.CHECKOUT / room).rglob("*.py")
]


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # the wire schema is shared by all
            found.add("agent.schema" if node.module.startswith("agent.schema") else node.module.partition(".")[0])
    return found


def test_no_text_reaches_the_terminal_through_input_or_an_exit() -> None:
    """Invoke prints an Exit's message, and Python a SystemExit's, without escaping control characters."""
    found: list[str] = []
    for path in CLIENT:
        if path.name in ("console.py", "smoke.py"):  # the terminal; the second one runs in the wheel's own interpreter
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and node.id == "input":
                found.append(f"{path.name}: input")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("Exit", "sys.exit", "SystemExit"):
                status = [each for each in node.args if isinstance(each, ast.Name) and each.id == "status"]
                found += [f"{path.name}: {ast.unparse(node)}"] if node.args != status else []
    assert not found


def test_refusals_are_built_in_modules_of_that_name() -> None:
    built = {str(path.relative_to(files.CHECKOUT)) for path in CLIENT if "Refusal(" in path.read_text()}
    assert {path for path in built if not path.endswith("refusals.py")} == set()


def test_no_hint_installs_with_pip() -> None:
    """Debian 12 and newer refuse that outside of a virtual environment (PEP 668)."""
    agent = (files.CHECKOUT / "agent").rglob("*.py")
    found = [path.name for path in (*CLIENT, *agent) if re.search(r"(?<!uv )\bpip3? install\b", path.read_text())]
    assert found == []


def test_only_one_module_starts_ssh() -> None:
    assert {path.name for path in CLIENT if '["ssh"' in path.read_text()} == {"connection.py"}


def test_the_agent_has_the_standard_library_and_what_travels_with_it() -> None:
    for path in (files.CHECKOUT / "agent").rglob("*.py"):
        release = {"PIL", "numpy"} if path.name == "pictures.py" else set()  # runs with the release's Python
        assert imported(path) <= {*sys.stdlib_module_names, "agent", "agent.schema", *archive.LIBRARIES, *release}


def test_recipes_and_config_hold_no_logic() -> None:
    found = [path for top in ("recipes", "config") for path in (files.CHECKOUT / top).rglob("*.py")]
    node = files.CHECKOUT / "recipes/comfyui/provenance/__init__.py"  # a custom node, which ComfyUI runs
    assert {path.name for path in found if path != node} <= {"smoke.py"}
