"""Reads what ComfyUI defines and nodes use in a second process, while this one reads node types: each takes a core."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from core import shell, workspace
from core.errors import HearthError
from lock import api
from lock.readings import kept, place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@contextmanager
def reading(comfyuis: Iterable[Path], nodes: Iterable[Path]) -> Iterator[None]:
    """Read `api.Api` of ComfyUIs and `api.Uses` of custom nodes while the context lasts, if a ComfyUI was not read yet.

    Only a help: what the second process cannot read is read again later.
    """
    places = {tree: place_of(api.Api, tree) for tree in comfyuis}
    missing = [str(tree) for tree, place in places.items() if place and not place.exists()]
    if not missing:
        yield
        return
    words = [sys.executable, "-m", __name__, json.dumps([missing, [*map(str, nodes)]])]
    own = {"HEARTH_CACHE": str(workspace.current().cache)}
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(shell.run, words, cwd=Path(__file__).parents[1], env=own, check=False)
        yield
        with suppress(HearthError, OSError):
            done.result()


def main(comfyuis: list[str], nodes: list[str]) -> None:
    """Read the sources; skip those that cannot be read."""
    for tree in map(Path, comfyuis):
        with suppress(HearthError, OSError, ValueError, RecursionError):
            kept(api.Api, api.read, tree)
    for tree in map(Path, nodes):
        with suppress(HearthError, OSError, ValueError, RecursionError):
            kept(api.Uses, api.uses, tree)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
