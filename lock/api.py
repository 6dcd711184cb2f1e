"""What ComfyUI's modules define, and what custom nodes use of it, read from code without running it.

What cannot be read stays unknown, and is never reported as missing.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from core import foreign
from core.errors import SourceError
from lock import values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_ROOTS = re.compile(
    r"comfy(_\w+)?|api_server|app|cuda_malloc|execution|folder_paths|latent_preview|main|middleware|node_helpers|nodes"
    r"|protocol|server|utils"
)
"""ComfyUI's modules and packages at the top; some are also names of packages of others."""


Parameters = tuple[tuple[str, int, bool], ...]
"""The parameters of a function: name, kind (an index of _KINDS), and whether there is a default."""

_KINDS = (
    inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD,
)  # fmt: skip


class Module(msgspec.Struct, frozen=True):
    """A module: its names (of a class also `CLASS.METHOD`), with the parameters of what can be called, if known.

    `stars` are modules whose names it imports with `*`; `open` says that it may have other names.
    """

    names: dict[str, Parameters | None]
    stars: tuple[str, ...] = ()
    open: bool = False


class Api(msgspec.Struct, frozen=True):
    """The modules of a ComfyUI, by their dotted names."""

    modules: dict[str, Module]

    def find(self, name: str) -> tuple[str, bool | None]:
        """The start of a dotted name that decides whether it exists, and whether it does; None if not known."""
        parts = name.split(".")
        for at in range(len(parts), 0, -1):
            if (module := ".".join(parts[:at])) in self.modules:
                exists = at == len(parts) or self._defines(module, parts[at], frozenset())
                return ".".join(parts[: at + 1]), exists
        return parts[0], False

    def _defines(self, module: str, name: str, seen: frozenset[str]) -> bool | None:
        found = self.modules.get(module)
        if found is None:  # a package's
            return None
        others = [self._defines(each, name, seen | {module}) for each in found.stars if each not in seen]
        if name in found.names or True in others:
            return True
        return None if found.open or None in others else False

    def parameters(self, name: str) -> Parameters | None:
        """The parameters of a function, method or class; None if they are not known."""
        parts = name.split(".")
        for at in range(len(parts) - 1, 0, -1):
            if found := self.modules.get(".".join(parts[:at])):
                return found.names.get(".".join(parts[at:]))
        return None


def read(tree: Path) -> Api:
    """Read what the modules of a ComfyUI tree define."""
    modules: dict[str, Module] = {}
    for top in sorted(tree.iterdir()):
        if _ROOTS.fullmatch(top.stem):
            for path in [top] if top.suffix == ".py" else sorted(top.rglob("*.py")):
                name = ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")
                modules[name] = _module(path, name)
                for at, mark in enumerate(name):
                    if mark == ".":  # a folder without an __init__.py
                        modules.setdefault(name[:at], Module({}))
    return Api(modules)


_known: dict[tuple[str, str, bytes], Module] = {}
"""The modules that were read, by name and content: most are the same in two versions of ComfyUI."""


def _module(path: Path, name: str) -> Module:
    try:
        content = foreign.content(path)
    except SourceError:
        return Module({}, open=True)
    key = (name, path.name, hashlib.sha256(content).digest())
    if key not in _known:
        _known[key] = _defined(path, name, content)
    return _known[key]


def _defined(path: Path, name: str, content: bytes) -> Module:
    parsed = foreign.parsed(path)
    if parsed is None:
        return Module({}, open=True)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names: dict[str, Parameters | None] = dict.fromkeys(values.changed(parsed.body))
    stars = []
    for node in ast.walk(parsed) if _ANYWHERE.search(content) else ():
        if isinstance(node, ast.Global):
            names |= dict.fromkeys(node.names)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            stars.append(values.absolute(package, node))
    for statement in parsed.body:
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found = (each for each in ast.walk(statement) if isinstance(each, ast.Name))
            names |= {each.id: None for each in found if isinstance(each.ctx, ast.Store)}
    for each, made in values.Module(package, parsed.body).statements.items():
        if len(made) == 1:
            names |= _callable(each, made[0])
    return Module(names, tuple(stars), bool(_DYNAMIC.search(content)))


_ANYWHERE = re.compile(rb"\bglobal\b|\bimport[\s\\]*\*")
"""Statements that give a module names from inside its functions or blocks; few files have any."""

_DYNAMIC = re.compile(rb"globals\(\)(\[|\.update)|sys\.modules\[__name__|def __getattr__\(\w+\)")
"""Code that may give a module other names than its statements."""


def _callable(name: str, node: ast.stmt) -> dict[str, Parameters | None]:
    """The parameters of a function, or of a class and its methods, unless a decorator or metaclass may change them."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.decorator_list:
        return {name: _parameters(node.args)}
    if not isinstance(node, ast.ClassDef):
        return {}
    inner = values.Module("", node.body).statements
    found = {f"{name}.{each}": made for each, (only, *_) in inner.items() for made in _callable("", only).values()}
    found = {each: made for each, made in found.items() if len(inner[each.rpartition(".")[2]]) == 1}
    made = found.get(f"{name}.__init__")
    plain = made and not (node.decorator_list or node.keywords or "__new__" in inner)
    return {**found, name: made[1:] if made and plain else None}


def _parameters(given: ast.arguments) -> Parameters:
    plain = [*given.posonlyargs, *given.args]
    first = len(plain) - len(given.defaults)
    found = [(each.arg, int(at >= len(given.posonlyargs)), at >= first) for at, each in enumerate(plain)]
    found += [(given.vararg.arg, 2, False)] if given.vararg else []
    keywords = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    found += [(each.arg, 3, default is not None) for each, default in keywords]
    return tuple(found + ([(given.kwarg.arg, 4, False)] if given.kwarg else []))


# --- uses -------------------------------------------------------------------------------------------------------------


class Use(msgspec.Struct, frozen=True):
    """A use of one of ComfyUI's names: `import`, `attribute`, `call` with `count` arguments and these keywords, or
    `patch` by a function with these parameters (`by` is its name while they are not known).
    """

    name: str
    place: str
    kind: str
    count: int = 0
    keywords: tuple[str, ...] = ()
    parameters: Parameters | None = None
    by: str = ""

    @property
    def file(self) -> str:
        """The file of its place."""
        return self.place.rpartition(":")[0]


class Uses(msgspec.Struct, frozen=True):
    """All uses in a custom node; `expected` are the names that it expects to be missing in some ComfyUI."""

    uses: tuple[Use, ...]
    expected: tuple[str, ...] = ()


def uses(tree: Path) -> Uses:
    """What a custom node uses of ComfyUI, in its __init__.py and the files that this one imports, directly or not.

    Left out are uses that the code expects to fail: with `try`, `hasattr` or a comparison of versions.
    """
    paths = {path for path in tree.rglob("*.py") if not _ASIDE.fullmatch(path.relative_to(tree).parts[0])}
    waiting, moved, every = [tree / "__init__.py"], False, False
    found: dict[Path, list[Use]] = {}
    functions: dict[str, list[Parameters | None]] = {}
    expected = set[str]()
    while waiting:  # one syntax tree at a time: they are large
        if (path := waiting.pop()) in found or path not in paths:
            continue
        found[path], parsed = [], foreign.python(path)
        nodes = [*ast.walk(parsed)]
        waiting += _imported(tree, path, nodes)
        if not every and _computes(nodes):
            every, waiting = True, [*waiting, *paths]
        moved = moved or bool(parsed.body and b"sys.path" in foreign.content(path))
        with suppress(RecursionError):
            file = _File(str(path.relative_to(tree)), parsed, nodes)
            found[path] = file.found
            expected |= file.expected
            for name, parameters in file.functions.items():
                functions.setdefault(name, []).append(parameters)
    own = {each.stem for each in tree.iterdir()} if moved else set()
    listed = (_resolved(each, functions) for _, uses in sorted(found.items()) for each in uses)
    used = (each for each in listed if each.name.partition(".")[0] not in own)
    return Uses(tuple(used), tuple(sorted(each for each in expected if each.partition(".")[0] not in own)))


def _resolved(use: Use, functions: Mapping[str, Sequence[Parameters | None]]) -> Use:
    """A patch with the parameters of a function of another file; if they are not known, its target must only exist."""
    if use.kind != "patch" or use.parameters is not None:
        return use
    (*others, found) = functions.get(use.by, (None,))
    known = found is not None and not others
    return msgspec.structs.replace(use, kind="patch" if known else "attribute", parameters=found, by="")


_ASIDE = re.compile(r"tests?|examples?|scripts?|docs|build|setup\.py")
"""Files and folders of a repository that ComfyUI does not import."""


def _computes(nodes: Sequence[ast.AST]) -> bool:
    """Whether a file may import modules by a computed name: any of the node's files."""
    named = {each.id for each in nodes if isinstance(each, ast.Name)}
    return bool(named & {"importlib", "__import__", "pkgutil", "exec"})


def _imported(tree: Path, path: Path, nodes: Sequence[ast.AST]) -> Iterator[Path]:
    """The files of a node that one of its files may import."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            level = getattr(node, "level", 0)
            base = path.parents[level - 1] if 0 < level <= len(path.parents) else tree
            base = base.joinpath(*(getattr(node, "module", "") or "").split("."))
            for place in (base, *(base.joinpath(*each.name.split(".")) for each in node.names)):
                yield from (place / "__init__.py", place.parent / f"{place.name}.py")


class _File:
    """The uses in one file. `aliases` are its names for ComfyUI's, without those that also mean something else."""

    def __init__(self, name: str, tree: ast.Module, nodes: Sequence[ast.AST]) -> None:
        self.name = name
        self._uses: list[Use] = []
        self.expected: set[str] = set()
        imports = [each for node in nodes for each in _imports(node)]
        other = {local for local, _, meant in imports if not meant}
        other |= {each.arg for each in nodes if isinstance(each, ast.arg)}
        other |= {each.id for each in nodes if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        other |= {str(each.name) for each in nodes if isinstance(each, (*_DEFINITIONS, ast.ExceptHandler))}
        self._aliases = {local: meant for local, _, meant in imports if local not in other}
        made = [(each.name, _callable(each.name, each)) for each in nodes if isinstance(each, _DEFINITIONS[:2])]
        names = [name for name, _ in made]
        self.functions = {name: each.get(name) if names.count(name) == 1 else None for name, each in made}
        relative = (each for each in nodes if isinstance(each, ast.ImportFrom) and each.level)
        self._theirs = {name.asname or name.name: name.name for each in relative for name in each.names}
        if any(meant for _, _, meant in imports):  # most files use nothing of ComfyUI
            self._visit(tree, expected=False)

    @property
    def found(self) -> list[Use]:
        """All uses without those of a name that the file expects to be missing elsewhere."""
        expected = tuple(f"{each}." for each in self.expected)
        return [each for each in self._uses if not f"{each.name}.".startswith(expected)]

    def _visit(self, node: ast.AST, *, expected: bool) -> None:
        soft = expected
        match node:
            case ast.Import() | ast.ImportFrom():
                for _, name, meant in _imports(node):
                    self._add(name if meant else "", node, "import", expected=expected)
                    self.expected |= {name} if expected and meant else set()
            case ast.Try(handlers=handlers) | ast.TryStar(handlers=handlers):
                soft = soft or any(not each.type or _SOFT.search(ast.unparse(each.type)) for each in handlers)
            case ast.If(test=test) | ast.IfExp(test=test):
                expected = soft = expected or bool(_VERSIONS.search(ast.unparse(test)))
            case ast.With(items=items):
                expected = soft = expected or any("suppress" in ast.unparse(each) for each in items)
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[of, ast.Constant(value=str(name)), *_]):
                self.expected |= {f"{dotted}.{name}"} if (dotted := self._dotted(of)) else set()
            case ast.Call(func=func, args=args, keywords=keywords):
                named = tuple(each.arg for each in keywords if each.arg)
                if len(named) == len(keywords) and not any(isinstance(each, ast.Starred) for each in args):
                    self._add(self._dotted(func), node, "call", len(args), named, expected=expected)
                if ast.unparse(func) == "setattr" and len(args) == 3 and isinstance(args[1], ast.Constant):
                    self._patch(self._dotted(ast.Attribute(args[0], str(args[1].value))), args[2], expected=expected)
            case ast.Assign(targets=targets, value=value):
                for each in targets:
                    self._patch(self._dotted(each) if isinstance(each, ast.Attribute) else "", value, expected=expected)
            case ast.Attribute(ctx=ast.Load()):
                self._add(self._dotted(node), node, "attribute", expected=expected)
        for name, value in ast.iter_fields(node):
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, ast.AST):
                    self._visit(inner, expected=soft if name != "finalbody" else expected)

    def _dotted(self, node: ast.AST) -> str:
        """The full name of `alias.part.part`; empty for anything else."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        meant = self._aliases.get(node.id, "") if isinstance(node, ast.Name) else ""
        return ".".join([meant, *reversed(parts)]) if meant else ""

    def _patch(self, name: str, value: ast.expr, *, expected: bool) -> None:
        """Add a function that replaces one of ComfyUI's; its parameters may be known later, or not at all."""
        parameters, by = None, ""
        match value:
            case ast.Lambda(args=given):
                parameters = _parameters(given)
            case ast.Name(id=local):
                parameters = self.functions.get(local)
                by = "" if local in self.functions else self._theirs.get(local, "")
            case ast.Attribute(value=ast.Name(id=local), attr=attribute):
                by = attribute if local in self._theirs else ""
        if name and not expected:
            self._uses.append(Use(name, f"{self.name}:{value.lineno}", "patch", parameters=parameters, by=by))

    def _add(
        self, name: str, node: ast.AST, kind: str, count: int = 0, keywords: tuple[str, ...] = (), *, expected: bool
    ) -> None:
        if name and not expected:
            self._uses.append(Use(name, f"{self.name}:{getattr(node, 'lineno', 0)}", kind, count, keywords))


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SOFT = re.compile(r"\b(AttributeError|BaseException|Exception|ImportError|ModuleNotFoundError|TypeError)\b")
_VERSIONS = re.compile(r"hasattr|getattr|version|TYPE_CHECKING|signature", re.IGNORECASE)


def _imports(node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """The local name, the full name and the meaning of each name that is imported; "" if it is not ComfyUI's."""
    for each in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
        local = each.asname or each.name.partition(".")[0]
        name = f"{node.module}.{each.name}".removesuffix(".*") if isinstance(node, ast.ImportFrom) else each.name
        own = _ROOTS.fullmatch(name.partition(".")[0]) and not getattr(node, "level", 0)
        yield local, name, (name if each.asname or isinstance(node, ast.ImportFrom) else local) if own else ""


# --- breakage ---------------------------------------------------------------------------------------------------------


class Broken(msgspec.Struct, frozen=True):
    """A name of ComfyUI that a custom node uses and that is `missing`, or whose `call` fails, with the reason.

    `patch`: ComfyUI's calls fail, since the node puts a function with other parameters in its place.
    """

    name: str
    kind: str
    detail: str
    places: tuple[str, ...]

    @property
    def said(self) -> str:
        """The problem in words, to follow the node's name."""
        why = {
            "missing": f"uses {self.name}, which is missing",
            "call": f"calls {self.name}, which fails: {self.detail}",
            "patch": f"replaces {self.name}, and ComfyUI's calls of it fail: {self.detail}",
        }
        return f"{why[self.kind]} ({', '.join(self.places[:3])})"


def broken(found: Uses, old: Api, new: Api, before: Uses) -> list[Broken]:
    """The uses that fail with a new ComfyUI, without those of the code `before` that do not work with the old one."""
    listed: dict[tuple[str, str, str], list[str]] = {}
    works = {(use.kind, use.name, use.file) for use in found.uses if _problem(use, new) == ""}  # for several versions
    former = {use.name for use in before.uses}
    for use in found.uses:
        name, exists = new.find(use.name)
        if exists is False:
            sure = use.name not in former and use.kind == "import" and "." in name and name.split(".")[0] in new.modules
            if sure or old.find(use.name)[1]:
                listed.setdefault((name, "missing", ""), []).append(use.place)
        elif (use.name in former or use.kind == "patch") and _problem(use, old) != "":
            continue
        elif (use.kind, use.name, use.file) not in works and (problem := _problem(use, new)):
            listed.setdefault((use.name, use.kind, problem), []).append(use.place)
    return [Broken(*key, tuple(dict.fromkeys(places))) for key, places in sorted(listed.items())]


def appearing(found: Uses, old: Api, new: Api) -> list[str]:
    """The names that a node expects to be missing in some ComfyUI, and that only one of these has."""
    return [name for name in found.expected if {old.find(name)[1], new.find(name)[1]} == {True, False}]


def _problem(use: Use, api: Api) -> str | None:
    """Why a call fails, of a node or of what it puts in place of a function; "" if it works, None if not known."""
    wanted = api.parameters(use.name) if use.kind in ("call", "patch") else None
    if wanted is None:
        return None
    try:
        if use.kind == "call":
            _signature(wanted).bind(*[None] * use.count, **dict.fromkeys(use.keywords))
            return ""
        plain = [given for _, kind, given in wanted if kind < 2]
        keywords = dict.fromkeys(name for name, kind, _ in wanted if kind > 2)
        for count in (plain.count(False), len(plain) + any(kind == 2 for _, kind, _ in wanted)):
            _signature(use.parameters or ()).bind(*[None] * count, **keywords)
    except TypeError as error:
        return str(error)
    return ""


def _signature(parameters: Parameters) -> inspect.Signature:
    empty = inspect.Parameter.empty
    made = [inspect.Parameter(name, _KINDS[kind], default=None if given else empty) for name, kind, given in parameters]
    return inspect.Signature(made)
