"""Releases: the manifest of everything that runs, with the unit's text. A release's id is the hash of its manifest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from agent.schema.manifest import Gate, KernelWheel, NodeSource, ReleaseManifest
from core.errors import HostError
from deploy import containers, units
from lock.requirements import MANAGER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from core.manifest import Manifest
    from core.source import Source
    from deploy.host import Target
    from deploy.selection import Selection

# The flags that select an attention, and ComfyUI's log line when it is used (comfy/ldm/modules/attention.py).
ATTENTION = {
    "--use-sage-attention": "sage attention",
    "--use-flash-attention": "Flash Attention",
    "--use-pytorch-cross-attention": "pytorch attention",
}

TLS_FLAGS = ("--tls-keyfile", "--tls-certfile")
"""With both, ComfyUI serves https. With only one, it silently serves http."""

# Importing these modules proves that a kernel package's extension modules load in the environment.
IMPORTS = {"sageattention": ("sageattention",), "flash-attn": ("flash_attn", "flash_attn_2_cuda")}


# Settings of ComfyUI-Manager. They are part of the release, so the service cannot change them.
MANAGER_INI = """\
# Written by Hearth; a deploy replaces it.
[default]
# nothing may be installed, updated or removed: any weaker level trusts all of a proxy on the same host
security_level = strong
# nothing is fetched at start
network_mode = offline
# the journal has the log
file_logging = False
# the environment has no pip; Manager lists its packages with uv, and does not start where it cannot
use_uv = True
allow_git_url_install = False
allow_pip_install = False
"""


def manager(target: Target) -> bool:
    """Whether ComfyUI-Manager is enabled by ComfyUI's own flag."""
    return any(flag.startswith("--enable-manager") for flag in target.flags)


def requesters(target: Target, nodes: Iterable[str]) -> list[str]:
    """The requesters of packages in addition to ComfyUI: the nodes and ComfyUI-Manager."""
    return [*nodes, *([MANAGER] if manager(target) else [])]


def digest(value: object) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def manifest(selection: Selection, prefix: str) -> ReleaseManifest:
    """The release's manifest. The same selection gives the same id on any host and date."""
    target, profile = selection.target, selection.target.profile
    content = ReleaseManifest(
        version=selection.application.version,
        stack=target.stack.name,
        torch=target.stack.torch,
        python=selection.python,
        platform=selection.lock.platform,
        profile=target.profile_name,
        parts={
            **({"base": selection.base_part} if selection.base_part else {}),
            "app": selection.app_part,
            "env": selection.env_part,
            **{f"custom_nodes/{name}": part for name, part in selection.node_parts.items()},
        },
        sources=tuple(_source(each) for each in selection.application.source),
        tree=selection.application.tree,
        packages=selection.lock.versions(selection.requesters),
        nodes={name: NodeSource(node.url, node.commit, node.tree) for name, node in selection.pinned.items()},
        kernels={wheel.kernel: wheel.version for wheel in selection.wheels},
        wheels={wheel.kernel: _wheel(wheel) for wheel in selection.wheels},
        gate=Gate(
            seconds=profile.start_seconds,
            version=selection.application.version,
            torch=target.stack.torch,
            cuda=profile.cuda,
            attention=next((log for flag, log in ATTENTION.items() if flag in target.flags), ""),
            required=tuple(name for name, node in selection.pinned.items() if node.required),
            imports=tuple(name for wheel in selection.wheels for name in IMPORTS.get(wheel.kernel, ())),
        ),
    )
    same, unused = (
        msgspec.to_builtins(each) for each in (replace(content, **_running(selection, prefix, "@")), ReleaseManifest())
    )
    # A feature that is not used, such as one of a later Hearth, changes no id.
    name = digest({field: value for field, value in same.items() if value != unused[field]})
    return replace(content, id=name, **_running(selection, prefix, name))


def _source(source: Source) -> dict[str, str]:
    """A source's non-empty fields."""
    return {name: value for name, value in msgspec.to_builtins(source).items() if value}


def _wheel(wheel: Manifest) -> KernelWheel:
    """A kernel wheel's file, with its compilers if its own manifest names them (`kernels.toolchain`)."""
    stack, toolchain = wheel.inputs.get("stack", ()), wheel.inputs.get("toolchain", {})
    cuda = str(stack[2]) if len(stack) > 2 else ""
    compilers = {name: toolchain[name] for name in ("cuda", "cxx") if name in toolchain}
    return KernelWheel(wheel.file, wheel.sha256, wheel.arch, cuda, compilers)


def require_complete(manifest: ReleaseManifest) -> ReleaseManifest:
    """Return the manifest; raises HostError if it has no list of packages."""
    if manifest.packages is None:
        raise HostError(
            "old-release",
            f"the manifest of release {manifest.id} does not list its packages and wheels",
            cause="an older Hearth made it",
            hint="run inv deploy, which writes a new release with the same parts and the list",
        )
    return manifest


def _running(selection: Selection, prefix: str, release: str) -> dict[str, Any]:
    """The fields with paths of the release's folder: the command line, environment and unit.

    They use the release's path, not `current`, so that files of two releases are never mixed.
    """
    target = selection.target
    place, data = f"{prefix}/releases/{release}", f"{prefix}/data"
    lies = {name: f"{data}/{name}" for name in ("input", "output", "user")} | target.host.folders
    files: dict[str, str] = {}
    # The other folders of the base directory; some nodes look for them two levels up.
    links = {name: f"{data}/{name}" for name in ("models", "temp", "datasets")} | lies
    links["web"] = f"{data}/comfyui/web"
    developed = units.developed(target, place)
    binds = units.binds(target, developed)
    empty = ["custom_nodes", *(f"custom_nodes/{name}" for name in developed if binds)]
    links |= {f"custom_nodes/{name}": path for name, path in developed.items() if not binds}
    more = [*binds, *units.credentials(selection, prefix)]
    made: list[str] = []
    if manager(target):
        # Its settings, and scripts that it runs before ComfyUI, are in the user folder. So the release has its own
        # user folder, with links into the data for writable files.
        user = links.pop("user")
        lies["user"] = f"{place}/user"
        files["user/__manager/config.ini"] = MANAGER_INI
        empty.append("user/__manager/startup-scripts")
        kept = ("default", *(f"__manager/{name}" for name in ("cache", "snapshots", "batch_history", "channels.list")))
        links |= {f"user/{name}": f"{user}/{name}" for name in kept}
        made = [f"{user}/{name}" for name in kept if not name.endswith(".list")]
        more.append(f"ExecStartPre=-{units.command_line(['/bin/mkdir', '-p', *made])}")
    if paths := _search_paths(selection):
        files["paths.yaml"] = json.dumps(paths, indent=1) + "\n"  # JSON is YAML
    argv = _argv(target, place, data, lies, search=bool(paths))
    environment = _environment(target, data)
    if selection.base_part:
        confined = containers.confinement(selection, made)
    else:
        confined = units.confinement(selection, prefix, place)
    files |= _units(selection, [*confined, *argv], environment, prefix, release, developed, more)
    return {
        "code": f"{place}/app",
        "argv": tuple(argv),
        "environment": environment,
        "files": files,
        "links": links,
        "empty": tuple(empty),
        "confined": tuple(confined),
        # read by the supervisor, which does this itself, and by the units' processes
        "develop": tuple(developed.values()),
        "free_memory": target.host.free_seconds,
    }


def _units(
    selection: Selection,
    command: list[str],
    environment: dict[str, str],
    prefix: str,
    release: str,
    developed: dict[str, str],
    more: list[str],
) -> dict[str, str]:
    """The texts of the unit, or of the container, and of its companions, by the names of their files."""
    target = selection.target
    if selection.base_part:
        tls = all(flag in target.flags for flag in TLS_FLAGS)
        kind = "container"
        text = containers.unit(selection, command, environment, prefix, release, developed, tls=tls)
    else:
        kind = "service"
        text = units.service(selection, command, environment, f"{prefix}/data", release, more)
    companions = units.companions(selection, prefix, release, developed)
    service = target.host.service
    return {f"{service}.{kind}": text} | {f"{service}-{name}": text for name, text in companions.items()}


def _argv(target: Target, place: str, data: str, lies: Mapping[str, str], *, search: bool) -> list[str]:
    """ComfyUI's command line; `search` is true if the release has additional model folders."""
    # ComfyUI imports everything in custom_nodes of its base directory, so that is the release, not the data.
    argv = [f"{place}/env/bin/python", f"{place}/app/main.py", "--base-directory", place]
    argv += ["--temp-directory", data]  # ComfyUI adds /temp
    argv += [word for name, path in sorted(lies.items()) for word in (f"--{_DIRECTORY[name]}", path)]
    argv += ["--database-url", f"sqlite:///{data}/user/comfyui.db", "--disable-auto-launch"]
    argv += ["--extra-model-paths-config", f"{place}/paths.yaml"] if search else []
    argv += ["--listen", target.host.listen, "--port", str(target.host.port)]
    return argv + [word for flag, value in target.flags.items() for word in (flag, *value.split())]


def _environment(target: Target, data: str) -> dict[str, str]:
    """The service's environment variables."""
    # A system unit has a /tmp of its own on the disk; a container's is in memory.
    own_tmp = target.host.scope == "user" or target.host.runtime == "podman"
    return {
        "HOME": f"{data}/cache",  # for libraries' caches and settings; the service has no other home
        "XDG_CACHE_HOME": f"{data}/cache",
        "TRITON_CACHE_DIR": f"{data}/cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{data}/cache/inductor",
        "PYTHONUNBUFFERED": "1",  # log lines appear immediately
        "PYTHONDONTWRITEBYTECODE": "1",  # the code is read-only
        "PYTHONNOUSERSITE": "1",  # only the release's packages
        # No installation at start: only locked packages run. A system unit also hides the programs.
        "PIP_NO_INDEX": "1",
        "UV_OFFLINE": "1",
        "GIT_PYTHON_REFRESH": "quiet",  # nodes without use for git import GitPython, which fails without one
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        **({"TMPDIR": f"{data}/cache/tmp"} if own_tmp else {}),
        **target.env,
    }


# ComfyUI's flags for data folders.
_DIRECTORY = {name: f"{name}-directory" for name in ("models", "input", "output", "user")}

OWN_FLAGS = {
    *("--base-directory", "--temp-directory", "--database-url", "--disable-auto-launch", "--listen", "--port"),
    *("--extra-model-paths-config", *(f"--{name}" for name in _DIRECTORY.values())),
}
"""Flags that a release sets in addition to those of its profile, modes and host."""


def _search_paths(selection: Selection) -> dict[str, dict[str, str]]:
    """ComfyUI's extra search paths: the host's additional model folders."""
    kinds = {kind: "\n".join(names) for kind, names in selection.model_folders.items()}
    return {root: {"base_path": root} | kinds for root in selection.target.host.model_roots}
