"""Clusters: ComfyUI on machines that another program schedules."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Output


@command(
    help={
        "host": "a host in config/hosts.toml, with the limits (default: local)",
        "group": "all hosts of a group; one set of pods for each",
        "kubernetes": "write manifests for Kubernetes",
        "image": "the container image of that host, with its registry",
        "gpus": "number of pods, each with one GPU and a volume of its own (default: 1)",
        "storage": "size of each volume (default: 200Gi)",
        "dra": "request the GPU by dynamic resource allocation (Kubernetes 1.34 or newer), not from the device plugin",
        "output": "the folder to write (default: manifests)",
    }
)
def manifests(
    _: Context,
    host: str = "",
    group: str = "",
    kubernetes: bool = False,
    image: str = "",
    gpus: str = "1",
    storage: str = "200Gi",
    dra: bool = False,
    output: str = "manifests",
    *,
    out: Output,
) -> None:
    """Write manifests that run ComfyUI on a cluster, from the configuration of hosts.

    The image holds ComfyUI with its flags. The cluster is not contacted, and needs nothing of Hearth.
    How: docs/how-to/kubernetes.md

        inv manifests --kubernetes --host spark --image registry.example/comfyui:1
        inv manifests --kubernetes --group home --image registry.example/comfyui:1 --gpus 4 --output cluster
    """
    from core.errors import UsageError
    from deploy.host import select
    from ops import manifests

    if not kubernetes:
        raise UsageError("usage", "the kind of cluster is missing", hint="--kubernetes")
    texts = manifests.kubernetes(select(host, group), image, gpus, storage, dra=dra)
    paths = manifests.write(texts, Path(output))
    console.show(paths, [*paths, f"to apply them: kubectl apply -k {output}"], as_json=out.json)
