"""Selection of the service's manager: systemd or Hearth's supervisor."""

from __future__ import annotations

import os
from pathlib import Path

from agent.files import AgentError, Json, recorded
from agent.layout import Layout
from agent.schema.facts import Process
from agent.schema.live import GpuState
from agent.schema.records import Choice
from agent.serve.supervised import Supervised
from agent.serve.systemd import Systemd, login, user_systemd

Manager = Systemd | Supervised


def manager_of(layout: Layout) -> Manager:
    """Return the manager: the system's systemd, the user's if lingering is enabled, or Hearth's supervisor.

    The manager that installed the service stays in charge: two managers would start it twice. Raises AgentError if that
    is the user's systemd and it does not respond.
    """
    systemd, supervised = Systemd(layout), Supervised(layout)
    if layout.scope == "system":
        return systemd
    name = recorded(layout.choice, Choice).manager
    if not name:  # not installed, or by an older version without this record
        lingers = Path("/var/lib/systemd/linger", login()).exists()
        placed = any(systemd.place(each).is_symlink() for each in (systemd.unit, systemd.container))
        by_systemd = not supervised.enabled.exists() and (placed or (lingers and user_systemd()))
        name = systemd.name if by_systemd else supervised.name
    if name == supervised.name:
        return supervised
    if not user_systemd():
        what = f"{login()}'s systemd, which runs {layout.service}, does not answer"
        cause = f"without lingering it ends with {login()}'s last session; its socket is in /run/user/{os.getuid()}"
        raise AgentError(
            "step", what, cause, f"on the host: loginctl enable-linger {login()}, then run the same command again"
        )
    return systemd


def last_words(manager: Manager) -> list[str]:
    """Return the service's last log lines; the previous run's if the current one has logged nothing yet."""
    return manager.log(25) or [line for _, line in manager.timed_log(25)]


def ours(layout: Layout, gpus: list[Json]) -> tuple[GpuState, ...]:
    """Return the GPUs with `comfyui` set for processes of the service and of its MPS server."""
    units = (f"{layout.service}.service", f"{layout.service}-mps.service")
    child = Supervised(layout).status().pid

    def marked(process: Json) -> Process:
        return Process(**process, comfyui=process["unit"] in units or process["pid"] == child != 0)

    return tuple(GpuState(**{**gpu, "processes": tuple(map(marked, gpu["processes"]))}) for gpu in gpus)
