"""Folders that are made in one rename, also by threads of one process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core import files


def test_threads_make_the_same_folder_in_turn(tmp_path: Path) -> None:
    def make(number: int) -> None:
        with files.whole(tmp_path / "made") as part:
            (part / "by").write_text(str(number))
            time.sleep(0.01)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made/by").read_text() in "01234567"


def test_a_body_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), files.whole(tmp_path / "made") as part:
        (part / "half").write_text("")
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".made.999999999").mkdir()
    with files.whole(tmp_path / "made"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
