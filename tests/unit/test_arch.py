from __future__ import annotations

import pytest

from core.arch import Arch, known_archs, parse_list
from tests.errors import raises


@pytest.mark.parametrize(
    ("text", "arch"),
    [
        ("12.1", Arch(12, 1)),
        ("9.0a", Arch(9, 0, "a")),
        ("9.0A", Arch(9, 0, "a")),
        ("8.9+PTX", Arch(8, 9, "", ptx=True)),
        ("10.0f", Arch(10, 0, "f")),
    ],
)
def test_arch_parses_torchs_notation(text: str, arch: Arch) -> None:
    assert Arch.parse(text) == arch


@pytest.mark.parametrize("text", ["12.10", "abc", "12", "sm_89", "8,9", "-8.9", "8.9b", ""])
def test_invalid_capability_is_refused(text: str) -> None:
    with raises("arch"):
        Arch.parse(text)


@pytest.mark.parametrize("text", ["8.9;12.0", "8.9,12.0", "12.0 8.9", " 8.9 ; 12.0;8.9 "])
def test_a_list_takes_every_separator_of_torch_and_drops_repeats(text: str) -> None:
    assert parse_list(text, known_archs()) == [Arch(8, 9), Arch(12, 0)]


@pytest.mark.parametrize("text", ["7.5", "12.5", ";", "8.9a"])
def test_a_list_refuses_what_archs_toml_does_not_know(text: str) -> None:
    with raises("arch"):
        parse_list(text, known_archs())


def test_arch_round_trips_through_text() -> None:
    for text in ("12.1", "9.0a", "8.9+PTX"):
        assert str(Arch.parse(text)) == text
