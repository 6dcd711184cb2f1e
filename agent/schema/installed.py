"""What runs beside ComfyUI and belongs to none of its releases: the metrics exporter and the gateway."""

from __future__ import annotations

from dataclasses import field

from agent.schema.record import Record
from agent.schema.site import Site


class ExporterSettings(Record):
    """What the exporter reads when it starts (`state/exporter.json`)."""

    site: Site
    port: int  # where it answers, at 127.0.0.1
    cuda: bool  # a GPU is needed: none is an error


class InstalledExporter(Record):
    """A metrics exporter."""

    agent: str = ""  # hash of the agent that it runs
    settings: ExporterSettings | None = None  # None: damaged, or there is none
    unit: str = ""  # text of its unit; empty: there is no exporter


class ExporterBefore(Record):
    """The exporter before a change (`state/exporter-before.json`)."""

    exporter: InstalledExporter = field(default_factory=InstalledExporter)


class ExporterState(InstalledExporter):
    """The metrics exporter of a host."""

    active: bool = False  # its unit runs


class InstalledGateway(Record):
    """A gateway."""

    unit: str = ""  # text of its unit; empty: there is no gateway
    configuration: str = ""  # HAProxy's
    access: dict[str, tuple[str, ...]] = field(default_factory=dict)  # the users that reach each port of ComfyUI
