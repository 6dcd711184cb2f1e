"""Changing the exporter of metrics: replaced as a whole, and restored as a whole when the new one does not answer."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from agent.files import Fault, Json, discard, link, read, run, write
from agent.layout import Site
from agent.look.exporter import installed, unit_file
from agent.serve.services import Systemd, entries

SECONDS = 20
"""For the first answer: Python starts, and the driver's library may take a second to open."""


def exporter(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Run the exporter that the step describes, or none; raises Fault, with the previous one restored.

    The previous one is recorded first: a killed run, done again, restores that and not its own.
    """
    record = site.state / "exporter-before.json"
    before = read(record).get("exporter") if record.exists() else installed(site)
    write(record, json.dumps({"exporter": before}))
    try:
        put(site, step["exporter"])
        if step["exporter"]:
            _await_answer(step["exporter"]["settings"]["port"])
    except (Fault, OSError) as error:
        log = _log(site)
        what = f"the new exporter of metrics does not run{_restore(site, before or {})}"
        discard(record)
        cause = error.report["what"] if isinstance(error, Fault) else str(error)
        fault = Fault(
            "step", what, cause, "ComfyUI is not affected; read the log above, then run the same command again"
        )
        fault.report["log"] = log
        raise fault from None
    discard(record)


def _restore(site: Site, before: Json) -> str:
    """Put the previous exporter back, if there was one; the words that say so. Raises Fault or OSError."""
    put(site, before)
    if not before:
        return ""
    try:
        _await_answer(before["settings"]["port"])
    except Fault:
        return "; the previous one is restored, and does not answer either"
    return "; the previous one is restored"


def put(site: Site, wanted: Json) -> None:
    """Install and restart the exporter as `installed` describes one, or remove it. Raises Fault or OSError."""
    systemd, unit = Systemd(site), unit_file(site)
    name = systemd.exporter_unit
    if not wanted:
        if placed := entries(systemd.units, name):
            run([*systemd.ctl, "stop", name])
            for path in placed:
                discard(path)
            run([*systemd.ctl, "daemon-reload"])
        for path in (site.exporter_settings, site.exporter_agent):
            discard(path)
        return
    link(site.exporter_agent, f"agents/{wanted['agent']}")
    write(site.exporter_settings, json.dumps(wanted["settings"]))
    discard(unit)  # an older Hearth's is a link into its release, which must not be written through
    write(unit, wanted["unit"])
    link(systemd.units / f"{systemd.target}.wants" / name, f"../{name}")
    run([*systemd.ctl, "daemon-reload"])
    subprocess.run([*systemd.ctl, "reset-failed", name], capture_output=True)
    run([*systemd.ctl, "restart", name])


def _await_answer(port: int) -> None:
    """Wait until the exporter answers a scrape; raises Fault."""
    end, why = time.monotonic() + SECONDS, ""
    while time.monotonic() < end:
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            asked.request("GET", "/metrics")
            if b"hearth_" in asked.getresponse().read():
                return
            why = "its answer has no metrics of Hearth's"
        except (OSError, http.client.HTTPException) as error:
            why = str(error)
        finally:
            asked.close()
        time.sleep(0.2)
    raise Fault("step", f"127.0.0.1:{port} does not answer a scrape within {SECONDS} s: {why}")


def _log(site: Site) -> list[str]:
    who = "--user-unit" if site.scope == "user" else "--unit"
    words = ["journalctl", "--no-pager", "--quiet", "--output=cat", "--lines=12", who, Systemd(site).exporter_unit]
    with suppress(Fault):
        return run(words).splitlines()
    return []
