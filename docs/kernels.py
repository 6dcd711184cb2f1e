"""Writes the wheels of the wheelhouse into the table of docs/reference/kernels.md: `uv run python -m docs.kernels`.

Rows of other wheels stay.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from core import console, files, workspace

if TYPE_CHECKING:
    from core.manifest import Manifest

PAGE = files.CHECKOUT / "docs/reference/kernels.md"
HEADINGS = ("Kernel", "GPU", "Stack", "Python, platform", "SASS", "Cubins", "Size", "Imported")
KEY = 4
"""The cells that name a wheel, first in its row."""


def row(wheel: Manifest) -> list[str]:
    """The cells of one wheel."""
    version = wheel.version.partition("+")[0]
    oldest = re.search(r"-cp3(\d+)-abi3-", wheel.file)
    python = wheel.python or (f"3.{oldest[1]} or newer" if oldest else "any")
    return [
        f"{wheel.kernel} {version}{f', {wheel.profile}' if wheel.profile else ''}",
        wheel.arch.replace(";", " and "),
        f"{wheel.stack}, torch {wheel.inputs['stack'][1]}",
        f"{python}, {wheel.platform.removeprefix('linux_')}",
        ", ".join(sorted({target for module in wheel.modules for target in module.sass})),
        str(sum(module.cubins for module in wheel.modules)),
        console.size(wheel.size),
        wheel.imported.detail.removeprefix("imported with "),
    ]


def merged(page: str, wheels: list[Manifest]) -> str:
    """The page with a row for each wheel in its first table."""
    head, rows, tail = re.split(r"((?:^\| .*\n)+)", page, maxsplit=1, flags=re.MULTILINE)
    old = [re.split(r" *\| *", line.strip("| ")) for line in rows.splitlines()[2:]]
    table = {tuple(cells[:KEY]): cells for cells in [*old, *map(row, wheels)]}
    rule = ["---:" if name in ("Cubins", "Size") else "---" for name in HEADINGS]
    ordered = sorted(table, key=lambda key: (key[0], [*map(float, re.findall(r"\d+\.\d", key[1]))], key))
    lines = [f"| {' | '.join(cells)} |\n" for cells in (HEADINGS, rule, *(table[key] for key in ordered))]
    return f"{head}{''.join(lines)}{tail}"


if __name__ == "__main__":
    PAGE.write_text(merged(PAGE.read_text(), workspace.current().wheelhouse.wheels()))
