"""The values of code that is evaluated without running it, and the pure operations on them."""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

LONG = 100_000
"""Maximum length of a text or list."""


class Unknown:
    """The type of UNKNOWN."""


UNKNOWN = Unknown()
"""A value that is not known; in a list, or as the key of a dictionary: any number of further entries."""


@dataclass(eq=False)
class Module:
    """A file of the code, or a folder without an `__init__.py`. `package` is the dotted name of its folder."""

    package: str
    body: list[ast.stmt]
    path: Path | None = None

    @cached_property
    def statements(self) -> dict[str, list[ast.stmt]]:
        """The statements at the top that define or change a name, in order."""
        found: dict[str, list[ast.stmt]] = {}
        for statement in self.body:
            for name in dict.fromkeys(changed([statement])):
                found.setdefault(name, []).append(statement)
        return found


@dataclass(eq=False)
class Scope:
    """The names inside a function or class, or at the top of a module."""

    module: Module
    names: dict[Any, Any] = field(default_factory=dict)
    outer: Scope | None = None
    function: Function | None = None


@dataclass(eq=False)
class Class:
    """A class. `owner` is the class through which it was found: a subclass of the one that defines it."""

    node: ast.ClassDef
    scope: Scope
    owner: Class | None = None


@dataclass(eq=False)
class Function:
    """A function, the class or instance to which it is bound, and the class that defines it."""

    node: ast.FunctionDef | ast.AsyncFunctionDef
    scope: Scope
    bound: Class | Instance | None = None
    home: Class | None = None


@dataclass(eq=False)
class Instance:
    """An instance of a class, with the arguments of its constructor by name."""

    kind: Class
    values: dict[Any, Any]


BUILTINS: dict[str, Any] = {
    each.__name__: each for each in (list, tuple, dict, sorted, len, range, str, int, float, bool, enumerate, zip)
}
METHODS = {
    "append", "copy", "extend", "format", "get", "insert", "items", "join", "keys", "lower", "split", "strip", "title",
    "update", "upper", "values",
}  # fmt: skip
OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.BitOr: operator.or_, ast.Not: operator.not_,
    ast.USub: operator.neg, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_,
    ast.IsNot: operator.is_not, ast.Lt: operator.lt, ast.Gt: operator.gt, ast.LtE: operator.le, ast.GtE: operator.ge,
}  # fmt: skip
OPERATORS[ast.In] = lambda item, items: UNKNOWN if UNKNOWN in items else item in items
OPERATORS[ast.NotIn] = lambda item, items: UNKNOWN if UNKNOWN in items else item not in items


def truth(value: Any) -> Any:
    """Whether a value is true; UNKNOWN if that is not known."""
    return UNKNOWN if isinstance(value, (Unknown, Module)) else bool(value)


def opened(value: Any) -> bool:
    """Add unknown entries to a list or dictionary; False for any other value."""
    if isinstance(value, list):
        value.append(UNKNOWN)
    elif isinstance(value, dict):
        value[UNKNOWN] = UNKNOWN
    return isinstance(value, (list, dict))


def result(function: Any, *values: Any) -> Any:
    """The result of a pure function or method; UNKNOWN if it fails, is large, or something is unknown."""
    name = getattr(function, "__name__", "")
    changes = name in ("append", "extend", "insert", "update")
    huge = sum(len(each) for each in values if isinstance(each, (str, list, tuple, dict, range))) > LONG
    wide = name == "format" and ":" in getattr(function, "__self__", "")  # may ask for any number of spaces
    alien = any(isinstance(each, (Unknown, type)) for each in values)
    if function is None or huge or wide or (alien and not changes):
        return UNKNOWN
    try:
        found = function(*values)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
        return UNKNOWN
    lazy = hasattr(found, "__iter__") and not isinstance(found, (str, list, tuple, dict, range))
    return list(found) if lazy else found


def combined(op: ast.operator, left: Any, right: Any) -> Any:
    """The result of a binary operation; something unknown next to a list means unknown entries."""
    if isinstance(op, ast.Add) and isinstance(left, (list, tuple)) != isinstance(right, (list, tuple)):
        return [*(left if isinstance(left, (list, tuple)) else right), UNKNOWN]
    most = {ast.Pow: 64, ast.Mult: 1 << 64}.get(type(op), 0)  # a text or list would be repeated
    if most and not all(isinstance(each, (int, float)) and abs(each) <= most for each in (left, right)):
        return UNKNOWN
    return result(OPERATORS.get(type(op)), left, right)


def merge(entries: dict[Any, Any], key: Any, value: Any) -> None:
    """Add an entry to a dictionary, or with the key None the entries of another one."""
    if key is None and isinstance(value, dict):
        entries.update(value)
    else:
        entries[key if isinstance(key, (str, int, float)) else UNKNOWN] = value


def changed(body: Iterable[ast.stmt]) -> Iterator[str]:
    """The names that statements define or change, also inside `if`, `try`, `for` and `with`."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name).partition(".")[0] for alias in names)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=of))):
                yield _root(of)
            case ast.Assign(targets=targets) | ast.Delete(targets=targets):
                for each in targets:
                    yield from map(_root, each.elts if isinstance(each, (ast.Tuple, ast.List)) else [each])
            case ast.AnnAssign(target=target) | ast.AugAssign(target=target) | ast.For(target=target):
                yield _root(target)
        for block in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from changed(getattr(statement, block, ()))


def absolute(package: str, statement: ast.ImportFrom) -> str:
    """The dotted name of the module that a statement in a package imports from."""
    parts = package.split(".")
    above = parts[: len(parts) + 1 - statement.level] if statement.level else []
    return ".".join(filter(None, [*above, statement.module or ""]))


def _root(node: ast.AST) -> str:
    """The name at the start of `name.part["key"]`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
