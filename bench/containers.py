"""Container images: seconds and bytes to write one, and what an update writes. Writes docs/benchmarks-containers.md.

uv run python -m bench.containers

On Debian 12, with 9 GB of disk.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bench.kernels import machine as this_machine
from core import files, source, workspace
from deploy import image as images
from lock import application

if TYPE_CHECKING:
    from deploy.image import Image

PLATFORM = "linux_x86_64"


def timed(place: Path) -> tuple[float, Image]:
    """Write the image of the profile `cpu`."""
    started = time.monotonic()
    found = images.write(images.find_target("", "cpu"), PLATFORM, place)
    return time.monotonic() - started, found


def edited(place: Path) -> None:
    """Make the next image one of another revision of ComfyUI, with the same requirements."""
    app = application.application()
    shutil.copytree(app.path, place, ignore=shutil.ignore_patterns("versions"))
    shutil.copytree(source.fetch(app), place / "src")
    (place / "src/nodes.py").write_text((place / "src/nodes.py").read_text() + "\n# edited\n")
    text = (place / "app.toml").read_text().partition("[[source]]")[0].replace(app.tree, "")
    (place / "app.toml").write_text(text + '[[source]]\nfolder = "src"\n')
    os.environ["HEARTH_APP"] = str(place)


def main() -> None:
    """Measure, and write the page."""
    with tempfile.TemporaryDirectory(prefix="hearth-bench-", dir=workspace.current().cache) as name:
        place = Path(name)
        first, one = timed(place / "image")
        again, same = timed(place / "image")
        edited(place / "app")
        update, other = timed(place / "image")
    fresh = sum(size for layer, size in other.layers.items() if size and layer in ("app", "release"))
    rows = [("the first image", first, sum(one.layers.values())), ("unchanged", again, 0), ("update", update, fresh)]
    assert same.digest == one.digest
    text = PAGE.format(
        date=datetime.now(UTC).date(),
        machine=this_machine(),
        load=os.getloadavg()[0],
        rows="\n".join(f"| {what} | {seconds:.1f} | {size / 1e6:,.1f} |" for what, seconds, size in rows),
        layers="\n".join(f"| {layer} | {size / 1e6:,.1f} |" for layer, size in one.layers.items()),
    )
    (files.CHECKOUT / "docs/benchmarks-containers.md").write_text(text)
    sys.stdout.write(text)


PAGE = """\
# Benchmarks of container images

Measured by `uv run python -m bench.containers` on {date}, on {machine}, with a load of {load:.0f}: the image of
the profile `cpu` for linux_x86_64, with uv's packages in its cache. The target for an unchanged image was 2 s.
"update" is another revision of ComfyUI with the same requirements; its megabytes are also what a push sends.

| | Seconds | MB written |
| --- | ---: | ---: |
{rows}

| Layer | MB |
| --- | ---: |
{layers}
"""

if __name__ == "__main__":
    main()
