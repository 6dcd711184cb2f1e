"""Container images of a release: an OCI image layout, its SBOM, and the files that run it with Podman or Docker."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.manifest import ReleaseManifest
from core import console, files, shell, tools, workspace
from core.arch import known_archs
from core.debian import ARCHITECTURES
from core.errors import ImageError, UsageError
from core.stack import Platform
from deploy import container_refusals
from deploy import host as hosts
from deploy import release as releases
from deploy import release_refusals as refusals
from deploy.image_layout import NAME, Layout
from deploy.image_parts import CONTAINER, ENV, PREFIX, layers
from deploy.inputs import gather
from deploy.refusals import refused
from deploy.selection import Selection, unseen
from lock import image_base, sbom
from lock.updates import transaction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deploy.host import Host, Target

SBOM = "application/vnd.cyclonedx+json"
PORT = 8188
"""ComfyUI's port in the container; run.sh and compose.yaml publish it as the host's `port`."""
NOTHING = "no image was written"


@dataclass(frozen=True)
class Image:
    """A written image: its name with tag, its digest, and each layer's bytes."""

    path: Path
    name: str
    digest: str
    platform: str
    sbom: str
    layers: Mapping[str, int]


def find_target(host: str, profile: str) -> Target:
    """The host that an image is for, or any machine of a profile; raises UsageError."""
    if host and profile:
        raise UsageError("usage", "--host and --profile exclude each other", hint="a host has a profile of its own")
    if host or not profile:
        (name,) = hosts.select(host, "")
        return hosts.target(name)
    return hosts.of(profile, hosts.Host(profile=profile))


@transaction.reading()
def write(target: Target, platform: str, output: Path | None) -> Image:
    """Write the image of what a host would get; an unchanged part of an earlier image in `output` stays.

    `platform` is by default the usual one of the profile's GPU, or this machine's. Raises RefusedError for what an
    image cannot contain.
    """
    arch = target.profile.arch
    usual = known_archs()[arch].platform if arch in known_archs() else Platform.local().value
    wanted = Platform.parse(platform or usual)
    selection = _select(target, wanted)
    place = output or Path(f"{target.name}-{selection.application.version}-{wanted.value}.image")
    here = workspace.current()
    waiting = lambda: console.say("another image is being written; waiting for it to end")  # noqa: E731
    with here.reading(), files.locked(here.cache / "layers/lock", waiting):
        return _write(target.host, selection, place)


def _select(target: Target, platform: Platform) -> Selection:
    """What the image contains; raises RefusedError."""
    base = image_base.base()
    host = msgspec.structs.replace(
        target.host,
        scope="system",
        prefix=f"/{PREFIX}",
        listen="0.0.0.0",  # noqa: S104  only the published port is reachable
        port=PORT,
        secrets=(),
        mounts={},
    )
    target = hosts.Target(target.name, host, target.profile_name, target.profile, target.origin)
    inputs = gather(target)
    wheels = unseen(target, inputs, platform.value, base.python, NOTHING)
    lock = inputs.locks[platform.value, base.python]
    found = container_refusals.image(target, inputs)
    found += [each for wheel in wheels for each in refusals.old_libraries(wheel, base)]
    left = {name: lock.unavailable[name] for name in inputs.nodes if name in lock.unavailable}
    found += [
        refusals.unavailable_node(f"node {name}: {why}") for name, why in left.items() if inputs.nodes[name].required
    ]
    if found:
        raise refused(NOTHING, found)
    for name, why in left.items():
        console.say(f"left out: node {name} is not available for {lock.name}: {why}")
    if target.profile.network != "open":
        console.say(f'network = "{target.profile.network}" does not limit a container: use a network of the engine')
    return Selection(
        target=target,
        application=inputs.application,
        lock=lock,
        python=base.python,
        interpreter=f"/usr/bin/python{base.python}",
        wheels=tuple(wheels),
        uv=inputs.uv,
        nodes={name: node for name, node in inputs.nodes.items() if name not in left},
        model_folders=inputs.model_folders,
    )


def _write(host: Host, selection: Selection, place: Path) -> Image:
    manifest = releases.manifest(selection, f"/{PREFIX}")
    layout = Layout(place / "image", workspace.current().cache / "layers")
    platform = Platform.parse(manifest.platform)
    architecture, tag = ARCHITECTURES[platform], f"{manifest.version.replace('+', '-')}-{manifest.id}"
    name = f"localhost/hearth/{selection.target.host.service}:{tag}"
    made = {}
    for what, (key, entries) in layers(selection, manifest).items():
        made[what] = layout.layer(key, entries)
        console.say(f"layer {what}: {console.size(made[what]['size'])}")
    image = layout.image(made, _config(manifest, selection), architecture, _annotations(manifest))
    groups = ("base", "compiler") if "compiler" in made else ("base",)
    packages = {each: at for group in groups for each, (at, _) in image_base.locked(platform, group).items()}
    bill = layout.referrer(image, sbom.write(manifest, packages, architecture).encode(), SBOM)
    # Registries without the referrers API list them under this tag (distribution-spec, "Referrers Tag Schema").
    listed = layout.index([bill])
    found = [
        {**image, "annotations": {NAME: tag}},
        {**listed, "annotations": {NAME: image["digest"].replace(":", "-")}},
    ]
    layout.finish(found, name)
    for each, text in _texts(host, selection, manifest, name).items():
        files.write(place / each, text)
    (place / "run.sh").chmod(0o755)
    sizes = {what: each["size"] for what, each in made.items()}
    return Image(place, name, image["digest"], platform.value, bill["digest"], sizes)


def _config(manifest: ReleaseManifest, selection: Selection) -> dict[str, Any]:
    """How the image runs, for engines that read it."""
    second = 1_000_000_000
    environment = {"PATH": f"/{ENV}/bin:/usr/bin:/usr/sbin", **manifest.environment}
    return {
        "User": f"{image_base.USER}:{image_base.USER}",
        "Env": [f"{key}={value}" for key, value in environment.items()],
        "Entrypoint": [f"/{ENV}/bin/python", f"/{CONTAINER}", "start"],
        "WorkingDir": "/",
        "ExposedPorts": {f"{PORT}/tcp": {}},
        "Volumes": {f"/{PREFIX}/data": {}},
        "StopSignal": "SIGINT",
        "Labels": _annotations(manifest),
        "Healthcheck": {  # Docker's addition to the format
            "Test": ["CMD-SHELL", _HEALTH],
            "Interval": 10 * second,
            "Timeout": 10 * second,
            "Retries": 3,
            "StartPeriod": selection.target.profile.start_seconds * second,
        },
    }


_HEALTH = f"/{ENV}/bin/python -I -S /{CONTAINER} health"


def _annotations(manifest: ReleaseManifest) -> dict[str, str]:
    git: Mapping[str, str] = next((each for each in manifest.sources if "git" in each), {})
    named = {
        "title": "ComfyUI",
        "description": f"ComfyUI {manifest.version} with torch {manifest.torch}, written by Hearth",
        "version": manifest.version,
        "source": git.get("git", ""),
        "revision": git.get("commit", ""),
        "licenses": "GPL-3.0-only",
    }
    found = {f"org.opencontainers.image.{key}": value for key, value in named.items() if value}
    kernels = " ".join(f"{name}={version}" for name, version in manifest.kernels.items())
    own = {"release": manifest.id, "profile": manifest.profile, "stack": manifest.stack, "kernels": kernels}
    return found | {f"hearth.{key}": value for key, value in own.items() if value}


class _Text(Template):
    delimiter = "@"


def _texts(host: Host, selection: Selection, manifest: ReleaseManifest, name: str) -> dict[str, str]:
    """run.sh and compose.yaml, with the host's port, folders and GPU."""
    volumes = [f"{path}:{path}" for path in host.folders.values()]
    volumes += [f"{path}:{path}:ro" for path in host.model_roots]
    volumes += [f"{value}:{value}:ro" for value in selection.target.flags.values() if value.startswith("/")]
    ports = [f"{f'[{each}]' if ':' in each else each}:{host.port}:{PORT}" for each in host.listen.split(",")]
    devices = ["nvidia.com/gpu=all"] if selection.target.profile.cuda else []
    options = {"volume": volumes, "publish": ports, "device": devices}
    words = [f"--{option} {shlex.quote(value)}" for option, values in options.items() for value in values]
    lines = [f"      - {json.dumps(each)}" for each in volumes]
    lines += [f"    ports: {json.dumps(ports)}"]
    if devices:  # `devices: [nvidia.com/gpu=all]` is a path for Debian 13's Compose (2.26)
        cdi = {"driver": "cdi", "device_ids": devices, "capabilities": ["gpu"]}
        lines += [f"    deploy: {json.dumps({'resources': {'reservations': {'devices': [cdi]}}})}"]
    values = {
        "title": f"ComfyUI {manifest.version}, release {manifest.id}",
        "service": host.service,
        "image": name,
        "tag": name.rpartition(":")[2],
        "cpu": Platform.parse(manifest.platform).cpu,
        "user": image_base.USER,
        "data": f"/{PREFIX}/data",
        "health": _HEALTH,
        "seconds": selection.target.profile.start_seconds,
        "run_options": " ".join(words),
        "compose_options": "\n".join(lines),
        **_memory(selection.target.profile.memory_max),
    }
    recipes = workspace.current().checkout / "recipes/image"
    return {each: _Text((recipes / each).read_text()).substitute(values) for each in ("run.sh", "compose.yaml")}


def _memory(limit: str) -> dict[str, str]:
    """The default memory limit, from a unit's `MemoryMax=`. Compose cannot compute a part of the machine's memory."""
    if limit.endswith("%"):
        share = f"""$(awk '/^MemTotal/ {{ printf "%dk", $2 * {float(limit[:-1]) / 100:g} }}' /proc/meminfo)"""
        why = "?set it, such as 24g"
        return {"memory_text": f"{limit} of the machine's", "memory_shell": share, "memory_compose": why}
    amount = "0" if limit in ("", "infinity") else limit.lower()
    return {"memory_text": amount, "memory_shell": amount, "memory_compose": f"-{amount}"}


def push(image: Image, repository: str) -> str:
    """Copy an image and its SBOM to a repository of a registry, with skopeo; return the image's address there.

    The bytes stay, so the digest does too; skopeo sends only the layers that the registry lacks. Raises ImageError.
    """
    if not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+", repository):
        hint = "name the registry and a repository, such as registry.example.org/anna/comfyui"
        raise UsageError("usage", f"{repository!r} is not a repository of a registry", hint=hint)
    plain = re.match(r"(localhost|127\.[0-9.]+)[:/]", repository)  # as in Docker
    secure = ["--dest-tls-verify=false"] if plain else []
    tag = image.name.rpartition(":")[2]
    # skopeo 1.9 writes an index anew, without what it does not know; what the index lists keeps its digest.
    for each, keep in ((tag, ["--preserve-digests"]), (image.digest.replace(":", "-"), [])):
        to = f"{repository}:{each}"
        console.say(f"sending {to}")
        words = ["copy", "--quiet", "--all", *keep, *secure, f"oci:{image.path / 'image'}:{each}", f"docker://{to}"]
        done = tools.skopeo(*words)
        if done.returncode:
            denied = re.search(r"unauthorized|denied|authentication required", done.stderr)
            hint = f"skopeo login {repository.partition('/')[0]}" if denied else "run the same command again"
            raise ImageError("registry", f"{to} was not accepted", cause=shell.last_words(done, 3), hint=hint)
    return f"{repository}@{image.digest}"


def rows(image: Image, pushed: str) -> list[str]:
    """What was written, and how to run it."""
    whole = sum(image.layers.values())
    cells = [
        ("image", f"{image.name}, {image.platform}"),
        ("digest", image.digest),
        ("SBOM", image.sbom),
        ("layers", f"{len(image.layers)}, {console.size(whole)}"),
        *([("registry", pushed)] if pushed else []),
        ("run", f"sh {shlex.quote(str(image.path / 'run.sh'))} podman, or docker; or docker compose with compose.yaml"),
    ]
    return console.table(("", ""), cells)
