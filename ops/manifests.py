"""Manifests that run ComfyUI on a Kubernetes cluster, from the configuration of a host and an image of it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from core import console, files
from core.errors import UsageError
from deploy.gateways import members
from deploy.host import hosts, target
from ops import gateway_pods

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from deploy.host import Target
    from ops.gateway_pods import Render

PORT = 8188
DATA = "/opt/comfyui/data"
"""Where an image that Hearth writes has its data."""

PRIVATE = ("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")
LINK_LOCAL = ("169.254.0.0/16",)
USER = 1000
"""The user of the container; it owns the volume."""


def kubernetes(
    names: Sequence[str], image: str, gpus: str, storage: str, render: Render, *, dra: bool
) -> dict[str, str]:
    """A Kustomize folder: file names and texts. JSON is YAML. Raises UsageError.

    It has the gateways whose hosts are all among `names`; `render` makes their configuration.
    """
    if not image:
        raise UsageError("usage", "no image is named", hint="--image REGISTRY/NAME@sha256:...")
    if not (gpus.isdecimal() and int(gpus)):
        raise UsageError("usage", f"--gpus {gpus} is not a number of GPUs", hint="use a number such as --gpus 4")
    if not re.fullmatch(r"[1-9][0-9]*[KMGT]i?", storage):
        raise UsageError("usage", f"--storage {storage} is not a size", hint="use a size such as --storage 200Gi")
    found: dict[str, str] = {}
    pods: dict[str, list[str]] = {}
    for each in map(target, names):
        if dra and each.profile.arch == "12.1":
            what = f"{each.name} is a GB10, on which the DRA driver fails (kubernetes-sigs/dra-driver-nvidia-gpu#1073)"
            raise UsageError("usage", what, hint="omit --dra; the device plugin 0.17.4 or newer works")
        name = "comfyui-" + re.sub(r"[^a-z0-9]+", "-", each.name.lower()).strip("-")
        objects = list(_objects(each, name, image, int(gpus), storage, dra=dra))
        found[f"{name}.yaml"] = _yaml(objects)
        pods[each.name] = [f"{name}-{number}.{name}" for number in range(int(gpus))]  # a StatefulSet names them so
    found |= _gateways(pods, render)
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [*found]}
    return {"kustomization.yaml": json.dumps(kustomization, indent=1) + "\n", **found}


def _gateways(pods: dict[str, list[str]], render: Render) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, gateway in hosts().gateways.items():
        behind = members(gateway, hosts())
        served = {each: pods[each] for each in behind if each in pods}
        if len(served) == len(behind):
            objects = list(gateway_pods.objects(name, gateway, served, USER, render))
            found[f"{objects[0]['metadata']['name']}.yaml"] = _yaml(objects)
        elif served:
            missing = ", ".join(each for each in behind if each not in served)
            console.say(
                f"gateway {name} is left out, because it also serves {missing}: choose a group of all its hosts"
            )
    return found


def _yaml(objects: Sequence[dict[str, Any]]) -> str:
    return "---\n".join(json.dumps(value, indent=1) + "\n" for value in objects)


def _objects(found: Target, name: str, image: str, gpus: int, storage: str, *, dra: bool) -> Iterator[dict[str, Any]]:
    labels = {"app.kubernetes.io/name": "comfyui", "app.kubernetes.io/instance": name}

    def made(api: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
        return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": spec}

    pod = _pod(found, name, image, dra=dra)
    volume = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": storage}}}
    yield made(
        "apps/v1",
        "StatefulSet",
        {
            "serviceName": name,
            "replicas": gpus,  # one ComfyUI for each GPU, with a volume of its own
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": volume}],
        },
    )
    # headless: queue, history and websocket belong to one instance, so each has an address of its own
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    # a gateway checks itself, and lets requests wait: a pod keeps its name while ComfyUI restarts
    headless = {"clusterIP": "None", "publishNotReadyAddresses": True}
    yield made("v1", "Service", {**headless, "selector": labels, "ports": ports})
    yield made("networking.k8s.io/v1", "NetworkPolicy", _network(found, labels))
    if dra:
        request = {"name": "gpu", "exactly": {"deviceClassName": "gpu.nvidia.com"}}
        yield made("resource.k8s.io/v1", "ResourceClaimTemplate", {"spec": {"devices": {"requests": [request]}}})


def _pod(found: Target, name: str, image: str, *, dra: bool) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if re.fullmatch(r"[0-9]+[KMGT]", found.profile.memory_max):  # systemd's units are powers of 1024
        limits["memory"] = f"{found.profile.memory_max}i"
    claim = found.profile.cuda and dra
    if found.profile.cuda and not dra:
        limits["nvidia.com/gpu"] = 1
    ready = {"httpGet": {"path": "/system_stats", "port": "http"}, "timeoutSeconds": 15, "periodSeconds": 10}
    container: dict[str, Any] = {
        "name": "comfyui",
        "image": image,
        "env": [{"name": "COMFYUI_LISTEN", "value": "0.0.0.0"}],  # noqa: S104  the NetworkPolicy limits it
        "ports": [{"name": "http", "containerPort": PORT}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"limits": limits, **({"claims": [{"name": "gpu"}]} if claim else {})},
        "startupProbe": {**ready, "failureThreshold": max(30, found.profile.start_seconds // 10)},
        # ComfyUI answers late while it works: a strict probe would restart it in the middle of a job
        "livenessProbe": {**ready, "periodSeconds": 30, "failureThreshold": 10},
        "readinessProbe": {**ready, "failureThreshold": 4},
        "volumeMounts": [{"name": "data", "mountPath": DATA}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }
    return {
        **gateway_pods.unprivileged(USER),
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}}],
        **({"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": name}]} if claim else {}),
    }


def _network(found: Target, labels: dict[str, str]) -> dict[str, Any]:
    """Only pods with the label of a gateway reach ComfyUI; whom it reaches is the host's `network`."""
    gateway = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "gateway"}}}
    closed = {"open": LINK_LOCAL, "lan-deny": (*PRIVATE, *LINK_LOCAL), "offline": None}[found.profile.network]
    names = {"ports": [{"port": 53, "protocol": each} for each in ("UDP", "TCP")]}
    egress = [] if closed is None else [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": [*closed]}}]}, names]
    return {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [gateway], "ports": [{"port": "http"}]}],
        "egress": egress,
    }


def write(texts: dict[str, str], folder: Path) -> list[str]:
    """Write the files into a folder, which is made; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        files.write(folder / name, text)
    return [str(folder / name) for name in texts]
