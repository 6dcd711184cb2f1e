"""Batch files that run ComfyUI in a job of Slurm, from the configuration of a host."""

from __future__ import annotations

import json
import re
from string import Template
from typing import TYPE_CHECKING

from core import workspace
from core.errors import UsageError
from deploy.host import target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.host import Target


def batch_files(names: Sequence[str]) -> dict[str, str]:
    """A batch file for each host: file names and texts. Raises UsageError."""
    template = Template((workspace.current().checkout / "recipes/slurm/comfyui.sbatch").read_text())
    found: dict[str, str] = {}
    for each in map(target, names):
        if each.host.scope != "user":
            what = f'{each.name} has scope "system": only its service can write its data, and a job cannot'
            raise UsageError("usage", what, hint=f'set scope = "user" in [hosts.{each.name}], and a prefix of your own')
        name = "comfyui-" + re.sub(r"[^a-z0-9]+", "-", each.name.lower()).strip("-")
        values = {
            "name": name,
            "file": f"{name}.sbatch",
            "resources": "\n".join(f"#SBATCH --{each}" for each in _resources(each)),
            "prefix": json.dumps(each.prefix),  # JSON's strings and lists are Python's
            "port": each.host.port,
            "login": json.dumps(_login(each)),
            "mounts": json.dumps([*each.host.mounts]),
        }
        found[f"{name}.sbatch"] = template.substitute(values)
    return found


def _resources(found: Target) -> list[str]:
    memory = found.profile.memory_max
    return [
        *(["gres=gpu:1"] if found.profile.cuda else []),
        "cpus-per-task=4",  # models are loaded, and pictures encoded, by several threads
        *([f"mem={memory}"] if re.fullmatch(r"[0-9]+[KMGT]", memory) else []),  # systemd's units are Slurm's
    ]


def _login(found: Target) -> str:
    """The host as `ssh -J` takes it; empty for this machine."""
    host = found.host
    user, port = f"{host.user}@" if host.user else "", f":{host.ssh_port}" if host.ssh_port else ""
    return f"{user}{host.address}{port}" if host.address else ""
