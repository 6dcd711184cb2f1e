"""Evaluates untrusted Python code without running it: literals, classes, and functions that only build values.

What is not understood is UNKNOWN: code from elsewhere, a call into the system, a condition on something unknown.
"""

from __future__ import annotations

import ast
import operator
from typing import TYPE_CHECKING, Any, cast

from core import foreign
from lock.values import (
    BUILTINS,
    LONG,
    METHODS,
    OPERATORS,
    UNKNOWN,
    Class,
    Function,
    Instance,
    Module,
    Scope,
    absolute,
    changed,
    combined,
    merge,
    opened,
    result,
    truth,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

STEPS = 300_000
"""Maximum number of expressions and statements to evaluate for one value; ComfyUI's nodes need up to 20,000."""


class LimitError(Exception):
    """The evaluation takes too long."""


class _ReturnError(Exception):
    """Leaves a function with a value."""


class Code:
    """The code below some folders, which are searched for imports in order."""

    def __init__(self, *roots: Path) -> None:
        self._roots = roots
        self._modules: dict[str, Module | None] = {}
        self._values: dict[tuple[int, str], Any] = {}
        self._bases: dict[ast.ClassDef, list[Class]] = {}
        self.steps = 0

    def module(self, name: str) -> Module | None:
        """A module by its dotted name, "" for the first folder itself; None if the folders lack it."""
        if name not in self._modules:
            self._modules[name] = next(filter(None, (self._module(root, name) for root in self._roots)), None)
        return self._modules[name]

    def _module(self, root: Path, name: str) -> Module | None:
        base = root.joinpath(*filter(None, name.split(".")))
        file = base.with_suffix(".py") if name else base
        for package, path in ((name, base / "__init__.py"), (name.rpartition(".")[0], file)):
            if path.is_file():
                return Module(package, foreign.python(path).body, path)
        return Module(name, []) if name and base.is_dir() else None

    def value(self, module: Module, name: str) -> Any:
        """The value of a name at the top of a module, or of a submodule."""
        key = (id(module), name)
        if key not in self._values:
            self._values[key] = UNKNOWN  # for code that defines it by itself
            scope = Scope(module)
            self._run(module.statements.get(name, ()), scope, only=name)
            if name not in module.statements:
                scope.names[name] = next(self._starred(module, name), UNKNOWN)
            found = scope.names.get(name, UNKNOWN)
            if found is UNKNOWN:
                found = self.module(f"{module.package}.{name}".strip(".")) or UNKNOWN
            self._values[key] = found
        return self._values[key]

    def _starred(self, module: Module, name: str) -> Iterator[Any]:
        """The value of a name that `from ... import *` may give."""
        for each in module.body:
            if isinstance(each, ast.ImportFrom) and each.names[0].name == "*":
                source = self.module(absolute(module.package, each))
                if source and (found := self.value(source, name)) is not UNKNOWN:
                    yield found

    def _run(self, body: Iterable[ast.stmt], scope: Scope, only: str = "") -> None:
        """Run statements in a scope; with `only`, those that define or change this name."""
        for statement in body:
            if not only or only in changed([statement]):
                self._count()
                self._statement(statement, scope, only)

    def _count(self) -> None:
        self.steps += 1
        if self.steps > STEPS:
            raise LimitError

    def _statement(self, statement: ast.stmt, scope: Scope, only: str) -> None:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                scope.names[statement.name] = Function(statement, scope)
            case ast.ClassDef():
                scope.names[statement.name] = Class(statement, scope)
            case ast.Import() | ast.ImportFrom():
                self._import(statement, scope)
            case ast.Assign(targets=targets, value=value):
                found = self.evaluate(value, scope)
                for target in targets:
                    self._assign(target, found, scope)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self.evaluate(value, scope), scope)
            case ast.Expr(value=value):
                self.evaluate(value, scope)
            case ast.Return(value=value):
                raise _ReturnError(self.evaluate(value, scope) if value else None)
            case ast.If(test=test) if (known := truth(self.evaluate(test, scope))) is not UNKNOWN:
                self._run(statement.body if known else statement.orelse, scope, only)
            case ast.For(target=target, iter=source) if self._whole(statement, scope):
                for item in self.items(self.evaluate(source, scope)):
                    self._assign(target, item, scope)
                    self._run(statement.body, scope, only)
            case ast.Try(body=body) | ast.With(body=body):
                self._run(body, scope, only)
            case ast.Pass() | ast.Assert() | ast.AnnAssign():
                pass
            case _:
                self._forget(statement, scope)

    def _whole(self, loop: ast.For, scope: Scope) -> bool:
        """Whether all rounds of a loop are known."""
        early = any(isinstance(each, (ast.Break, ast.Continue)) for each in ast.walk(loop))
        return not early and UNKNOWN not in self.items(self.evaluate(loop.iter, scope))

    def _forget(self, statement: ast.stmt, scope: Scope) -> None:
        """Take note of a statement that may run or not, any number of times."""
        if scope.function and any(isinstance(each, (ast.Return, ast.Raise)) for each in ast.walk(statement)):
            raise _ReturnError(UNKNOWN)
        for name in set(changed([statement])):
            if not opened(scope.names.get(name)):
                scope.names[name] = UNKNOWN

    def _import(self, statement: ast.Import | ast.ImportFrom, scope: Scope) -> None:
        for alias in statement.names:
            if isinstance(statement, ast.Import):
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                scope.names[alias.asname or name] = self.module(name) or UNKNOWN
            else:
                source = self.module(absolute(scope.module.package, statement))
                scope.names[alias.asname or alias.name] = self.value(source, alias.name) if source else UNKNOWN

    def _assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope.names[name] = value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                items = self.items(value)
                fits = len(items) == len(parts) and UNKNOWN not in items
                for part, item in zip(parts, items if fits else [UNKNOWN] * len(parts), strict=True):
                    self._assign(part, item, scope)
            case ast.Attribute(value=of, attr=name):
                if isinstance(found := self.evaluate(of, scope), Instance):
                    found.values[name] = value
            case ast.Subscript(value=of, slice=key):
                if isinstance(place := self.evaluate(of, scope), dict):
                    merge(place, self.evaluate(key, scope), value)
                else:
                    opened(place)

    def evaluate(self, node: ast.expr, scope: Scope) -> Any:
        """The value of an expression."""
        self._count()
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(name, scope)
            case ast.Attribute(value=of, attr=name):
                return self.attribute(self.evaluate(of, scope), name)
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                listed: list[Any] = []
                for each in elements:
                    if isinstance(each, ast.Starred):
                        listed += self.items(self.evaluate(each.value, scope))
                    else:
                        listed.append(self.evaluate(each, scope))
                return tuple(listed) if isinstance(node, ast.Tuple) else listed
            case ast.Dict(keys=keys, values=values):
                entries: dict[Any, Any] = {}
                for key, value in zip(keys, values, strict=True):
                    merge(entries, key and self.evaluate(key, scope), self.evaluate(value, scope))
                return entries
            case ast.BinOp(left=left, op=op, right=right):
                return combined(op, self.evaluate(left, scope), self.evaluate(right, scope))
            case ast.UnaryOp(op=op, operand=operand):
                return result(OPERATORS.get(type(op)), self.evaluate(operand, scope))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return result(OPERATORS.get(type(op)), self.evaluate(left, scope), self.evaluate(right, scope))
            case ast.IfExp(test=test) if (known := truth(self.evaluate(test, scope))) is not UNKNOWN:
                return self.evaluate(node.body if known else node.orelse, scope)
            case ast.JoinedStr(values=values):
                return result("".join, [self.evaluate(each, scope) for each in values])
            case ast.FormattedValue(value=value, format_spec=None):
                return result(str, self.evaluate(value, scope))
            case ast.Subscript(value=of, slice=key):
                found = self.evaluate(of, scope)
                return found if isinstance(found, Class) else result(operator.getitem, found, self.evaluate(key, scope))
            case ast.Call():
                return self._call(node, scope)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                return self._comprehension(node.elt, node.generators, scope)
        return UNKNOWN

    def _comprehension(self, element: ast.expr, generators: Sequence[ast.comprehension], scope: Scope) -> list[Any]:
        if not generators:
            return [self.evaluate(element, scope)]
        found: list[Any] = []
        for item in self.items(self.evaluate(generators[0].iter, scope)):
            inner = Scope(scope.module, {}, scope, scope.function)
            self._assign(generators[0].target, item, inner)
            kept = [truth(self.evaluate(test, inner)) for test in generators[0].ifs]
            if UNKNOWN in (item, *kept):
                found.append(UNKNOWN)
            elif all(kept):
                found += self._comprehension(element, generators[1:], inner)
        return found

    def _name(self, name: str, scope: Scope) -> Any:
        module, inner = scope.module, scope
        while name not in inner.names:
            if inner.outer is None:
                known = name in module.statements or name not in BUILTINS
                return self.value(module, name) if known else BUILTINS[name]
            inner = inner.outer
        return inner.names[name]

    def items(self, value: Any) -> list[Any]:
        """The entries of a list, or the values of an enumeration; a single UNKNOWN if they are not known."""
        if isinstance(value, Class) and self.is_enum(value):
            return [each for each in self.members(value).values() if not isinstance(each, Function)]
        known = isinstance(value, (list, tuple, dict, range, str)) and len(value) <= LONG
        return list(value) if known else [UNKNOWN]

    def attribute(self, value: Any, name: str) -> Any:
        """The attribute of a value, as `value.name` gives it."""
        match value:
            case Module():
                return self.value(value, name)
            case Instance(values=values) if name in values:
                return values[name]
            case Instance(kind=kind):
                return self._inherited(kind, name, value)
            case Class():
                return self._inherited(value, name, value)
            case str() | int() if name == "value":  # of an enumeration
                return value
            case str() | list() | dict() if name in METHODS:
                return getattr(value, name)
        opened(value)  # a method may change it
        return UNKNOWN

    def _inherited(self, kind: Class, name: str, through: Class | Instance, home: Class | None = None) -> Any:
        """An attribute of a class or its nearest base that has it; with `home`, of the bases above that one."""
        bases = self.bases(kind)
        start = next((at + 1 for at, each in enumerate(bases) if home and each.node is home.node), 0)
        base = next((each for each in bases[start:] if name in self.members(each)), kind)
        found = self.members(base).get(name, UNKNOWN)
        owner = through.kind if isinstance(through, Instance) else through
        if isinstance(found, Class):
            return Class(found.node, found.scope, owner)
        if not isinstance(found, Function):
            return found
        marks = {each.id for each in found.node.decorator_list if isinstance(each, ast.Name)}
        bound = owner if "classmethod" in marks else None if through is owner or "staticmethod" in marks else through
        return Function(found.node, base.scope, bound, base)

    def members(self, kind: Class) -> dict[Any, Any]:
        """The attributes that a class itself defines."""
        key = (id(kind.node), "")
        if key not in self._values:
            inner = Scope(kind.scope.module, {}, kind.scope)
            self._values[key] = inner.names
            self._run(kind.node.body, inner)
        return cast("dict[Any, Any]", self._values[key])

    def bases(self, kind: Class) -> list[Class]:
        """A class and all its bases that are known, nearest first."""
        if kind.node in self._bases:
            return [kind, *self._bases[kind.node]]
        found = self._bases.setdefault(kind.node, [])
        for each in kind.node.bases:
            base = self.evaluate(each, kind.scope)
            if isinstance(base, Class) and base.node is kind.node and kind.scope.outer:  # class Input(Input)
                base = self.evaluate(each, kind.scope.outer)
            if isinstance(base, Class) and base.node is not kind.node:
                known = [each.node for each in found]
                found += [inner for inner in self.bases(base) if inner.node not in known]
        return [kind, *found]

    def is_enum(self, kind: Class) -> bool:
        """Whether a class is an enumeration."""
        return any("Enum" in ast.unparse(each) for base in self.bases(kind) for each in base.node.bases)

    def _call(self, node: ast.Call, scope: Scope) -> Any:
        given = self.evaluate(ast.List(node.args, ast.Load()), scope)
        named: dict[Any, Any] = {}
        for each in node.keywords:
            merge(named, each.arg, self.evaluate(each.value, scope))
        match node.func, scope.function:
            case (
                ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr=name),
                Function(bound=Class() | Instance() as bound, home=Class() as home),
            ):
                kind = bound.kind if isinstance(bound, Instance) else bound
                return self.call(self._inherited(kind, name, bound, home), given, named)
        return self.call(self.evaluate(node.func, scope), given, named)

    def call(self, called: Any, given: Sequence[Any] = (), named: dict[Any, Any] | None = None) -> Any:
        """The value of a call."""
        named = named or {}
        match called:
            case Class() if not self.is_enum(called):
                return Instance(called, self._fields(called, given, named))
            case Function(node=node, scope=outer, bound=bound):
                filled = self._filled(called, given if bound is None else [bound, *given], named)
                try:
                    self._run(node.body, Scope(outer.module, filled, outer, called))
                except _ReturnError as returned:
                    return returned.args[0]
                return None
            case _ if callable(called) and not named:
                if len(given) == 1 and called in (list, tuple, sorted):
                    given = [self.items(given[0])]
                return result(called, *given)
        for each in (*given, *named.values()):
            opened(each)  # what is called may change it
        return UNKNOWN

    def _fields(self, kind: Class, given: Sequence[Any], named: dict[Any, Any]) -> dict[Any, Any]:
        """The arguments of a constructor by name."""
        init = self._inherited(kind, "__init__", Instance(kind, {}))
        if isinstance(init, Function):
            return self._filled(init, [None, *given], named)
        body = [each for base in reversed(self.bases(kind)) for each in base.node.body]
        fields = [
            each.target.id for each in body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        ]
        return {**dict(zip(fields, given, strict=False)), **named}

    def _filled(self, function: Function, given: Sequence[Any], named: dict[Any, Any]) -> dict[Any, Any]:
        """The parameters of a function by name, as a call fills them."""
        arguments = function.node.args
        plain = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        others = [each.arg for each in arguments.kwonlyargs]
        found: dict[Any, Any] = dict.fromkeys((*plain, *others), UNKNOWN)
        if UNKNOWN not in named:
            defaults = [*zip(plain[::-1], arguments.defaults[::-1], strict=False)]
            defaults += [(name, each) for name, each in zip(others, arguments.kw_defaults, strict=True) if each]
            found |= {name: self.evaluate(each, function.scope) for name, each in defaults}
        found |= dict(zip(plain, given, strict=False))
        found |= {name: value for name, value in named.items() if name in found}
        if arguments.vararg:
            found[arguments.vararg.arg] = list(given[len(plain) :])
        if arguments.kwarg:
            found[arguments.kwarg.arg] = {name: value for name, value in named.items() if name not in found}
        return found
