"""The metrics exporter on a host: a unit that runs the agent, independent of ComfyUI's releases."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from agent.schema.change import Exporter
from agent.schema.installed import ExporterSettings, InstalledExporter
from deploy import archive, units

if TYPE_CHECKING:
    from deploy.facts import Facts
    from deploy.host import Target


def wanted(target: Target, prefix: str, interpreter: str) -> InstalledExporter:
    """The exporter as configured; without a unit if there are no metrics.

    `interpreter` is a system Python of the host, not an environment's.
    """
    host = target.host
    if not host.metrics_port:
        return InstalledExporter()
    state = f"{prefix}/state"
    values = {
        "service": host.service,
        "port": str(host.metrics_port),
        "command": units.command_line(
            [interpreter, "-I", "-S", f"{state}/exporter", "metrics", f"{state}/exporter.json"]
        ),
        "exporter": target.site.exporter,
        "addresses": units.addresses(host.listen),
        "target": units.boot_target(host.scope),
        **units.devices(target.profile),
    }
    unit = units.filled("exporter", values)
    return InstalledExporter(
        agent=archive.agent_hash(),
        settings=ExporterSettings(replace(target.site, prefix=prefix), host.metrics_port, target.profile.cuda),
        unit=unit if host.scope == "system" else units.without_system(unit),
    )


def change(target: Target, facts: Facts, interpreter: str) -> Exporter | None:
    """The step that brings the exporter to its wanted state; None if there is nothing to do."""
    found, right = facts.exporter, wanted(target, facts.prefix, interpreter)
    differs = [name for name, value in vars(right).items() if getattr(found, name) != value]
    if not differs and found.active == bool(right.unit):
        return None
    if not right.unit:
        return Exporter("remove the metrics exporter", "metrics_port is not set", "set metrics_port again", right)
    title = f"export metrics at 127.0.0.1:{target.host.metrics_port}"
    why = "no exporter is installed"
    if found.unit:
        why = f"its {' and '.join(differs)} changed" if differs else "the exporter is not running"
    return Exporter(title, why, "rolls back automatically if it does not answer", right)
