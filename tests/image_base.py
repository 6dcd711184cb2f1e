"""The base of images for tests: the locked one, or one that is resolved now."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core import files
from core.errors import LockError
from core.stack import Platform
from lock import image_base


@contextmanager
def available_base() -> Iterator[None]:
    """Fetch the base. The mirrors drop a locked package when a security update replaces it: then resolve another."""
    if "bookworm" not in Path("/etc/os-release").read_text() and "HEARTH_DEBIAN_SOURCES" not in os.environ:
        why = "the base of images needs Debian 12, or HEARTH_DEBIAN_SOURCES"
        if os.environ.get("CI"):
            pytest.fail(f"CI cannot leave this test out: {why}", pytrace=False)
        pytest.skip(why)
    try:
        _fetch()
    except LockError as error:
        if error.kind != "lock-stale":
            raise
    else:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hearth-base-") as place, pytest.MonkeyPatch.context() as patch:
        shutil.copy(files.CHECKOUT / "recipes/image/base.toml", place)
        patch.setenv("HEARTH_IMAGE_BASE", place)
        image_base.renew()
        _fetch()
        yield


def _fetch() -> None:
    for platform, group in itertools.product(Platform, image_base.GROUPS):
        image_base.tree(platform, group)
