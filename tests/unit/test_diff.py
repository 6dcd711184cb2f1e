"""Two manifests, and the reported differences."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from agent.schema.manifest import ReleaseManifest
from core.typed import convert
from deploy.facts import named
from lock import diff
from lock.diff import Change, Difference, rows
from tests.errors import raises
from tests.plans import FRESH
from tests.unit.test_sbom import manifest


@pytest.fixture
def old() -> dict[str, Any]:
    return copy.deepcopy(_OLD)


_OLD = msgspec.to_builtins(manifest())


def typed(found: dict[str, Any]) -> ReleaseManifest:
    return convert(found, ReleaseManifest)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Difference:
    return diff.compare(typed(old), typed(new))


def renamed(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The same release with another id, which also appears in its command, unit and variables."""
    text = msgspec.json.encode(found).replace(found["id"].encode(), name.encode())
    renamed = msgspec.json.decode(text)
    assert isinstance(renamed, dict)
    return renamed


def test_release_id_alone_is_no_difference(old: dict[str, Any]) -> None:
    found = compare(old, renamed(old, "b" * 16))
    assert (found.changes, found.files, found.unknown) == ((), (), ())
    assert found.shared == tuple(old["parts"])
    assert next(rows(found)) == f"{old['id']} and {'b' * 16} do not differ"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("version",), "0.31.0", Change("release", "ComfyUI", "0.30.0", "0.31.0")),
        (("stack",), "cu124", Change("release", "stack", "cu130", "cu124")),
        (("torch",), "2.6.0", Change("release", "torch", "2.14.1", "2.6.0")),
        (("python",), "3.13", Change("release", "Python", "3.12", "3.13")),
        (("packages", "torch"), "2.6.0", Change("package", "torch", "2.14.1", "2.6.0")),
        (("packages", "left-pad"), "1", Change("package", "left-pad", "", "1")),
        (("kernels", "flash-attn"), "2", Change("kernel", "flash-attn", "1+cu130.torch2.14.1.sm121a", "2")),
        (("wheels", "flash-attn", "sha256"), "e" * 64,
         Change("wheel", "flash-attn", f"flash-attn.whl sha256:{'f' * 64}", f"flash-attn.whl sha256:{'e' * 64}")),
        (("environment", "DO_NOT_TRACK"), "0", Change("variable", "DO_NOT_TRACK", "1", "0")),
        (("gate", "seconds"), 5, Change("gate", "seconds", str(_OLD["gate"]["seconds"]), "5")),
        (("parts", "env"), "env-1", Change("part", "env", _OLD["parts"]["env"], "env-1")),
    ],
)  # fmt: skip
def test_changes_are_listed(old: dict[str, Any], path: tuple[str, ...], value: object, expected: Change) -> None:
    new = renamed(old, "b" * 16)
    place = new
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert compare(old, new).changes == (expected,)
    assert compare(new, old).changes == (Change(expected.kind, expected.name, expected.new, expected.old),)


def test_removals_are_listed(old: dict[str, Any]) -> None:
    new = renamed(old, "b" * 16)
    del new["packages"]["aiohttp"], new["nodes"]["rgthree-comfy"], new["parts"]["custom_nodes/rgthree-comfy"]
    found = compare(old, new)
    assert [(each.kind, each.name, each.new) for each in found.changes] == [
        ("package", "aiohttp", ""),
        ("node", "rgthree-comfy", ""),
        ("part", "custom_nodes/rgthree-comfy", ""),
    ]
    assert "custom_nodes/rgthree-comfy" not in found.shared


def test_a_node_moves_from_commit_to_commit(old: dict[str, Any]) -> None:
    new = renamed(old, "b" * 16)
    node = new["nodes"]["rgthree-comfy"]
    before, node["commit"] = node["commit"], "c" * 40
    (change,) = compare(old, new).changes
    assert (change.old, change.new) == (f"{node['url']} {before}", f"{node['url']} {'c' * 40}")


def test_flags_and_their_values_are_compared(old: dict[str, Any]) -> None:
    new = renamed(old, "b" * 16)
    new["argv"] = [*new["argv"], "--preview-method", "auto", "--cpu"]
    assert compare(old, new).changes == (
        Change("flag", "--cpu", "", "on"),
        Change("flag", "--preview-method", "", "auto"),
    )


def test_the_units_text_is_compared_line_by_line(old: dict[str, Any]) -> None:
    new = renamed(old, "b" * 16)
    unit = new["files"]["comfyui.service"]
    assert "KillSignal=SIGINT\n" in unit
    new["files"]["comfyui.service"] = unit.replace("KillSignal=SIGINT\n", "KillSignal=SIGTERM\n")
    found = compare(old, new)
    assert found.files[:2] == (f"--- {old['id']}/comfyui.service", f"+++ {'b' * 16}/comfyui.service")
    assert [line for line in found.files[2:] if line[0] in "+-"] == ["-KillSignal=SIGINT", "+KillSignal=SIGTERM"]


def test_missing_fields_of_old_releases_are_reported(old: dict[str, Any]) -> None:
    older = renamed(old, "b" * 16)
    for name in ("packages", "wheels", "sources", "tree"):
        del older[name]
    found = compare(older, old)
    assert found.unknown == ("package", "wheel")
    assert found.changes == ()


def test_releases_are_named_by_words_and_ids(old: dict[str, Any]) -> None:
    a, b, c = (typed(renamed(old, letter * 16)) for letter in "abc")
    facts = replace(FRESH, releases=(a, b, c), current="b" * 16, proven=("b" * 16, "c" * 16, "a" * 16))
    assert [named(facts, word).id[0] for word in ("current", "previous", "a" * 16)] == ["b", "c", "a"]
    with raises("unknown-name", match="perhaps you meant 'current'"):
        named(facts, "curent")
    with raises("unknown-name", match=r"no release 'previous'(.|\n)*known: aaa"):
        named(replace(facts, proven=("b" * 16,)), "previous")
    with raises("unknown-name", match="inv deploy"):
        named(FRESH, "current")
