"""The exporter of metrics as it is installed: apart from any release, so that a rollback of ComfyUI leaves it alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from agent.files import Json, read, read_text
from agent.layout import Layout
from agent.serve.systemd import Systemd


def installed(layout: Layout) -> Json:
    """The `agent` (its hash) that the exporter's unit runs, its `settings` and the `unit`; empty without one."""
    unit = unit_file(layout)
    if unit.is_symlink() or not unit.exists():  # a link: an older Hearth's, a part of its release
        return {}
    agent = os.path.basename(os.path.realpath(layout.exporter_agent))  # noqa: PTH119  a link that may lead nowhere
    return {"agent": agent, "settings": read(layout.exporter_settings, lenient=True), "unit": read_text(unit)}


def exporter(layout: Layout) -> Json:
    """As `installed`, and whether its unit is `active`."""
    found = installed(layout)
    if found:
        systemd = Systemd(layout)
        words = [*systemd.ctl, "is-active", "--quiet", systemd.exporter_unit]
        found["active"] = subprocess.run(words, capture_output=True).returncode == 0
    return found


def unit_file(layout: Layout) -> Path:
    """Where the exporter's unit lies."""
    systemd = Systemd(layout)
    return systemd.units / systemd.exporter_unit
