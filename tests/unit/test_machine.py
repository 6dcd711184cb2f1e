"""The agent's facts about the machine."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection
from packaging.version import Version

from agent.look.machine import libstdcxx


@pytest.mark.needs("g++")
def test_the_newest_versions_of_libstdcxx_are_the_defined_ones() -> None:
    words = ["g++", "-print-file-name=libstdc++.so.6"]
    path = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    with Path(path).open("rb") as file:
        (section,) = [each for each in ELFFile(file).iter_sections() if isinstance(each, GNUVerDefSection)]
        names = [next(auxiliary).name for _, auxiliary in section.iter_versions()]
    found = {family: [name.removeprefix(f"{family}_") for name in names] for family in ("GLIBCXX", "CXXABI")}
    numbers = {family: [each for each in listed if each[0].isdigit()] for family, listed in found.items()}
    assert libstdcxx() == tuple(max(numbers[family], key=Version) for family in ("GLIBCXX", "CXXABI"))


def test_a_machine_without_libstdcxx_reports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert libstdcxx() == ("", "")
