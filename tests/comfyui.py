"""The pinned ComfyUI, what it reports when it runs, and an older tree made of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from functools import cache
from typing import TYPE_CHECKING

from core import source, workspace
from lock import interface
from lock.application import application
from lock.interface import Interface
from tests.conftest import FIXTURES, Hearth

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

RECORD = FIXTURES / "workflows/object-info-0.30.0.json.gz"
"""The answer of ComfyUI 0.30.0, without models, at `/object_info`: the parts that Hearth reads."""


@cache
def tree() -> Path:
    return source.fetch(application())


@cache
def pinned() -> Interface:
    return interface.read_cached(tree())


@cache
def real() -> Interface:
    return interface.reported(json.loads(gzip.decompress(RECORD.read_bytes())))


def read_by(hearth: Hearth) -> None:
    """Give a client the pinned ComfyUI and its node types, so that it need not fetch and read them."""
    pinned()
    (hearth.cache / "sources").mkdir()
    (hearth.cache / "sources" / tree().name).symlink_to(tree())
    (hearth.cache / "interfaces").symlink_to(workspace.current().cache / "interfaces")


def older(place: Path) -> Path:
    """A tree like the pinned one, with the differences of OLDER."""
    return derived(place, OLDER)


LARGE = ("ldm", "text_encoders", "comfy_api_nodes")
"""Folders that take most of the time to read; few tests need them."""


def derived(place: Path, edits: Mapping[str, Callable[[str], str] | None], without: Collection[str] = ()) -> Path:
    """A tree like the pinned one with edited files; without those whose edit is None, and without some folders."""
    left_out = shutil.ignore_patterns(*without)
    shutil.copytree(tree(), place, copy_function=os.symlink, dirs_exist_ok=True, ignore=left_out)
    for name, edit in edits.items():
        (place / name).unlink()
        if edit:
            (place / name).write_text(edit((tree() / name).read_text()))
    return place


def swap(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        return text

    return edit


OLDER = {
    "nodes.py": swap(
        ('    "LatentFlip": LatentFlip,\n', ""),  # a type of the first kind
        ('    "SaveImage": SaveImage,\n', '    "SaveImage": SaveImage,\n    "ImageSaver": SaveImage,\n'),
        ('"denoise": ("FLOAT"', '"strength": ("FLOAT"'),
    ),
    "comfy_extras/nodes_latent.py": swap(
        ("            LatentCutToBatch,\n", ""),  # one with a schema
        ('io.Float.Input("multiplier"', 'io.Int.Input("multiplier"'),
    ),
    "comfy/samplers.py": swap(('KSAMPLER_NAMES = ["euler", ', 'KSAMPLER_NAMES = ["older", "euler", ')),
    "comfy_extras/nodes_mask.py": swap(("IO.Mask.Output()", "IO.Image.Output(), IO.Mask.Output()")),
}
