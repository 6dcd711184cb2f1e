"""The exporter of metrics as it is installed: apart from any release, so that a rollback of ComfyUI leaves it alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from agent.files import Json, read, read_text
from agent.layout import Site
from agent.serve.services import Systemd


def installed(site: Site) -> Json:
    """The `agent` (its hash) that the exporter's unit runs, its `settings` and the `unit`; empty without one."""
    unit = unit_file(site)
    if unit.is_symlink() or not unit.exists():  # a link: an older Hearth's, a part of its release
        return {}
    agent = os.path.basename(os.path.realpath(site.exporter_agent))  # noqa: PTH119  a link that may lead nowhere
    return {"agent": agent, "settings": read(site.exporter_settings, lenient=True), "unit": read_text(unit)}


def exporter(site: Site) -> Json:
    """As `installed`, and whether its unit is `active`."""
    found = installed(site)
    if found:
        systemd = Systemd(site)
        words = [*systemd.ctl, "is-active", "--quiet", systemd.exporter_unit]
        found["active"] = subprocess.run(words, capture_output=True).returncode == 0
    return found


def unit_file(site: Site) -> Path:
    """Where the exporter's unit lies."""
    systemd = Systemd(site)
    return systemd.units / systemd.exporter_unit
