"""Serve the metrics of the host that the given file describes: `python -I -S <tree> <release>/exporter.json`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector

from agent.api import Endpoint
from agent.files import read
from agent.layout import Layout
from exporter import comfyui, host
from exporter.gather import Gatherer, Source


class Handler(MetricsHandler):
    """Answers any GET with the metrics; whoever connects and says nothing is hung up on after `timeout` seconds."""

    timeout = 5


def gatherer(site: Layout, place: Endpoint, counts: Path, *, cuda: bool) -> Gatherer:
    """Everything that is told of a host, whose ComfyUI listens at `place`.

    `counts` is the file of its jobs; `cuda`: its release needs a GPU.
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


def main(argv: list[str]) -> None:
    """Serve until killed."""
    config = read(Path(argv[0]))
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    counts = Path(os.environ["RUNTIME_DIRECTORY"]) / "jobs.json"  # its unit's
    registry.register(gatherer(Layout(config["site"]), Endpoint.of(config["argv"]), counts, cuda=config["cuda"]))
    server = ThreadingHTTPServer(("127.0.0.1", config["port"]), Handler.factory(registry))
    server.serve_forever(poll_interval=60)  # it is ended by a signal: nothing to look for twice a second


if __name__ == "__main__":
    main(sys.argv[1:])
