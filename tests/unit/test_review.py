"""Untrusted code is read with limits, and its capabilities are found by name in any spelling."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from pathlib import Path

import pytest

from core import foreign
from lock import application, review
from lock.advisory import Advisory
from tests.errors import raises

STARTS, NATIVE, NETWORK, TEXT, HIDES = review.ANYWHERE

CODE = {
    "from os import path, system": (STARTS, "os.system"),
    "import os as o; o.system('x')": (STARTS, "os.system"),
    "import os\ndef f(): return os.execvp": (STARTS, "os.execvp"),
    "import shutil; shutil.os.system('x')": (STARTS, "shutil.os.system"),
    "from tempfile import _os as x; x.popen('x')": (STARTS, "tempfile._os.popen"),
    "from .a import o; o.system('x')": (STARTS, "o.system"),
    "from .a import *; o.system('x')": (STARTS, "o.system"),
    "class A:\n import os\nA.os.system('x')": (STARTS, "A.os.system"),
    "import os; getattr(os, 'system')('x')": (STARTS, "os.system"),
    "import sys; sys.modules['os'].system('x')": (HIDES, "sys.modules"),
    "from subprocess import run as r": (STARTS, "subprocess.run"),
    "import subprocess as s; s.Popen": (STARTS, "subprocess.Popen"),
    "import _posixsubprocess": (STARTS, "_posixsubprocess"),
    "from asyncio import create_subprocess_shell": (STARTS, "asyncio.create_subprocess_shell"),
    "async def f(loop): await loop.subprocess_exec(1)": (STARTS, "loop.subprocess_exec"),
    "from multiprocessing.connection import Client": (NETWORK, "multiprocessing.connection.Client"),
    "import urllib.request": (NETWORK, "urllib.request"),
    "import logging.handlers as h; h.socket.create_connection": (NETWORK, "logging.handlers.socket.create_connection"),
    "from asyncio import open_connection as c": (NETWORK, "asyncio.open_connection"),
    "import _ctypes": (NATIVE, "_ctypes"),
    "import torch; torch.ops.load_library('x')": (NATIVE, "torch.ops.load_library"),
    "e = eval": (TEXT, "eval"),
    "import builtins; builtins.eval('x')": (TEXT, "eval"),
    "from builtins import exec as e": (TEXT, "builtins.exec"),
    "[__import__][0]('os')": (TEXT, "__import__"),
    "@exec\nclass A: pass": (TEXT, "exec"),
    "import importlib.util": (TEXT, "importlib.util"),
    "from importlib import machinery": (TEXT, "importlib.machinery"),
    "f(x, trust_remote_code=True)": (TEXT, "trust_remote_code"),
    "globals()['eval']": (HIDES, "globals"),
    "__builtins__['x']": (HIDES, "__builtins__"),
    "().__class__.__subclasses__()": (HIDES, "__class__.__subclasses__"),
    "getattr(f, '__globals__')": (HIDES, "f.__globals__"),
    "x['__builtins__']": (HIDES, "x.__builtins__"),
    "print.__self__.x": (HIDES, "print.__self__"),
    "import os; os.__dict__['x']": (HIDES, "os.__dict__.x"),
    "from os import *": (HIDES, "os.*"),
    "import os as o\nx = [o]": (HIDES, "o as a value"),
    "import math\ngetattr(math, 'a' + 'b')": (HIDES, "getattr(math)"),
    "from os import path\ngetattr(path, 'os')": (HIDES, "getattr(path)"),
    "x = a" + ".b" * 400 + ".os.system": (STARTS, "b." * 35 + "b.os.system"),
    "type X = (": ("cannot be read", ""),
    "x = \0": ("cannot be read", ""),
    "x = 1\n" * foreign.LIMIT: ("cannot be read", ""),
    "-" * 50_000 + "1": ("cannot be read", ""),
}
HARMLESS = (
    "import os, platform, re, torch\nos.path.join(os.sep, platform.system())\nre.compile('x')\nmodel.eval()\n"
    "from importlib.metadata import version\nfrom .code import x\nself.socket = response.code\n"
    "self.__class__.__name__\n"
)


def written(tree: Path, contents: dict[str, bytes]) -> review.Reading:
    tree.mkdir()
    for name, content in contents.items():
        (tree / name).write_bytes(content)
    return review.read(tree)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> review.Reading:
    contents = {f"{number}.py": code.encode() for number, code in enumerate((*CODE, HARMLESS))}
    return written(tmp_path_factory.mktemp("review") / "tree", contents)


@pytest.mark.parametrize("code", CODE, ids=lambda code: code[:40])
def test_capabilities_of_code_are_listed(cases: review.Reading, code: str) -> None:
    power, name = CODE[code]
    told = {(each, of[-80:]) for each, of, _ in cases.uses[f"{list(CODE).index(code)}.py"]}
    assert (power, name[-80:]) in told


def test_harmless_code_has_no_capabilities(cases: review.Reading) -> None:
    assert f"{len(CODE)}.py" not in cases.uses


def zipped() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("a", "b")
    return raw.getvalue()


PNG = b"\x89PNG\r\n\x1a\n\0"
FILES = {
    "X.PTH": (b"import os", "runs at every start of Python (.pth)"),
    "lib.so.1": (b"", "binary"),
    "elf": (b"\x7fELF", "binary"),
    "data": (b"x" * 60_000 + b"\0", "binary"),
    "a.EGG": (b"", "archive"),
    "b.txt": (b"\x1f\x8b", "archive"),
    "c.png": (PNG + zipped(), "archive"),
    "d.dat": (pickle.dumps(print, protocol=0), "pickle"),
    "e.dat": (pickle.dumps([1], protocol=4), "pickle"),
    "f.Ckpt": (b"", "pickle"),
    "g.PS1": (b"", "script"),
    "h": (b"#!/bin/sh\n", "script"),
    "i.png": (PNG, ""),
    "j.mp4": (b"\0\0\0\x18ftypmp42", ""),
    "k.woff": (b"wOFF\0\1", ""),
    "l.wav": (b"RIFF\1\0\0\0WAVE", ""),
    "m.txt": ("comfyui\nnumpy\nPKü.\n".encode(), ""),
    "n.py": (b"#!/usr/bin/env python\n", ""),
}


def test_unread_files_are_reported_when_changed(tmp_path: Path) -> None:
    contents = {name: content for name, (content, _) in FILES.items()}
    before, same = written(tmp_path / "a", contents), written(tmp_path / "b", contents)
    after = written(tmp_path / "c", {name: content + b"\n" for name, content in contents.items()})
    assert {name: [each for each, _, _ in uses] for name, uses in same.uses.items()} == {
        name: [kind] for name, (_, kind) in FILES.items() if kind
    }
    assert review.gained(before, same) == ()
    assert review.gained(before, after) == review.gained(review.Reading({}, set(), set()), before)


@pytest.mark.process
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("importlib.import_module('x')", "importlib.import_module('x'); eval('x')", f"{TEXT}: a.py (eval)"),
        ("import urllib.parse", "import urllib.parse, socket", f"{NETWORK}: a.py (socket)"),
        ("type X = (", "type Y = (", "cannot be read: a.py"),
        ("type X = (", "type X = (", None),
        ("e = eval", "f = eval", None),
    ],
)
def test_an_update_is_compared_by_name(tmp_path: Path, old: str, new: str, told: str | None) -> None:
    before, after = (written(tmp_path / name, {"a.py": text.encode()}) for name, text in (("a", old), ("b", new)))
    assert review.gained(before, after) == ((told,) if told else ())


@pytest.mark.process
@pytest.mark.parametrize(
    ("does", "fails"),
    [
        ("None", False),
        ("bytearray(3 << 30) and None", True),
        ("sys.stdout.write(' ' * (40 << 20)) and None", True),
        ("os.abort()", True),
        ("os.kill(os.getpid(), 9)", True),
        ("os._exit(0)", True),
        ("print('[' * 100_000) or os._exit(0)", True),
        ("resource.getrlimit(resource.RLIMIT_CPU) == (60, 60) or os.abort()", False),
        ("os.environ.get('SECRET') and os.abort()", False),
    ],
)
def test_exhausting_tree_ends_only_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, fails: bool
) -> None:
    code = f"import os, resource, runpy, sys; from core import foreign; foreign.parsed = lambda _: ({does}) and None; "
    code += "runpy.run_module('lock.review', {}, '__main__')"
    reader = tmp_path / "python"
    reader.write_text(f'#!/bin/sh\nexec \'{sys.executable}\' -c "{code}" "$6"\n')
    reader.chmod(0o755)
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr(sys, "executable", str(reader))
    one, other = (written(tmp_path / name, {"a.py": b"", "__init__.py": b""}) for name in "ab")
    assert one.failed is other.failed is fails
    told = "cannot be read: all of it" if fails else "cannot be read: __init__.py, a.py"
    assert review.gained(review.Reading({}, set(), set()), one) == (told,)
    assert review.gained(one, other) == ((told,) if fails else ())  # parts that neither shows may differ


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("parser.add_argument(*x)\nparser.add_argument()\nparser.add_argument(1)\nparser.add_argument('x')", {}),
        ("p.add_argument('--a', nargs='x')", {"--a": "*"}),
        (
            f"p.add_argument('--a', nargs=0x{'f' * 5_000}, action=0x{'f' * 5_000}, choices=[0x{'f' * 5_000}])",
            {"--a": "1"},
        ),
        ("p.add_argument('-a', '--b', nargs=2, help='\\d')\n'' is ''", {"-a": "2", "--b": "2"}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_flags_that_are_not_understood_are_left_out(text: str, found: dict[str, str]) -> None:
    known = application.flags(text)
    assert {name: flag.values for name, flag in known.items()} == found
    application.wrong(dict.fromkeys(known, "x"), known)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a['x'] = os.path.join()\na['y'] = os.path.join(models_dir)\na[b] = os.path.join(models_dir, 'z')", {}),
        ("a['x'] = os.path.join(models_dir, *z), join(1, 2)\na['y'] = os.path.join(models_dir, 'z')", {"y": ("z",)}),
    ],
)
def test_folders_that_are_not_understood_are_left_out(text: str, found: dict[str, tuple[str, ...]]) -> None:
    assert application.model_folders(text) == found


@pytest.mark.parametrize(
    "text", ["(", "x = \0", "-" * 50_000 + "1", "a" + ".b" * 100_000, "\udcff", "9" * 5_000, "#" * 300_000]
)
def test_unparsable_comfyui_error_names_the_file(text: str) -> None:
    with raises("config", match=r"comfy/cli_args\.py"):
        application.flags(text)
    with raises("config", match=r"folder_paths\.py"):
        application.model_folders(text)


def test_overlong_version_counts_as_possibly_affected() -> None:
    assert Advisory(what="w", source="s", package="p", versions=("<2",)).has("9" * 5_000) is None
