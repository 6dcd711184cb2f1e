"""What a shared library requires and exports, by its ELF sections."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.hash import GNUHashSection
from packaging.version import Version

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Elf:
    """The requirements and exports of a shared library, parsed once."""

    path: Path

    @cached_property
    def machine(self) -> str:
        """The target CPU, as uname names it."""
        with self._open() as elf:
            name = str(elf.get_machine_arch())
        return {"x64": "x86_64", "AArch64": "aarch64"}.get(name, name)

    @cached_property
    def dynamic(self) -> dict[str, list[str]]:
        """DT_NEEDED, DT_RPATH and DT_RUNPATH entries, by tag."""
        found: dict[str, list[str]] = {"DT_NEEDED": [], "DT_RPATH": [], "DT_RUNPATH": []}
        attribute = {"DT_NEEDED": "needed", "DT_RPATH": "rpath", "DT_RUNPATH": "runpath"}
        with self._open() as elf:
            for section in elf.iter_sections():
                if isinstance(section, DynamicSection):
                    for tag in section.iter_tags():
                        if tag.entry.d_tag in found:
                            found[tag.entry.d_tag].append(getattr(tag, attribute[tag.entry.d_tag]))
        return found

    @cached_property
    def undefined(self) -> list[str]:
        """The undefined symbols. Weak ones are excluded, since they may stay undefined."""
        with self._open() as elf:
            table = elf.get_section_by_name(".dynsym")
            return [
                symbol.name
                for symbol in table.iter_symbols()
                if symbol.entry.st_shndx == "SHN_UNDEF" and symbol.name and symbol.entry.st_info.bind == "STB_GLOBAL"
            ]

    @cached_property
    def unversioned(self) -> set[str]:
        """The undefined symbols for which the linker recorded no version of a library."""
        with self._open() as elf:
            table, versions = (elf.get_section_by_name(name) for name in (".dynsym", ".gnu.version"))
            own = ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
            named = {
                symbol.name
                for number, symbol in enumerate(table.iter_symbols())
                if versions and versions.get_symbol(number).entry.ndx not in own
            }
        return set(self.undefined) - named

    @cached_property
    def required(self) -> set[str]:
        """The required symbol versions: `GLIBC_2.17`."""
        with self._open() as elf:
            sections = [section for section in elf.iter_sections() if isinstance(section, GNUVerNeedSection)]
            return {each.name for section in sections for _, needed in section.iter_versions() for each in needed}

    @property
    def versions(self) -> dict[str, str]:
        """The highest required version of each versioned symbol family: GLIBC, GLIBCXX ..."""
        highest: dict[str, str] = {}
        for family, _, version in (name.partition("_") for name in self.required):
            if re.fullmatch(r"[\d.]+", version):
                highest[family] = max(highest.get(family, "0"), version, key=Version)
        return highest

    def defines(self, names: Sequence[str]) -> set[str]:
        """The subset of `names` that it defines. Uses the hash table, because torch has a hundred thousand symbols."""
        with self._open() as elf:
            for section in elf.iter_sections():
                if isinstance(section, GNUHashSection):
                    return {name for name in names if section.get_symbol(name) is not None}
            table = elf.get_section_by_name(".dynsym")
            if table is None:
                return set()
            defined = {each.name for each in table.iter_symbols() if each.entry.st_shndx != "SHN_UNDEF"}
            return defined & set(names)

    @contextmanager
    def _open(self) -> Iterator[ELFFile]:
        with self.path.open("rb") as file:
            yield ELFFile(file)
