"""Metrics of ComfyUI: availability, queue, and finished jobs."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from agent.api import Endpoint, ask, seconds_of
from agent.files import Json, record, recorded
from agent.layout import PROOF
from agent.schema.records import JobCounts

PATIENCE = 1.5
"""Time limit for a response of ComfyUI in seconds, less than a scrape's."""

LIMIT = 2_500_000
"""Maximum response size in bytes. Parsed, it takes up to 50 MB (`agent.api.DENSE`); the unit has 128 MB. A workflow has
some 100 kB and may contain pictures."""

COUNTED = 200_000
"""Maximum size in bytes of a response with one job and without workflows."""

KNOWN = 256
"""Number of recent job ids to remember. More jobs end between two scrapes only if scraping has paused."""

BUCKETS = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Bounds in seconds: pictures take a few seconds, videos many minutes."""


class Client:
    """HTTP client for the running ComfyUI."""

    def __init__(self, place: Callable[[], Endpoint]) -> None:
        self._place = place

    def get(self, path: str, limit: int = LIMIT) -> Any:
        """Return a response's JSON. Raises ValueError, or OSError, also after `PATIENCE` seconds."""
        return ask(self._place(), path, seconds=PATIENCE, limit=min(limit, LIMIT))


def _up(value: bool) -> Metric:
    return GaugeMetricFamily("hearth_comfyui_up", "Whether ComfyUI answers within 1.5 s.", value=value)


def down() -> Iterable[Metric]:
    """Return the metrics of a ComfyUI that does not respond."""
    return [_up(False)]


def queue(client: Client) -> Iterable[Metric]:
    """Return availability and queue metrics. Avoids `/queue`, which sends the workflow of every pending job."""
    running, pending = (
        _number(client.get(f"/api/jobs?status={state}&limit=1", COUNTED)["pagination"]["total"])
        for state in ("in_progress", "pending")
    )
    return [
        _up(True),
        GaugeMetricFamily("hearth_jobs_running", "Running jobs.", value=running),
        GaugeMetricFamily("hearth_jobs_pending", "Jobs waiting in ComfyUI's queue.", value=pending),
    ]


def _number(total: object) -> int:
    if not (isinstance(total, int) and 0 <= total < 1_000_000_000):
        raise ValueError("ComfyUI's number of jobs is not a number")
    return total


class Jobs:
    """Counts jobs as they appear in ComfyUI's history.

    ComfyUI keeps the last 10,000 jobs, in memory only. So each job is counted when first seen, and the counts are
    stored in a file. Jobs are missed if ComfyUI ends before the next scrape, or if more than `KNOWN` end between two
    scrapes. The health gate's workflows are not counted.
    """

    def __init__(self, client: Client, file: Path) -> None:
        self._client = client
        self._file = file
        self._lock = Lock()
        kept = recorded(file, JobCounts, lenient=True)
        same = kept.bounds == BUCKETS
        kept = kept if same else JobCounts()
        # Job ids, oldest first. None: no file yet, so do not count earlier jobs.
        self._known: dict[str, None] | None = dict.fromkeys(kept.known) if same else None
        self._results = {"done": 0, "failed": 0, "interrupted": 0, **kept.results}
        self._counts = [*kept.counts] or [0] * (len(BUCKETS) + 1)
        self._seconds = kept.seconds

    def look(self) -> Iterable[Metric]:
        """Count the jobs that ended since the last call and return the counts. Raises like `Client.get`."""
        if fresh := self._fresh():
            with self._lock:
                for job in fresh:
                    self._count(job)
            self._keep()
        return self.metrics()

    def _fresh(self) -> list[Json]:
        """Return the jobs not seen before, oldest first, and remember them.

        Requests the end of the history, doubling the length until it contains a known job or exceeds a limit.
        """
        size, page = 1, dict[str, Json]()
        while True:
            try:
                page = self._client.get(f"/history?max_items={size}")
            except ValueError:
                if not page:
                    raise
                break
            if self._known is None or self._known.keys() & page or len(page) < size or size >= KNOWN:
                break
            size *= 2
        before = self._known
        names = [name for name in page if len(name) <= 200]  # latest last
        last = max((number for number, name in enumerate(names) if name in (before or ())), default=-1)
        unknown = names[last + 1 :]
        self._known = dict.fromkeys([*(before or ()), *unknown][-KNOWN:])
        if before is None:
            self._keep()
            return []
        return [page[name] for name in unknown if not _is_proof(page[name])]

    def _count(self, job: Json) -> None:
        status = job["status"] or {}
        messages = dict(status.get("messages", ()))
        times = {
            event: seconds for event in messages if (seconds := seconds_of(messages[event]["timestamp"])) is not None
        }
        if status.get("status_str") == "success":
            self._results["done"] += 1
            if {"execution_start", "execution_success"} <= times.keys():
                seconds = max(0.0, times["execution_success"] - times["execution_start"])
                self._counts[bisect_left(BUCKETS, seconds)] += 1
                self._seconds += seconds
        else:
            self._results["interrupted" if "execution_interrupted" in messages else "failed"] += 1

    def _keep(self) -> None:
        kept = JobCounts(BUCKETS, tuple(self._known or ()), self._results, tuple(self._counts), self._seconds)
        try:
            record(self._file, kept)
        except OSError as error:  # full disk: the counts stay correct in this process
            print(f"jobs: the counts could not be stored: {error}", file=sys.stderr, flush=True)

    def metrics(self) -> Iterable[Metric]:
        """Return the counts; they do not need a response from ComfyUI."""
        jobs = CounterMetricFamily("hearth_jobs", "Finished jobs.", labels=["result"])
        with self._lock:
            for result, count in self._results.items():
                jobs.add_metric([result], count)
            bounds = [*map(str, BUCKETS), "+Inf"]
            buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
            seconds = HistogramMetricFamily(
                "hearth_job_duration_seconds", "Duration of successful jobs.", buckets, self._seconds
            )
        return [jobs, seconds]


def _is_proof(job: Json) -> bool:
    """Return whether a job is the health gate's workflow (`agent/serve/health.py`)."""
    nodes = job["prompt"][2].values()
    return any(str(node.get("inputs", {}).get("filename_prefix", "")).startswith(f"{PROOF}/") for node in nodes)
