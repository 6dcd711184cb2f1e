"""The wire schema: one side decodes what the other encodes, and rejects everything else."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from agent.change import runs
from agent.schema import change
from agent.schema.decode import decode
from agent.schema.live import Freed, GpuMemory, Held
from tests.plans import FRESH, made, spark

FREED = Freed(True, None, Held((GpuMemory(0, 1, 2),), None, 3), Held((), 4, 5))


def plain(value: object) -> Any:
    return json.loads(json.dumps(value, default=vars))


def test_agent_and_client_read_the_same() -> None:
    assert decode(Freed, plain(FREED)) == FREED == msgspec.convert(plain(FREED), Freed)
    assert msgspec.convert(plain(FRESH), type(FRESH)) == FRESH


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
