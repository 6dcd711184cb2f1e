"""ComfyUI's jobs: running, pending, and finished ones in its history."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from agent.api import Endpoint, TooLongError, ask, checked, endpoint, job, printable, queue, seconds_of, unanswered
from agent.files import Json
from agent.layout import PROOF, Layout
from agent.schema.live import Job

PATIENCE = 5.0
"""Time limit for each response in seconds."""


def jobs(layout: Layout, count: int) -> list[Job]:
    """Return up to `count` finished jobs, then the running and the pending jobs. Raises AgentError without a response.

    Times are in seconds since 1970. ComfyUI's history is lost when it ends. A long queue is truncated; its last entry
    `+N` counts the rest. A history over the size limit is shortened.
    """
    place = endpoint(layout)
    try:
        over = _history(place, count)
        running, waiting = queue(place, PATIENCE)
    except (OSError, ValueError) as error:
        raise unanswered(place, error) from error
    more = waiting.total - len(waiting)
    return [
        *over,
        *(Job(**each, status="running") for each in running),
        *(Job(**each, status="pending") for each in waiting),
        *([Job(f"+{more}", "pending", 0)] if more else []),
    ]


def _history(place: Endpoint, count: int) -> list[Job]:
    path = f"/history?max_items={count}"
    try:
        history = ask(place, path, seconds=PATIENCE)
    except TooLongError:
        if count == 1:
            raise
        return _history(place, max(1, count // 8))
    return checked(path, history, lambda answer: [_over(name, entry) for name, entry in [*answer.items()][-count:]])


def _over(name: str, entry: Json) -> Job:
    """Decode a job of the history."""
    status = entry.get("status") or {}
    asked = job(entry["prompt"]) if entry.get("prompt") else {"id": printable(name), "nodes": 0, "queued": None}
    messages = dict(status.get("messages", ()))
    begun = seconds_of(messages.get("execution_start", {}).get("timestamp"))
    names = ("execution_success", "execution_error", "execution_interrupted")
    ending = next((name for name in names if name in messages), "")
    ended = seconds_of(messages.get(ending, {}).get("timestamp"))
    error = messages[ending] if ending in names[1:] else {}
    words = (error[name] for name in ("exception_type", "exception_message") if error.get(name))
    return Job(
        **asked,
        status=ending.removeprefix("execution_") or printable(status.get("status_str", "unknown")),
        started=begun,
        seconds=ended - begun if begun and ended else None,
        cached=len(messages.get("execution_cached", {}).get("nodes", ())),
        node=printable(error.get("node_id", "")),
        node_type=printable(error.get("node_type", "")),
        error=": ".join(printable(word, 20_000).strip() for word in words),
        workflow=_shape(entry["prompt"][2]) if entry.get("prompt") else "",
    )


def _shape(workflow: Any) -> str:
    """Return a hash of a workflow without seeds and texts: jobs with the same one take about as long.

    Empty for the health check's workflows and proofs, and for a workflow of another form.
    """
    parts: list[Any] = []
    try:
        for key, node in workflow.items():
            inputs = node["inputs"].items()
            if any(name == "filename_prefix" and str(value).startswith(f"{PROOF}/") for name, value in inputs):
                return ""
            varies = {name for name, value in inputs if isinstance(value, str) and " " in value}
            varies |= {"seed", "noise_seed", "filename_prefix"}
            parts.append([key, node["class_type"], {name: value for name, value in inputs if name not in varies}])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return ""
