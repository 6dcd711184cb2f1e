"""Serve the metrics of a host over HTTP: `agent metrics <prefix>/state/exporter.json`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector

from agent.api import Endpoint, endpoint
from agent.files import recorded
from agent.layout import Layout
from agent.metrics import comfyui, host
from agent.metrics.gather import Gatherer, Source
from agent.schema.installed import ExporterSettings


class Handler(MetricsHandler):
    """Responds to any GET with the metrics; closes idle connections after `timeout` seconds."""

    timeout = 5


def gatherer(layout: Layout, place: Callable[[], Endpoint], counts: Path, *, cuda: bool) -> Gatherer:
    """Return a gatherer of all metrics of a host whose ComfyUI listens at `place`.

    `counts` is the file with the job counts; `cuda`: the profile needs a GPU.
    """
    client = comfyui.Client(place)
    jobs = comfyui.Jobs(client, counts)
    named: dict[str, Callable[[], host.Metrics]] = {
        "release": host.Release(layout),
        "service": partial(host.service, layout),
        "memory": host.memory,
        "gpu": host.Gpus(needed=cuda),
    }
    places = dict.fromkeys([layout.prefix, layout.data, *map(Path, layout.elsewhere.values())])
    named |= {f"disk {place}": partial(host.disk, layout, place) for place in places}
    return Gatherer(
        Source("comfyui", partial(comfyui.queue, client), comfyui.down),
        Source("jobs", jobs.look, jobs.metrics),
        *(Source(name, ask) for name, ask in named.items()),
    )


def serve(settings: Path) -> None:
    """Serve until killed. The endpoint is read at each scrape, since a cut-over may change it."""
    config = recorded(settings, ExporterSettings)
    layout = Layout(vars(config.site))
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    counts = Path(os.environ["RUNTIME_DIRECTORY"]) / "jobs.json"  # set by its unit
    registry.register(gatherer(layout, partial(endpoint, layout), counts, cuda=config.cuda))
    server = ThreadingHTTPServer(("127.0.0.1", config.port), Handler.factory(registry))
    server.serve_forever(poll_interval=60)  # ended by a signal: no need to poll
