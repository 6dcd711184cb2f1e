"""Clusters: ComfyUI on machines that another program schedules."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Output

if TYPE_CHECKING:
    from deploy.gateways import Gateway
    from deploy.host import Hosts


@command(
    help={
        "host": "a host in config/hosts.toml, with the limits (default: local)",
        "group": "all hosts of a group; one set of pods, or one batch file, for each",
        "kubernetes": "write manifests for Kubernetes",
        "slurm": "write batch files for Slurm",
        "image": "Kubernetes: the container image of that host, with its registry",
        "gpus": "Kubernetes: number of pods, each with one GPU and a volume of its own (default: 1)",
        "storage": "Kubernetes: size of each volume (default: 200Gi)",
        "dra": "Kubernetes: request the GPU by dynamic resource allocation (1.34 or newer), not from the device plugin",
        "output": "the folder to write (default: manifests)",
    }
)
def manifests(
    _: Context,
    host: str = "",
    group: str = "",
    kubernetes: bool = False,
    slurm: bool = False,
    image: str = "",
    gpus: str = "",
    storage: str = "",
    dra: bool = False,
    output: str = "manifests",
    *,
    out: Output,
) -> None:
    """Write manifests that run ComfyUI on a cluster, from the configuration of hosts.

    On Kubernetes, an image holds ComfyUI with its flags, and a gateway of these hosts becomes a pod. On Slurm, a job
    runs the release that `inv deploy` put on a file system of all nodes. The cluster is not contacted.
    How: docs/how-to/kubernetes.md, docs/how-to/slurm.md

        inv manifests --kubernetes --host spark --image registry.example/comfyui:1
        inv manifests --kubernetes --group home --image registry.example/comfyui:1 --gpus 4 --output cluster
        inv manifests --slurm --host login
    """
    from core.errors import UsageError
    from deploy.host import select
    from ops import manifests
    from ops import slurm as jobs

    if kubernetes == slurm:
        raise UsageError("usage", "name one kind of cluster", hint="--kubernetes or --slurm")
    names = select(host, group)
    if slurm:
        if image or gpus or storage or dra:
            what = "--image, --gpus, --storage and --dra are for Kubernetes"
            raise UsageError("usage", what, hint="leave them out; a job runs one ComfyUI with the host's own release")
        texts = jobs.batch_files(names)
    else:
        texts = manifests.kubernetes(names, image, gpus or "1", storage or "200Gi", _gateway, dra=dra)
    paths = manifests.write(texts, Path(output))
    starts = [["sbatch", each] for each in paths] if slurm else [["kubectl", "apply", "-k", output]]
    lines = [f"to start it: {shlex.join(each)}" for each in starts]
    console.show(paths, [*paths, *lines], as_json=out.json)


def _gateway(name: str, gateway: Gateway, known: Hosts, secrets: str, run: str) -> str:
    """The configuration of a gateway, whose certificate is one of its secrets."""
    from gateway.haproxy import Places, configuration

    return configuration(name, gateway, known, Places(secrets, run, f"{secrets}/certificate.pem"))
