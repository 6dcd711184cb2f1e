"""The wire schema: one side decodes what the other encodes, and rejects everything else."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest

from agent.change import runs
from agent.files import AgentError, record, recorded
from agent.schema import change
from agent.schema.decode import decode
from agent.schema.gateway import Login
from agent.schema.installed import InstalledGateway
from agent.schema.live import Freed, GpuMemory, Held
from agent.schema.records import Proven
from core.typed import convert
from tests.plans import FRESH, made, spark

FREED = Freed(True, None, Held((GpuMemory(0, 1, 2),), None, 3), Held((), 4, 5))


def plain(value: object) -> Any:
    return json.loads(json.dumps(value, default=vars))


def test_agent_and_client_read_the_same() -> None:
    assert decode(Freed, plain(FREED)) == FREED == convert(plain(FREED), Freed)
    assert convert(plain(FRESH), type(FRESH)) == FRESH


def test_a_record_is_a_frozen_dataclass() -> None:
    held: Any = Held((), None, 3)
    assert repr(held) == "Held(gpus=(), resident=None, available=3)"
    assert held == Held(available=3, gpus=(), resident=None)
    assert hash(held) == hash(replace(held))
    assert held != replace(held, available=4)
    assert Proven() == Proven(**asdict(Proven()))  # defaults
    for values, named in (((), {}), ((1, 2, 3, 4), {}), ((1, 2, 3), {"more": 4}), ((1, 2, 3), {"gpus": ()})):
        with pytest.raises(TypeError, match="Held "):
            Held(*values, **named)
    with pytest.raises(FrozenInstanceError):
        held.available = 4
    with pytest.raises(FrozenInstanceError):
        del held.available


def test_steps_round_trip_through_json() -> None:
    planned = made(target=spark(metrics_port=9188)).steps
    assert [change.unpacked(plain(change.packed(step))) for step in planned] == list(planned)


def test_the_agent_carries_out_every_kind_of_step() -> None:
    assert runs.STEPS.keys() == change.KINDS.keys()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"job": 7}, "Freed.job is int, expected str"),
        ({"more": 1}, "Freed.more is unknown"),
        ({"before": {"gpus": [{"index": 0, "used": None}], "resident": 1, "available": 1}}, "comfyui is missing"),
        ({"after": []}, "Freed.after is list, expected an object"),
    ],
)
def test_invalid_value_error_names_the_field(edit: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode(Freed, {**plain(FREED), **edit})


def test_a_step_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no step of kind 'format-disk'"):
        change.unpacked({"kind": "format-disk"})


INSTALLED = InstalledGateway("unit", "text", {"8188": ("anna",)})
STEP = change.Gateway("t", "w", "u", INSTALLED, "127.0.0.1", 443, ("spark.local",))


def test_records_of_older_and_newer_agents_are_read(tmp_path: Path) -> None:
    """`recorded` ignores what this agent does not know, and has defaults for what an older one did not write."""
    path = tmp_path / "record.json"
    record(path, STEP)
    assert recorded(path, change.Gateway) == STEP
    older = {name: value for name, value in plain(STEP).items() if name != "certificate"}
    newer = {**older, "more": 1, "gateway": {**plain(INSTALLED), "more": 1}}
    for each in (older, newer):
        path.write_text(json.dumps(each))
        assert recorded(path, change.Gateway) == STEP


@pytest.mark.parametrize("text", ['{"anna": {"password": 7}}', '{"anna": 7}', "[]", "{"])
def test_a_damaged_record_is_not_read_as_an_empty_one(tmp_path: Path, text: str) -> None:
    """Whoever changes it would lose its content; `lenient` is for records that the next deploy writes again."""
    path = tmp_path / "people.json"
    assert recorded(path, dict[str, Login]) == {}
    path.write_text(text)
    with pytest.raises(AgentError, match="is damaged"):
        recorded(path, dict[str, Login])
    assert recorded(path, dict[str, Login], lenient=True) == {}
