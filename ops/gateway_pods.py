"""A gateway on a Kubernetes cluster: HAProxy with the configuration of a gateway, in front of the pods of its hosts."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import msgspec

from core.errors import UsageError
from deploy.host import Host, Hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from deploy.gateways import Gateway

    Render = Callable[[str, Gateway, Hosts, str, str], str]
    """The configuration of a gateway, by its name, in front of hosts; the folders of its secrets and its sockets."""

IMAGE = "haproxy:3.0"
"""Docker's official image. Its HAProxy has what Debian's has: OpenSSL and PCRE2."""
PORT = 8443
"""The gateway's port in its pod, which has no right to one below 1024."""
SECRETS, RUN, CONFIGURATION = "/etc/gateway/secrets", "/run/gateway", "/etc/gateway/haproxy.cfg"

_RESOLVERS = """
# Pods change their addresses. Their names stay, and need no pod that is ready.
resolvers cluster
    parse-resolv-conf
    hold valid 5s
"""


def objects(
    name: str, gateway: Gateway, pods: Mapping[str, Sequence[str]], user: int, render: Render
) -> Iterator[dict[str, Any]]:
    """The objects of a gateway; `pods` are the pods of each host, as `POD.SERVICE`. Raises UsageError."""
    title = "gateway-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    labels = {"app.kubernetes.io/component": "gateway", "app.kubernetes.io/instance": title}
    text = configuration(name, gateway, pods, render)

    def made(api: str, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"apiVersion": api, "kind": kind, "metadata": {"name": title, "labels": labels}, **content}

    yield made("v1", "ConfigMap", {"data": {"haproxy.cfg": text}})
    template = {
        "metadata": {
            "labels": labels,
            # another configuration starts another pod
            "annotations": {"hearth/configuration": hashlib.sha256(text.encode()).hexdigest()[:16]},
        },
        "spec": _pod(title, user),
    }
    deployment = {"selector": {"matchLabels": labels}, "strategy": {"type": "Recreate"}, "template": template}
    # one: who uses which pod, logins and limits are in its memory
    yield made("apps/v1", "Deployment", {"spec": {"replicas": 1, **deployment}})
    service = {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",  # logins are limited by people's own addresses
        "selector": labels,
        "ports": [{"name": "https", "port": gateway.port, "targetPort": "https"}],
    }
    yield made("v1", "Service", {"spec": service})
    names = {"ports": [{"port": 53, "protocol": each} for each in ("UDP", "TCP")]}
    comfyui = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "comfyui"}}}
    network = {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"port": "https"}]}],
        "egress": [{"to": [comfyui], "ports": [{"port": "http"}]}, names],
    }
    yield made("networking.k8s.io/v1", "NetworkPolicy", {"spec": network})


def configuration(name: str, gateway: Gateway, pods: Mapping[str, Sequence[str]], render: Render) -> str:
    """The gateway's configuration, with pods in place of hosts. Raises UsageError."""
    for person, each in sorted(gateway.users.items()):
        if len(pods.get(each.host, "1")) != 1:
            what = f"{person} uses only host {each.host}, which has {len(pods[each.host])} pods"
            raise UsageError("usage", what, hint="leave out the person's `host`, or use --gpus 1")
    named = {pod.partition(".")[0]: pod for each in pods.values() for pod in each}
    # The renderer wants addresses: these are reserved for examples (RFC 5737), and replaced below.
    behind = {pod: Host(listen="192.0.2.1") for pod in named}
    people = {
        person: msgspec.structs.replace(each, host=pods[each.host][0].partition(".")[0] if each.host else "")
        for person, each in gateway.users.items()
    }
    inside = msgspec.structs.replace(
        gateway,
        host="",
        behind=tuple(behind),
        listen="0.0.0.0",  # noqa: S104  the pod's own network
        port=PORT,
        users=people,
    )
    own = Host(address="the gateway's own pod")  # no pod of ComfyUI's
    text = render(name, inside, Hosts(hosts={**behind, inside.host: own}), SECRETS, RUN)
    # HAProxy replaces variables only in double quotes.
    at = r'    server \1 "%s.${NAMESPACE}.svc.${CLUSTER_DOMAIN}:\2" resolvers cluster init-addr none'
    for pod, service in named.items():
        text, count = re.subn(rf"^    server ({re.escape(pod)}) 192\.0\.2\.1:(\d+)$", at % service, text, flags=re.M)
        assert count, pod
    return text + _RESOLVERS


def unprivileged(user: int) -> dict[str, Any]:
    """What all pods have: a user without rights, on the node and in the cluster."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _pod(title: str, user: int) -> dict[str, Any]:
    probe = {"tcpSocket": {"port": "https"}, "periodSeconds": 10}
    namespace = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    container = {
        "name": "haproxy",
        "image": IMAGE,
        "command": ["haproxy", "-W", "-db", "-f", CONFIGURATION, "-f", f"{SECRETS}/users.cfg"],
        "env": [
            {"name": "NAMESPACE", "valueFrom": namespace},
            {"name": "CLUSTER_DOMAIN", "value": "cluster.local"},
        ],
        "ports": [{"name": "https", "containerPort": PORT}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"limits": {"memory": "1Gi"}},
        "readinessProbe": probe,
        "livenessProbe": {**probe, "failureThreshold": 6},
        "volumeMounts": [
            {"name": "configuration", "mountPath": CONFIGURATION, "subPath": "haproxy.cfg", "readOnly": True},
            {"name": "secrets", "mountPath": SECRETS, "readOnly": True},
            {"name": "run", "mountPath": RUN},
        ],
    }
    return {
        **unprivileged(user),
        "containers": [container],
        "volumes": [
            {"name": "configuration", "configMap": {"name": title}},
            # users.cfg, tokens.map and certificate.pem
            {"name": "secrets", "secret": {"secretName": title, "defaultMode": 0o440}},
            {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        ],
    }
