"""The GPUs and ComfyUI's job, looked at again and again over one connection."""

from __future__ import annotations

import time
from collections.abc import Iterator

from agent.api import endpoint, queue
from agent.files import Json
from agent.layout import Layout
from agent.look.gpu import Nvml
from agent.serve.managers import ours


def samples(layout: Layout, every: float, seconds: float | None) -> Iterator[Json]:
    """A sample now, and one each `every` seconds until `seconds` are over (None: for ever; 0: only one).

    `time` is this machine's, in seconds since 1970, `gpus` as `agent.look.gpu.gpus` tells them, processes marked
    by `ours`; `job` the id of the one that ComfyUI runs. Raises Fault without NVML.
    """
    begun = time.monotonic()
    number, asked_again = 0, 0.0
    with Nvml() as nvml:
        while True:
            now, job = time.monotonic(), None
            if now >= asked_again:
                try:
                    job = running_job(layout, 1)
                except (OSError, ValueError):  # one that hangs must not hold up each sample
                    asked_again = time.monotonic() + 10 * (time.monotonic() - now)
            yield {"time": time.time(), "gpus": ours(layout, nvml.gpus()), "job": job}
            number = max(number + 1, int((time.monotonic() - begun) / every))  # one that came late is left out
            if seconds is not None and number * every > seconds:
                return
            time.sleep(max(0.0, begun + number * every - time.monotonic()))


def running_job(layout: Layout, timeout: float = 5) -> str | None:
    """The id of the job that ComfyUI runs; None when it runs none. Raises OSError or ValueError."""
    running, _ = queue(endpoint(layout), timeout)
    return str(running[0]["id"]) if running else None
