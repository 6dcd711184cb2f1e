"""Query all sources of metrics within a time limit: a hanging source delays neither the others nor the next scrape."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PATIENCE = 1.8
"""Time limit for all sources together in seconds; Prometheus's default time-out is 10."""

FRESH = 1.0
"""Seconds for which a result is reused, so that two Prometheus servers cause no more load than one."""


def nothing() -> Iterable[Metric]:
    """Return no metrics; the default for a failed source."""
    return ()


class Source:
    """A source of metrics, queried in a separate thread. `otherwise` returns its metrics if it fails or is late."""

    def __init__(
        self, name: str, ask: Callable[[], Iterable[Metric]], otherwise: Callable[[], Iterable[Metric]] = nothing
    ) -> None:
        self.name = name
        self._ask = ask
        self._otherwise = otherwise
        self._thread = threading.Thread()
        self._found: list[Metric] | None = None
        self._failure = ""
        self._began = self._ended = 0.0

    def begin(self) -> None:
        """Start a query unless the last one is still running."""
        if not self._thread.is_alive():
            self._found, self._began = None, time.monotonic()
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        failure = ""
        try:
            found = list(self._ask())
            for sample in (sample for metric in found for sample in metric.samples):
                if not math.isfinite(sample.value):  # may raise, too; would break all metrics of the host
                    raise ValueError(f"{sample.name} is {sample.value}")
            self._found = found
        except Exception as error:  # any error: the other sources must continue
            failure = f"{type(error).__name__}: {error}"
        if failure != self._failure:  # log changes only
            print(f"{self.name}: {failure or 'works again'}", file=sys.stderr, flush=True)
            self._failure = failure
        self._ended = time.monotonic()

    def answer(self, deadline: float) -> tuple[Iterable[Metric], bool, float]:
        """Return the metrics, success, and the duration in seconds; `deadline` is on the monotonic clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        late = self._thread.is_alive()
        seconds = (time.monotonic() if late else self._ended) - self._began
        found = None if late else self._found
        return (self._otherwise() if found is None else found), found is not None, seconds


class Gatherer(Collector):
    """Collects the metrics of all sources and of their queries; one family per name, as the format requires."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources
        self._lock = threading.Lock()
        self._last: list[Metric] = []
        self._at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, at most `FRESH` s old; takes up to `PATIENCE` s, twice that during another scrape."""
        with self._lock:
            if time.monotonic() - self._at > FRESH:
                self._last = self._gather()
                self._at = time.monotonic()
            yield from self._last

    def _gather(self) -> list[Metric]:
        deadline = time.monotonic() + PATIENCE
        for source in self._sources:
            source.begin()
        success = GaugeMetricFamily(
            "hearth_scrape_collector_success", "Whether a collector answered in time.", labels=["collector"]
        )
        duration = GaugeMetricFamily(
            "hearth_scrape_collector_duration_seconds", "Duration of a collector's run.", labels=["collector"]
        )
        merged: dict[str, Metric] = {}
        for source in self._sources:
            metrics, answered, seconds = source.answer(deadline)
            for metric in metrics:
                merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                merged[metric.name].samples += metric.samples
            success.add_metric([source.name], answered)
            duration.add_metric([source.name], seconds)
        return [*merged.values(), success, duration]
