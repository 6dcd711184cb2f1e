"""The installed metrics exporter: independent of releases, so that a rollback of ComfyUI does not affect it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from agent.files import Json, read, read_text
from agent.layout import Layout
from agent.serve.systemd import Systemd


def installed(layout: Layout) -> Json:
    """Return the exporter's `agent` (hash), `settings` and `unit` (text); empty if not installed."""
    unit = unit_file(layout)
    if unit.is_symlink() or not unit.exists():  # a link: part of an older version's release
        return {}
    agent = os.path.basename(os.path.realpath(layout.exporter_agent))  # noqa: PTH119  the link may dangle
    return {"agent": agent, "settings": read(layout.exporter_settings, lenient=True), "unit": read_text(unit)}


def exporter(layout: Layout) -> Json:
    """Return `installed` and whether the unit is `active`."""
    found = installed(layout)
    if found:
        systemd = Systemd(layout)
        words = [*systemd.ctl, "is-active", "--quiet", systemd.exporter_unit]
        found["active"] = subprocess.run(words, capture_output=True).returncode == 0
    return found


def unit_file(layout: Layout) -> Path:
    """Return the path of the exporter's unit."""
    systemd = Systemd(layout)
    return systemd.units / systemd.exporter_unit
