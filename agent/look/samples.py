"""Repeated samples of the GPUs and ComfyUI's running job."""

from __future__ import annotations

import time
from collections.abc import Iterator

from agent.api import endpoint, queue
from agent.layout import Layout
from agent.look.gpu import Nvml
from agent.schema.live import Sample
from agent.serve.managers import ours


def samples(layout: Layout, every: float, seconds: float | None) -> Iterator[Sample]:
    """Yield a sample now and then one every `every` seconds for `seconds` (None: no end; 0: one sample).

    Raises AgentError without NVML.
    """
    begun = time.monotonic()
    number, asked_again = 0, 0.0
    with Nvml() as nvml:
        while True:
            now, job = time.monotonic(), None
            if now >= asked_again:
                try:
                    job = running_job(layout, 1)
                except (OSError, ValueError):  # a hanging ComfyUI must not delay every sample
                    asked_again = time.monotonic() + 10 * (time.monotonic() - now)
            yield Sample(time.time(), ours(layout, nvml.gpus()), job)
            number = max(number + 1, int((time.monotonic() - begun) / every))  # skips missed samples
            if seconds is not None and number * every > seconds:
                return
            time.sleep(max(0.0, begun + number * every - time.monotonic()))


def running_job(layout: Layout, timeout: float = 5) -> str | None:
    """Return the id of ComfyUI's running job, or None. Raises OSError or ValueError."""
    running, _ = queue(endpoint(layout), timeout)
    return str(running[0]["id"]) if running else None
