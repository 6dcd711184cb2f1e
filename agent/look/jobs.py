"""ComfyUI's jobs: what runs, what waits, and what it remembers of those that are over."""

from __future__ import annotations

from agent.api import Endpoint, TooLong, ask, checked, endpoint, job, queue, said, seconds_of, unanswered
from agent.files import Json
from agent.layout import Site

PATIENCE = 5.0
"""Seconds for each answer."""


def jobs(site: Site, count: int) -> list[Json]:
    """The last jobs that are over, those that run, and those that wait, in this order; raises Fault without an answer.

    Times are in seconds since 1970. ComfyUI forgets what is over when it ends. Of many that wait the first are told,
    and how many more there are, as `+N`; of a history that is too long so many as can be read.
    """
    place = endpoint(site)
    try:
        over = _history(place, count)
        running, waiting = queue(place, PATIENCE)
    except (OSError, ValueError) as error:
        raise unanswered(place, error) from error
    more = waiting.total - len(waiting)
    return [
        *over,
        *({**each, "status": "running"} for each in running),
        *({**each, "status": "pending"} for each in waiting),
        *([{"id": f"+{more}", "nodes": 0, "queued": None, "status": "pending"}] if more else []),
    ]


def _history(place: Endpoint, count: int) -> list[Json]:
    path = f"/history?max_items={count}"
    try:
        history = ask(place, path, seconds=PATIENCE)
    except TooLong:
        if count == 1:
            raise
        return _history(place, max(1, count // 8))
    return checked(path, history, lambda answer: [_over(name, entry) for name, entry in [*answer.items()][-count:]])


def _over(name: str, entry: Json) -> Json:
    """One of the history: what was asked for, when it ran, and how it ended."""
    status = entry.get("status") or {}
    asked = job(entry["prompt"]) if entry.get("prompt") else {"id": said(name), "nodes": 0, "queued": None}
    told = dict(status.get("messages", ()))
    begun = seconds_of(told.get("execution_start", {}).get("timestamp"))
    names = ("execution_success", "execution_error", "execution_interrupted")
    ending = next((name for name in names if name in told), "")
    ended = seconds_of(told.get(ending, {}).get("timestamp"))
    found = {
        **asked,
        "status": ending.removeprefix("execution_") or said(status.get("status_str", "unknown")),
        "started": begun,
        "seconds": ended - begun if begun and ended else None,
        "cached": len(told.get("execution_cached", {}).get("nodes", ())),
    }
    if ending in names[1:]:
        error = told[ending]
        found["node"], found["node_type"] = said(error.get("node_id", "")), said(error.get("node_type", ""))
        words = (error[name] for name in ("exception_type", "exception_message") if error.get(name))
        found["error"] = ": ".join(said(word, 20_000).strip() for word in words)
    return found
