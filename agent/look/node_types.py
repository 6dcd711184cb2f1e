"""The node types of the running ComfyUI, and the workflows that its users saved."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from agent.api import Endpoint, ask, checked, endpoint, unanswered
from agent.files import Json
from agent.layout import Layout
from agent.schema.live import NodeTypes
from agent.serve.health import OBJECT_INFO, TYPES

SAVED, EACH, TOTAL = 1_000, 4_000_000, 64_000_000
"""Maximum number of saved workflows to read, and of bytes of one and of all. ComfyUI's templates have up to 0.5 MB."""


def node_types(layout: Layout, workflows: bool) -> NodeTypes:
    """Return the node types and, if asked for, the saved workflows. Raises AgentError without a response."""
    place = endpoint(layout)
    try:
        listed = ask(place, "/object_info", seconds=60, limit=OBJECT_INFO)
        return NodeTypes(checked("/object_info", listed, _types), _workflows(place) if workflows else {})
    except (OSError, ValueError) as error:
        raise unanswered(place, error) from error


def _types(listed: Json) -> Json:
    kept = ("input", "output", "python_module")
    return {name: {key: each[key] for key in kept if key in each} for name, each in [*listed.items()][:TYPES]}


def _workflows(place: Endpoint) -> dict[str, Any]:
    try:
        names = ask(place, "/userdata?dir=workflows&recurse=true")
    except ValueError:  # nothing was ever saved: 404
        return {}
    listed = checked("/userdata", names, lambda answer: [each for each in answer if each.endswith(".json")])
    found: dict[str, Any] = {}
    left = TOTAL
    for name in listed[:SAVED]:
        try:
            found[name] = ask(place, f"/userdata/{quote(f'workflows/{name}', safe='')}", limit=min(EACH, left))
        except ValueError:
            found[name] = None
        left = max(1, left - len(json.dumps(found[name])))
    return found
