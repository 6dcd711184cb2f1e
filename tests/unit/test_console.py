"""Numbers as people read them."""

from __future__ import annotations

import pytest

from core.console import age, clock, size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (4000, "1 h 06 min")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (6273566, "6.3 MB"), (5.7e9, "5.7 GB"), (5e12, "5000.0 GB")]
)
def test_size(number: float, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0 s"), (59.9, "59 s"), (3599, "59 min"), (90000, "1 d")])
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text
