"""ComfyUI's jobs: what runs, what waits, and what it remembers of those that are over."""

from __future__ import annotations

from typing import Any

from agent.comfyui import ask, unanswered
from agent.files import Json
from agent.site import Site

PATIENCE = 5.0
"""Seconds for each answer."""


def jobs(site: Site, count: int) -> list[Json]:
    """The last jobs that are over, those that run, and those that wait, in this order; raises Fault without an answer.

    Times are in seconds since 1970. ComfyUI forgets what is over when it ends.
    """
    try:
        over = ask(site, f"/history?max_items={count}", timeout=PATIENCE)
        queue = ask(site, "/queue", timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise unanswered(site, error) from error
    found = [_over(each) for each in over.values()]
    for state in ("running", "pending"):
        waiting = sorted(queue[f"queue_{state}"], key=lambda job: job[0])
        found += [{**_asked(job), "status": state} for job in waiting]
    return found


def _asked(job: list[Any]) -> Json:
    """What was asked for: a job's number, id, workflow, and what came with it (ComfyUI's execution.py, PromptQueue)."""
    created = job[3].get("create_time") if len(job) > 3 and isinstance(job[3], dict) else None
    return {"id": job[1], "nodes": len(job[2]), "queued": created / 1000 if isinstance(created, (int, float)) else None}


def _over(entry: Json) -> Json:
    """One of the history: what was asked for, when it ran, and how it ended."""
    status = entry.get("status") or {}
    said = dict(status.get("messages", ()))
    begun = said.get("execution_start", {}).get("timestamp")
    names = ("execution_success", "execution_error", "execution_interrupted")
    ending = next((name for name in names if name in said), "")
    ended = said.get(ending, {}).get("timestamp")
    found = {
        **_asked(entry["prompt"]),
        "status": ending.removeprefix("execution_") or str(status.get("status_str", "unknown")),
        "started": begun / 1000 if begun else None,
        "seconds": (ended - begun) / 1000 if begun and ended else None,
        "cached": len(said.get("execution_cached", {}).get("nodes", ())),
    }
    if ending in names[1:]:
        error = said[ending]
        found["node"], found["node_type"] = str(error.get("node_id", "")), str(error.get("node_type", ""))
        found["error"] = ": ".join(
            str(error[name]).strip() for name in ("exception_type", "exception_message") if error.get(name)
        )
    return found
