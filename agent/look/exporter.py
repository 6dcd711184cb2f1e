"""The installed metrics exporter: independent of releases, so that a rollback of ComfyUI does not affect it."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, read_text, recorded
from agent.layout import Layout
from agent.schema.installed import ExporterSettings, ExporterState, InstalledExporter
from agent.serve.systemd import Systemd


def installed(layout: Layout) -> InstalledExporter:
    """Return the installed exporter."""
    unit = unit_file(layout)
    if unit.is_symlink() or not unit.exists():  # a link: part of an older version's release
        return InstalledExporter()
    agent = os.path.basename(os.path.realpath(layout.exporter_agent))  # noqa: PTH119  the link may dangle
    settings = None
    with suppress(AgentError):
        settings = recorded(layout.exporter_settings, ExporterSettings)
    return InstalledExporter(agent, settings, read_text(unit))


def exporter(layout: Layout) -> ExporterState:
    """Return the installed exporter, and whether it runs."""
    found, systemd = installed(layout), Systemd(layout)
    words = [*systemd.ctl, "is-active", "--quiet", systemd.exporter_unit]
    return ExporterState(
        **vars(found), active=bool(found.unit) and subprocess.run(words, capture_output=True).returncode == 0
    )


def unit_file(layout: Layout) -> Path:
    """Return the path of the exporter's unit."""
    systemd = Systemd(layout)
    return systemd.units / systemd.exporter_unit
