"""Draws docs/run.svg, the picture in the README, from a real first deploy: `uv run python -m docs.picture`.

It deploys into a temporary home folder (6 GB, a few minutes) and deletes it afterwards.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from core import files, workspace

PICTURE = files.CHECKOUT / "docs/run.svg"
COMMANDS = ("inv deploy", "inv status")
WIDTH = 110

# Rich's own template loads fonts from a CDN, which readers would tell their address.
TEMPLATE = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def said(command: str, home: Path) -> str:
    """What a command prints, from a home folder in which nothing is deployed."""
    env = os.environ | {"HEARTH_CACHE": str(workspace.current().cache), "HEARTH_HOSTS": str(home / "hosts.toml")}
    asked = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True)  # noqa: S607  uv run's
    env |= {"HOME": str(home), "UV_CACHE_DIR": asked.stdout.strip()}
    words = [sys.executable, "-m", "invoke", *command.split()[1:]]
    done = subprocess.run(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=files.CHECKOUT
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}")
    return done.stdout.replace(str(home), "~")


def draw(runs: dict[str, str]) -> str:
    """An SVG of commands with their output, as a terminal shows them."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for command, output in runs.items():
        console.print(Text(f"$ {command}", style="bold green"))
        console.print(Text(output))
    return console.export_svg(title="Hearth", code_format=TEMPLATE, unique_id="run")


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(dir=workspace.current().cache))
    try:
        PICTURE.write_text(draw({each: said(each, place) for each in COMMANDS}))
        said("inv stop", place)
        said("inv remove --yes", place)
    finally:
        for folder, _, _ in os.walk(
            place
        ):  # parts are read-only; their files are linked to uv's cache, so only folders
            Path(folder).chmod(0o755)
        shutil.rmtree(place)
