"""Static analysis of a node's code: its possible capabilities, for the person who decides about an update.

A separate process reads each tree within limits: a file that blocks the parser, exhausts memory or crashes the
interpreter ends only that process.
"""

from __future__ import annotations

import ast
import builtins
import json
import pickletools
import re
import resource
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import files, foreign, shell
from core.errors import ProcessError
from core.typed import convert

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IMPORTED = {
    "starts programs": "(posix)?subprocess pty pexpect sh plumbum fabric git pipes webbrowser popen fork(pty)? "
    r"startfile (exec|spawn)[lv]p?e? posix_spawnp? (?<!platform\.)system distutils\.spawn",
    "native code": "ctypes cffi pybind11 cppyy",
    "network": "socket socketserver ssl http urllib[23]? requests aiohttp httpx httplib2 websockets? socketio ftplib "
    "smtplib poplib imaplib telnetlib nntplib xmlrpc wsgiref zmq pycurl paramiko asyncssh tornado flask fastapi "
    r"uvicorn grpc boto3 huggingface_hub modelscope gdown playwright selenium multiprocessing\.(connection|managers)",
    "runs text as code": r"builtins (frozen_)?importlib(?!\.(metadata|resources)\b)\w* imp zipimport pyximport runpy "
    r"code codeop marshal pickle dill cloudpickle joblib jsonpickle shelve pdb doctest timeit cProfile pip setuptools "
    r"venv ensurepip logging\.config \w*interpreters",
    "hides what it uses": "__dict__",
}
"""Names that give a capability anywhere in the name of an import: `_ctypes`, `shutil.os.system`."""

ANYWHERE = {
    "starts programs": r"(os|posix|nt)\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork\w*|startfile) "
    r"subprocess\.\w+ create_subprocess_\w+ subprocess_(exec|shell)",
    "native code": "load_library LoadLibrary CDLL PyDLL cpp_extension RawKernel RawModule load_extension",
    "network": r"asyncio\.(open_\w+|start_\w*server) create_(connection|server|datagram_endpoint) torch\.hub "
    "urlopen urlretrieve",
    "runs text as code": r"builtins\.(eval|exec|compile|breakpoint) __import__ import_module exec_module load_module "
    r"spec_from_file_location resolve_name torch\.(load|package) yaml\.(unsafe_)?load read_pickle allow_pickle "
    r"trust_remote_code types\.CodeType get_type_hints pydoc\.locate addsitedir sympify parse_expr",
    "hides what it uses": r"builtins\.(globals|locals|vars) sys\.(modules|_getframe|_current_frames|meta_path) "
    r"sys\.path_hooks gc\.get_\w+ getmodule __(subclasses|globals|builtins|bases|base|mro|code|closure|self)__ "
    r"__(loader|spec|getattribute)__ (f|gi|cr|ag|tb)_(globals|locals|builtins|back|frame)",
}
"""Names that give a capability anywhere, such as `self.os.system`. Built-in names are listed under `builtins`."""

KINDS = {
    "runs at every start of Python (.pth)": ("pth", rb"(?!)"),
    "binary": (
        r"so(\.[\w.]+)?|dll|pyd|dylib|exe|py[co]|wasm|node|class",
        rb"\x7fELF|MZ|[\xce\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]|\xca\xfe\xba[\xbe\xbf]|\0asm|!<arch>|BC\xc0\xde",
    ),
    "archive": (
        r"zip|egg|whl|jar|tar(\.\w+)?|t?gz|t?bz2?|t?xz|7z|rar|zst|lz4|cab|deb|rpm|apk",
        rb"PK[\3\5]|\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!|\x04\x22M\x18",
    ),
    "pickle": ("pkl|pickle|pt|ckpt|joblib|dill", rb"\x80[\1-\5]"),
    "script": ("sh|bash|zsh|csh|ksh|fish|command|bat|cmd|psm?1|vbs|wsf|hta", rb"#!"),
}
"""Files that are not analysed, only reported when they change: their suffixes and their first bytes."""

_MEDIA = (
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}(WEBP|WAVE|AVI )|II\*\0|MM\0\*|8BPS|v/1\1|\0\0\1\0|\0{3}\x0cJ"
    rb"|.{4}ftyp|\x1aE\xdf\xa3|\0\0\1[\xb3\xba]|FLV\1|OggS|fLaC|ID3|\xff[\xf2\xf3\xfb]|MThd|FORM.{4}AIF"
    rb"|\0\1\0\0|OTTO|true|ttcf|wOF[F2]"
)
"""First bytes of images, videos, sounds and fonts."""

LIMITS = {"RLIMIT_AS": 2 << 30, "RLIMIT_CPU": 60, "RLIMIT_FSIZE": 32 << 20, "RLIMIT_CORE": 0}
"""Limits for analysing a tree: bytes of memory, seconds of CPU, bytes of output."""


class Reading(msgspec.Struct, frozen=True):
    """The result of analysing a tree.

    `uses` are each file's capabilities, with the name that gives it or the hash of a file that is not analysed.
    `imported` are the files that run when ComfyUI imports the node, according to import statements; `strings` are the
    short strings of its code.
    """

    uses: dict[str, list[tuple[str, str, str]]]
    imported: set[str]
    strings: set[str]
    failed: bool = False


def read(tree: Path) -> Reading:
    """Analyse a tree in a separate process. A failed analysis gives a result that differs from every other tree's."""
    argv: list[str | Path] = [sys.executable, "-Es", "-X", "utf8", "-m", "lock.review", tree.absolute()]
    with (
        tempfile.TemporaryFile() as stdout,
        suppress(ProcessError, ValueError, RecursionError, msgspec.ValidationError),
    ):
        shell.run(argv, cwd=files.CHECKOUT, env={}, inherit=False, output=stdout, timeout=5 * LIMITS["RLIMIT_CPU"])
        stdout.seek(0)
        return convert(json.load(stdout), Reading)
    return Reading({"all of it": [("cannot be read", "", str(tree))]}, set(), set(), failed=True)


def gained(before: Reading, after: Reading) -> tuple[str, ...]:
    """The new capabilities of a node, in words: a capability, and the files that now have it, with their names."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for file, uses in sorted(after.uses.items()):
        fresh: defaultdict[str, set[str]] = defaultdict(set)
        for power, name, _ in {*uses} - {*before.uses.get(file, ())}:
            fresh[power].add(name)
        for power, names in fresh.items():
            shown = ", ".join(sorted(names - {""}))
            found[power].append(f"{file} ({shown})" if shown else file)
    return tuple(f"{power}: {', '.join(where)}" for power, where in sorted(found.items()))


def _read(tree: Path) -> Reading:
    there = dict(files.tree(tree))
    uses: dict[str, list[tuple[str, str, str]]] = {}
    targets: dict[str, set[str]] = {}
    strings: set[str] = set()
    for name, path in there.items():
        kinds = _kinds(name, path)
        found: set[tuple[str, str, str]] = set()
        if _is_code(name):
            module = foreign.parsed(path)
            nodes = list(ast.walk(module)) if module else []
            kinds |= set() if module else {"cannot be read"}
            found = {(power, each, "") for power, each in _uses(nodes)}
            folder = Path(name).parent
            targets[name] = {each for node in nodes for each in _targets(node, folder) if each in there}
            texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
            strings |= {text for text in texts if len(text) < 100}
        if kinds:
            found |= {(kind, "", files.sha256(path)) for kind in kinds}
        uses |= {name: sorted(found)} if found else {}
    imported: set[str] = set()
    pending = {"__init__.py", "prestartup_script.py", "install.py"} & there.keys()
    while pending:
        imported.add(name := pending.pop())
        pending |= targets.get(name, set()) - imported
    return Reading(uses, imported, strings)


def _is_code(name: str) -> bool:
    return name.lower().endswith((".py", ".pyw"))


def _kinds(name: str, path: Path) -> set[str]:
    with path.open("rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read()
    signs = {"archive": b"PK\5\6" in tail, "pickle": _is_old_pickle(head)}  # a zip is read from its end
    found = {
        kind
        for kind, (suffixes, magic) in KINDS.items()
        if re.search(rf"\.({suffixes})\Z", name.lower()) or re.match(magic, head, re.DOTALL) or signs.get(kind)
    }
    if _is_code(name):
        found.discard("script")
    if not found and b"\0" in head and not re.match(_MEDIA, head, re.DOTALL):
        found.add("binary")
    return found


def _is_old_pickle(head: bytes) -> bool:
    """Whether this is a pickle in text form that names a callable."""
    with suppress(ValueError):
        return bool({"GLOBAL", "INST"} & {code.name for code, _, _ in pickletools.genops(head)})
    return False


def _uses(nodes: Sequence[ast.AST]) -> Iterator[tuple[str, str]]:
    """The capabilities that code uses and the names that give them, whether imported, passed on or called."""
    bound: defaultdict[str, set[str]] = defaultdict(set)  # the possible meanings of an imported name
    modules: set[str] = set()
    imported: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                modules.add(alias.asname or top)
                bound[alias.asname or top].add(alias.name if alias.asname else top)
                imported.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = alias.name if node.level else f"{node.module}.{alias.name}"
                bound[alias.asname or alias.name].add(full)
                imported.add(full)
    names: set[str] = set()
    hidden = {full for full in bound["*"] if full != "*"}
    seen: set[int] = set()
    for node in nodes:
        match node:
            case ast.Constant(value=str(text)) if text.startswith("__"):
                names.add(text)
            case ast.keyword(arg=str(text)):
                names.add(text)
            case ast.Call(func=ast.Name(id="getattr"), args=[of, *_]):
                base, parts = _chain(of, set())
                if isinstance(base, ast.Name) and base.id in bound:
                    hidden.add(f"getattr({'.'.join([base.id, *parts])})")
        if id(node) in seen or not isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
            continue
        base, parts = _chain(node, seen)
        root = base.id if isinstance(base, ast.Name) else ""
        if isinstance(base, ast.Name) and not parts and not isinstance(base.ctx, ast.Load):
            continue
        names.add(".".join([f"builtins.{root}" if hasattr(builtins, root) else root, *parts]))
        meant = bound[root] if root in bound else {root} if bound["*"] else ()
        imported |= {".".join([full, *parts]) for full in meant}
        if root in modules and not parts:  # it may be renamed from here on
            hidden.add(f"{root} as a value")
    yield from (("hides what it uses", each[:80]) for each in hidden)
    for table, chains, more in ((IMPORTED, imported, r"(\.\w+)?"), (ANYWHERE, names | imported, "")):
        for power, patterns in table.items():
            pattern = re.compile(rf"(^|\.)_*({'|'.join(patterns.split())}){more}(?=\.|\Z)")
            for chain in chains:
                for found in pattern.finditer(chain):
                    yield power, chain[: found.end()].removeprefix("" if more else "builtins.").strip(".")[-80:]


def _chain(node: ast.expr, seen: set[int]) -> tuple[ast.expr, list[str]]:
    """The root of `a.b["c"]` or `getattr(a.b, "c")` and the names that follow; `seen` collects all nodes visited."""
    parts: list[str] = []
    while True:
        seen.add(id(node))
        match node:
            case ast.Attribute(value=inner, attr=part):
                pass
            case ast.Subscript(value=inner, slice=ast.Constant(value=str(part))):
                pass
            case ast.Call(func=ast.Name(id="getattr"), args=[inner, ast.Constant(value=str(part)), *_]):
                pass
            case _:
                return node, parts[::-1]
        parts.append(part if part.isidentifier() else "?")
        node = inner


def _targets(node: ast.AST, folder: Path) -> list[str]:
    """The files that an import statement in a folder may mean. Nodes import their folder as a package or directly."""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
        bases = [folder, Path()]
    elif isinstance(node, ast.ImportFrom):
        stem = node.module or ""
        modules = [stem, *(f"{stem}.{alias.name}".lstrip(".") for alias in node.names)]
        above = [folder, *folder.parents]
        bases = [above[min(node.level, len(above)) - 1]] if node.level else [folder, Path()]
    else:
        return []
    paths = [str(base / module.replace(".", "/")) for base in bases for module in modules]
    return [each for path in paths for each in (f"{path}.py", f"{path}/__init__.py".removeprefix("./"))]


if __name__ == "__main__":
    for limit, most in LIMITS.items():
        with suppress(AttributeError, ValueError, OSError):  # macOS does not support a memory limit
            resource.setrlimit(getattr(resource, limit), (most, most))
    print(json.dumps(msgspec.to_builtins(_read(Path(sys.argv[1])))), end="")  # noqa: T201  to the client that started it
