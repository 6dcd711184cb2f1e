"""The metrics exporter on a host: a unit that runs the agent, independent of ComfyUI's releases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent.schema.change import Exporter
from deploy import archive, units

if TYPE_CHECKING:
    from deploy.facts import Facts
    from deploy.host import Target


def wanted(target: Target, prefix: str, interpreter: str) -> dict[str, Any]:
    """The exporter's wanted state: the agent's hash, its settings and its unit; empty without metrics.

    `interpreter` is a system Python of the host, not an environment's.
    """
    host = target.host
    if not host.metrics_port:
        return {}
    state = f"{prefix}/state"
    values = {
        "service": host.service,
        "port": str(host.metrics_port),
        "command": units.command_line(
            [interpreter, "-I", "-S", f"{state}/exporter", "metrics", f"{state}/exporter.json"]
        ),
        "exporter": target.site["exporter"],
        "addresses": units.addresses(host.listen),
        "target": units.boot_target(host.scope),
        **units.devices(target.profile),
    }
    settings = {"site": target.site | {"prefix": prefix}, "port": host.metrics_port, "cuda": target.profile.cuda}
    unit = units.filled("exporter", values)
    return {
        "agent": archive.agent_hash(),
        "settings": settings,
        "unit": unit if host.scope == "system" else units.without_system(unit),
    }


def change(target: Target, facts: Facts, interpreter: str) -> Exporter | None:
    """The step that brings the exporter to its wanted state; None if there is nothing to do."""
    found, right = facts.exporter, wanted(target, facts.prefix, interpreter)
    differs = [name for name in ("agent", "settings", "unit") if found.get(name) != right.get(name)]
    if not differs and bool(found.get("active")) == bool(right):
        return None
    if not right:
        return Exporter("remove the metrics exporter", "metrics_port is not set", "set metrics_port again", right)
    title = f"export metrics at 127.0.0.1:{target.host.metrics_port}"
    why = "no exporter is installed"
    if found:
        why = f"its {' and '.join(differs)} changed" if differs else "the exporter is not running"
    return Exporter(title, why, "rolls back automatically if it does not answer", right)
