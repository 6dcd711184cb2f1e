"""Replace the metrics exporter; restore the previous one if the new one does not respond."""

from __future__ import annotations

import http.client
import subprocess
import time
from contextlib import suppress

from agent.files import AgentError, Note, discard, link, record, recorded, write
from agent.layout import Layout
from agent.look.exporter import installed, unit_file
from agent.processes import run
from agent.schema.change import Exporter
from agent.schema.installed import ExporterBefore, ExporterSettings, InstalledExporter
from agent.serve.systemd import Systemd, entries

SECONDS = 20
"""Time limit for the first response: Python must start, and NVML may take a second to open."""


def exporter(layout: Layout, step: Exporter, note: Note) -> None:
    """Install the step's exporter, or remove it. On a failure, restore the previous one and raise AgentError.

    Records the previous exporter first, so that a resumed run restores that one and not the new one.
    """
    kept = layout.state / "exporter-before.json"
    if not kept.exists():
        record(kept, ExporterBefore(installed(layout)))
    before = recorded(kept, ExporterBefore).exporter
    try:
        put(layout, step.exporter)
        _await_answer(step.exporter.settings)
    except (AgentError, OSError) as error:
        log: list[str] = []
        with suppress(AgentError):
            log = Systemd(layout).log_of(Systemd(layout).exporter_unit)
        what = f"the new metrics exporter does not run{_restore(layout, before)}"
        discard(kept)
        cause = error.report["what"] if isinstance(error, AgentError) else str(error)
        error = AgentError(
            "step", what, cause, "ComfyUI is not affected; read the log above, then run the same command again"
        )
        error.report["log"] = log
        raise error from None
    discard(kept)


def _restore(layout: Layout, before: InstalledExporter) -> str:
    """Restore the previous exporter, if any; return a phrase for the message. Raises AgentError or OSError."""
    put(layout, before)
    if not before.unit:
        return ""
    try:
        _await_answer(before.settings)
    except AgentError:
        return "; the previous one is restored, but does not answer either"
    return "; the previous one is restored"


def put(layout: Layout, wanted: InstalledExporter) -> None:
    """Install and restart an exporter; without a unit, remove it. Raises AgentError or OSError."""
    systemd, unit = Systemd(layout), unit_file(layout)
    name = systemd.exporter_unit
    if not wanted.unit:
        if placed := entries(systemd.units, name):
            run([*systemd.ctl, "stop", name])
            for path in placed:
                discard(path)
            run([*systemd.ctl, "daemon-reload"])
        for path in (layout.exporter_settings, layout.exporter_agent):
            discard(path)
        return
    link(layout.exporter_agent, f"agents/{wanted.agent}")
    record(layout.exporter_settings, wanted.settings)
    discard(unit)  # older versions: a link into a release; do not write through it
    write(unit, wanted.unit)
    link(systemd.units / f"{systemd.target}.wants" / name, f"../{name}")
    run([*systemd.ctl, "daemon-reload"])
    subprocess.run([*systemd.ctl, "reset-failed", name], capture_output=True)
    run([*systemd.ctl, "restart", name])


def _await_answer(settings: ExporterSettings | None) -> None:
    """Wait until the exporter, if there is one, responds to a scrape. Raises AgentError."""
    if not settings:
        return
    port = settings.port
    end, why = time.monotonic() + SECONDS, ""
    while time.monotonic() < end:
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            asked.request("GET", "/metrics")
            if b"hearth_" in asked.getresponse().read():
                return
            why = "its answer has none of Hearth's metrics"
        except (OSError, http.client.HTTPException) as error:
            why = str(error)
        finally:
            asked.close()
        time.sleep(0.2)
    raise AgentError("step", f"127.0.0.1:{port} does not answer a scrape within {SECONDS} s: {why}")
