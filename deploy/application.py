"""The application that hosts run: its pinned source, and the flags that its own parser knows."""

from __future__ import annotations

import msgspec

from core import source
from core.config import load
from core.files import CHECKOUT


class Application(source.Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """ComfyUI (`recipes/comfyui/app.toml`).

    `extra` are packages beside its own requirements. `size` and `files` are what an installed release takes,
    in bytes and inodes, by stack; measured.
    """

    extra: tuple[str, ...]
    size: dict[str, int]
    files: dict[str, int]


def application() -> Application:
    """The pinned ComfyUI; raises ConfigError."""
    folder = CHECKOUT / "recipes/comfyui"
    loaded = msgspec.structs.replace(load(folder / "app.toml", Application), folder=str(folder))
    source.check(loaded)
    return loaded
