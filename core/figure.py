"""Saves matplotlib figures: `inv gpu-plot` and `inv bench-kernels --plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import ToolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""The palette of Okabe and Ito, which people with colour blindness can tell apart (jfly.uni-koeln.de/color)."""


def check(place: Path, flag: str) -> None:
    """Raise UsageError unless `place`, the value of `flag`, is a file type that can be drawn."""
    if place.suffix not in (".svg", ".png"):
        raise UsageError("usage", f"{place} is neither .svg nor .png", hint=f"use --{flag} FILE.svg")


def save(draw: Callable[[], Figure], place: Path, flag: str) -> None:
    """Draw a figure into a file. Raises UsageError, which names the flag, and ToolError without matplotlib."""
    check(place, flag)
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ToolError(
            "program-missing", "matplotlib is not installed", cause=str(error), hint="uv sync --group plot"
        ) from error
    # Text stays text in an SVG, and a dollar sign in a name starts no formula.
    with rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        try:
            draw().savefig(place, dpi=150)
        except OSError as error:
            hint = f"choose another --{flag}"
            raise UsageError("usage", f"{place} cannot be written", cause=str(error), hint=hint) from error
