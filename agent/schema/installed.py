"""What runs beside ComfyUI and belongs to none of its releases: the metrics exporter and the gateway."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.schema.site import Site


@dataclass(frozen=True)
class ExporterSettings:
    """What the exporter reads when it starts (`state/exporter.json`)."""

    site: Site
    port: int  # where it answers, at 127.0.0.1
    cuda: bool  # a GPU is needed: none is an error


@dataclass(frozen=True)
class InstalledExporter:
    """A metrics exporter."""

    agent: str = ""  # hash of the agent that it runs
    settings: ExporterSettings | None = None  # None: damaged, or there is none
    unit: str = ""  # text of its unit; empty: there is no exporter


@dataclass(frozen=True)
class ExporterBefore:
    """The exporter before a change (`state/exporter-before.json`)."""

    exporter: InstalledExporter = field(default_factory=InstalledExporter)


@dataclass(frozen=True)
class ExporterState(InstalledExporter):
    """The metrics exporter of a host."""

    active: bool = False  # its unit runs


@dataclass(frozen=True)
class InstalledGateway:
    """A gateway."""

    unit: str = ""  # text of its unit; empty: there is no gateway
    configuration: str = ""  # HAProxy's
    access: dict[str, tuple[str, ...]] = field(default_factory=dict)  # the users that reach each port of ComfyUI
