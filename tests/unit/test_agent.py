"""The agent's own rules, with a real uv and real wheels."""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from deploy import agent


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A wheel with these files, as small as one can be."""
    info = f"{name}-1.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1-py3-none-any.whl"
    record = f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in {**files, **meta}.items():
            archive.writestr(each, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            record += f"{each},sha256={digest},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", record)
    return path


def make(tmp_path: Path, one: dict[str, str], two: dict[str, str]) -> Path:
    """An environment of the wheels `one` and `two`, made as on a host without a network; the part."""
    site = agent.Site({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})
    uv = shutil.which("uv")
    assert uv
    (site.state / "tools").mkdir(parents=True)
    (site.state / "tools/uv").symlink_to(uv)
    site.incoming.mkdir()
    wheels, lines = [], []
    for name, files in (("one", one), ("two", two)):
        path = wheel(tmp_path, name, files)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(site.incoming / digest)
        wheels.append({"file": path.name, "sha256": digest})
        lines.append(f"{name}==1 --hash=sha256:{digest}\n")
    step = {"part": "env-test", "python": sys.executable, "tool": "uv", "wheels": wheels, "offline": True}
    agent.env(site, {**step, "repair": False, "requirements": "".join(lines)}, lambda _: None)
    return site.parts / "env-test"


def test_packages_that_overwrite_each_others_modules_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(agent.Fault) as raised:
        make(tmp_path, {"cv2/__init__.py": "whose = 1"}, {"cv2/__init__.py": "whose = 2"})
    report = raised.value.report
    assert report["what"] == "one and two both bring cv2/__init__.py, and one has overwritten the other's"
    assert "[override.two]" in report["hint"]
    assert not list((tmp_path / "parts").iterdir())


def test_packages_that_share_what_does_no_harm_are_not(tmp_path: Path) -> None:
    shared = {"space/__init__.py": "", "LICENSE": "a"}
    one = {**shared, "space/one.py": "", "tests/__init__.py": "a = 1"}
    two = {**shared, "space/two.py": "", "tests/__init__.py": "a = 2", "LICENSE": "b"}
    place = make(tmp_path, one, two)
    assert {path.name for path in place.glob("lib/*/site-packages/space/*.py")} == {"__init__.py", "one.py", "two.py"}
