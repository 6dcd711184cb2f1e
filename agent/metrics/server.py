"""Serve the metrics of a host over HTTP: `agent metrics <prefix>/state/exporter.json`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector

from agent.api import Endpoint, endpoint
from agent.files import read
from agent.layout import Site
from agent.metrics import comfyui, host
from agent.metrics.gather import Gatherer, Source


class Handler(MetricsHandler):
    """Answers any GET with the metrics; a connection without a request is closed after `timeout` seconds."""

    timeout = 5


def gatherer(site: Site, place: Callable[[], Endpoint], counts: Path, *, cuda: bool) -> Gatherer:
    """All metrics of a host, whose ComfyUI listens at `place`.

    `counts` is the file with the counts of its jobs; `cuda`: its profile needs a GPU.
    """
    client = comfyui.Client(place)
    jobs = comfyui.Jobs(client, counts)
    named: dict[str, Callable[[], host.Metrics]] = {
        "release": host.Release(site),
        "service": partial(host.service, site),
        "memory": host.memory,
        "gpu": host.Gpus(needed=cuda),
    }
    places = dict.fromkeys([site.prefix, site.data, *map(Path, site.elsewhere.values())])
    named |= {f"disk {place}": partial(host.disk, site, place) for place in places}
    return Gatherer(
        Source("comfyui", partial(comfyui.queue, client), comfyui.down),
        Source("jobs", jobs.look, jobs.told),
        *(Source(name, ask) for name, ask in named.items()),
    )


def serve(settings: Path) -> None:
    """Serve until killed. The endpoint is that of the release in service at each scrape: a cut-over may change it."""
    config = read(settings)
    site = Site(config["site"])
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    counts = Path(os.environ["RUNTIME_DIRECTORY"]) / "jobs.json"  # its unit's
    registry.register(gatherer(site, partial(endpoint, site), counts, cuda=config["cuda"]))
    server = ThreadingHTTPServer(("127.0.0.1", config["port"]), Handler.factory(registry))
    server.serve_forever(poll_interval=60)  # it is ended by a signal: nothing to look for twice a second
