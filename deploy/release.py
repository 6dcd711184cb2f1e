"""Releases: the manifest of all that runs, with its unit's text. A release's id is the hash of its manifest."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from string import Template
from typing import TYPE_CHECKING, Any

import msgspec

from core import workspace
from core.errors import OldReleaseError
from deploy.host import mount_unit
from lock.requirements import MANAGER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from core.manifest import Manifest
    from core.source import Source
    from deploy.exporter import Exporter
    from deploy.host import Profile, Target
    from lock.application import Application
    from lock.nodes import Node
    from lock.requirements import LockedList

LAYOUT = 4
"""Raised when the agent makes parts or releases another way: what is there is then not what is wanted."""

# The flag that chooses an attention, and what ComfyUI logs when it is used (comfy/ldm/modules/attention.py).
ATTENTION = {
    "--use-sage-attention": "sage attention",
    "--use-flash-attention": "Flash Attention",
    "--use-pytorch-cross-attention": "pytorch attention",
}

TLS_FLAGS = ("--tls-keyfile", "--tls-certfile")
"""With both, ComfyUI speaks https; with one of them it stays with http, and says nothing."""

# What importing a kernel package proves: its extension modules load in that environment.
IMPORTS = {"sageattention": ("sageattention",), "flash-attn": ("flash_attn", "flash_attn_2_cuda")}


# Settings of ComfyUI-Manager that the service cannot change: they lie in the release.
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
    """Whether ComfyUI-Manager is on: a flag of ComfyUI's own says so."""
    return any(flag.startswith("--enable-manager") for flag in target.flags)


def asking(target: Target, nodes: Iterable[str]) -> list[str]:
    """Whose packages are needed beside ComfyUI's: the nodes' and ComfyUI-Manager's."""
    return [*nodes, *([MANAGER] if manager(target) else [])]


@dataclass(frozen=True)
class Choice:
    """What is to run on a host: everything that decides a release, chosen from what there is."""

    target: Target
    application: Application
    lock: LockedList
    python: str
    interpreter: str
    wheels: tuple[Manifest, ...]
    uv: str
    nodes: Mapping[str, Node]
    model_folders: Mapping[str, Sequence[str]]
    exporter: Exporter
    secrets: Mapping[str, str] = field(default_factory=dict)

    @property
    def app_part(self) -> str:
        """The part that holds ComfyUI's tree."""
        return f"app-{_digest([LAYOUT, self.application.tree, self.application.writable])}"

    @property
    def env_part(self) -> str:
        """The part that holds the virtual environment."""
        wheels = sorted(wheel.sha256 for wheel in self.wheels)
        return f"env-{_digest([LAYOUT, self._locked, self.interpreter, wheels, self.uv])}"

    @property
    def pinned(self) -> dict[str, Node]:
        """The nodes that run as they are pinned; one under development takes the place of its namesake."""
        return {name: node for name, node in self.nodes.items() if name not in self.target.host.developed}

    @property
    def node_parts(self) -> dict[str, str]:
        """The parts that hold the nodes' trees, by the node's name."""
        return {
            # what an install.py does depends on the environment that runs it
            name: f"node-{_digest([LAYOUT, name, node.tree, node.writable, self._installs(node)])}"
            for name, node in self.pinned.items()
        }

    def _installs(self, node: Node) -> list[str]:
        """What a node's install.py depends on: the environment that runs it, and whether it has the network."""
        return [self.env_part, str(bool(node.install_network))] if node.install else []

    @property
    def exporter_part(self) -> str:
        """The part that exports metrics; empty where they are not wanted."""
        wanted = self.target.host.metrics_port
        return f"exporter-{_digest([LAYOUT, self.exporter.digest, self.interpreter])}" if wanted else ""

    @property
    def asking(self) -> list[str]:
        """Whose packages are needed beside ComfyUI's."""
        return asking(self.target, self.nodes)

    @cached_property
    def _locked(self) -> str:
        return self.lock.select(self.asking)

    @property
    def requirements(self) -> str:
        """The locked list, as far as it is needed, with the kernel wheels, each by its hash."""
        lines = [f"{wheel.kernel}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in self.wheels]
        return self._locked + "".join(f"{line}\n" for line in lines)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def manifest(choice: Choice, prefix: str) -> dict[str, Any]:
    """The release's manifest, in JSON's types. The same choice gives the same id on every host and day."""
    target, profile = choice.target, choice.target.profile
    content: dict[str, Any] = {
        "version": choice.application.version,
        "stack": profile.stack,
        "torch": target.stack.torch,
        "python": choice.python,
        "platform": choice.lock.platform,
        "profile": target.profile_name,
        "parts": {
            "app": choice.app_part,
            "env": choice.env_part,
            **({"exporter": choice.exporter_part} if choice.exporter_part else {}),
            **{f"custom_nodes/{name}": part for name, part in choice.node_parts.items()},
        },
        "sources": [_source(each) for each in choice.application.source],
        "tree": choice.application.tree,
        "packages": choice.lock.versions(choice.asking) | (choice.exporter.packages if choice.exporter_part else {}),
        "nodes": {
            name: {"url": node.url, "commit": node.commit, "tree": node.tree} for name, node in choice.pinned.items()
        },
        "kernels": {wheel.kernel: wheel.version for wheel in choice.wheels},
        "wheels": {wheel.kernel: _wheel(wheel) for wheel in choice.wheels},
        "gate": {
            "seconds": profile.start_seconds,
            "version": choice.application.version,
            "torch": target.stack.torch,
            "cuda": profile.cuda,
            "attention": next((log for flag, log in ATTENTION.items() if flag in target.flags), ""),
            "required": [name for name, node in choice.pinned.items() if node.required],
            "imports": [name for wheel in choice.wheels for name in IMPORTS.get(wheel.kernel, ())],
        },
    }
    for name in ("@", _digest([content, _running(choice, prefix, "@")])):
        content |= {"id": name, **_running(choice, prefix, name)}
    return content


def _source(source: Source) -> dict[str, str]:
    """Where a tree can be had: what is said of the source, without what is not."""
    return {name: value for name, value in msgspec.to_builtins(source).items() if value}


def _wheel(wheel: Manifest) -> dict[str, Any]:
    """A kernel wheel: its file, and what compiled it as far as its own manifest says (`kernels.toolchain`)."""
    stack, toolchain = wheel.inputs.get("stack", ()), wheel.inputs.get("toolchain", {})
    return {
        "file": wheel.file,
        "sha256": wheel.sha256,
        "arch": wheel.arch,
        "cuda": str(stack[2]) if len(stack) > 2 else "",
        "compilers": {name: toolchain[name] for name in ("cuda", "cxx") if name in toolchain},
    }


def told(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest, when it names all that the release holds; raises OldReleaseError."""
    if "packages" not in manifest:
        raise OldReleaseError(
            f"release {manifest['id']} does not say which packages and wheels it holds",
            cause="an older Hearth made it",
            hint="inv deploy writes a new release of the same parts, which does",
        )
    return manifest


def _running(choice: Choice, prefix: str, release: str) -> dict[str, Any]:
    """Command line, environment and unit, with the release's own folder in them.

    They name the release and not `current`, so that nothing of one release ever runs with something of another.
    """
    target = choice.target
    place, data = f"{prefix}/releases/{release}", f"{prefix}/data"
    lies = {name: f"{data}/{name}" for name in ("input", "output", "user")} | target.host.folders
    files: dict[str, str] = {}
    # The base directory's other folders; some nodes look for them two levels above themselves.
    links = {name: f"{data}/{name}" for name in ("models", "temp", "datasets")} | lies
    links["web"] = f"{data}/comfyui/web"
    developed = _developed(target, place)
    binds = _binds(target, developed)
    empty = ["custom_nodes", *(f"custom_nodes/{name}" for name in developed if binds)]
    links |= {f"custom_nodes/{name}": path for name, path in developed.items() if not binds}
    more = [*binds, *_credentials(choice, prefix)]
    if manager(target):
        # Its settings, and scripts that it runs before ComfyUI, lie in the user folder: so that is the release's, and
        # leads to the data's for what is written.
        user = links.pop("user")
        lies["user"] = f"{place}/user"
        files["user/__manager/config.ini"] = MANAGER_INI
        empty.append("user/__manager/startup-scripts")
        kept = ("default", *(f"__manager/{name}" for name in ("cache", "snapshots", "batch_history", "channels.list")))
        links |= {f"user/{name}": f"{user}/{name}" for name in kept}
        made = [f"{user}/{name}" for name in kept if not name.endswith(".list")]
        more.append(f"ExecStartPre=-{_command(['/bin/mkdir', '-p', *made])}")
    # ComfyUI imports whatever lies in custom_nodes of its base directory: so that is the release, and not the data.
    argv = [f"{place}/env/bin/python", f"{place}/app/main.py", "--base-directory", place]
    argv += ["--temp-directory", data]  # temp in it
    argv += [word for name, path in sorted(lies.items()) for word in (f"--{_DIRECTORY[name]}", path)]
    argv += ["--database-url", f"sqlite:///{data}/user/comfyui.db", "--disable-auto-launch"]
    if paths := _search_paths(choice):
        files["paths.yaml"] = json.dumps(paths, indent=1) + "\n"  # JSON is YAML
        argv += ["--extra-model-paths-config", f"{place}/paths.yaml"]
    argv += ["--listen", target.host.listen, "--port", str(target.host.port)]
    argv += [word for flag, value in target.flags.items() for word in (flag, *value.split())]
    environment = {
        "HOME": f"{data}/cache",  # libraries put caches and settings there; the service has no other
        "XDG_CACHE_HOME": f"{data}/cache",
        "TRITON_CACHE_DIR": f"{data}/cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{data}/cache/inductor",
        "PYTHONUNBUFFERED": "1",  # the log shows a line when it is written
        "PYTHONDONTWRITEBYTECODE": "1",  # the code is read-only
        "PYTHONNOUSERSITE": "1",  # nothing but the release's own packages
        # Nothing is installed at start: the lock is all that runs. A system service's unit also hides the programs.
        "PIP_NO_INDEX": "1",
        "UV_OFFLINE": "1",
        "GIT_PYTHON_REFRESH": "quiet",  # GitPython is imported by nodes that need no git, and would stop without one
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        **({"TMPDIR": f"{data}/cache/tmp"} if target.host.scope == "user" else {}),  # a unit has a /tmp of its own
        **target.env,
    }
    running = {"code": f"{place}/app", "argv": argv, "environment": environment, "files": files, "links": links}
    running["empty"] = empty
    confined = _confined(choice, prefix, place)
    running |= {"confined": confined} if confined else {}
    files[f"{target.host.service}.service"] = _unit(choice, [*confined, *argv], environment, data, release, more)
    if choice.exporter_part:
        told = {"site": target.site | {"prefix": prefix}, "argv": argv, "port": target.host.metrics_port}
        told["cuda"] = target.profile.cuda
        files["exporter.json"] = json.dumps(told, indent=1) + "\n"
    for name, text in _companions(choice, prefix, release, developed).items():
        files[f"{target.host.service}-{name}"] = text
    # what a supervisor does itself, and a unit's process has to know
    running |= {"develop": list(developed.values())} if developed else {}
    return running | ({"free_memory": target.host.free_seconds} if target.host.free_memory else {})


def _credentials(choice: Choice, prefix: str) -> list[str]:
    """What hands the unit its secrets (systemd.exec(5), Credentials), as each is kept on the host."""
    if choice.target.host.scope == "user":
        return []
    kinds = {"encrypted": ("LoadCredentialEncrypted", ".cred"), "plain": ("LoadCredential", "")}
    lines = ((name, *kinds[how]) for name, how in choice.secrets.items())
    return [f"{key}={name}:{prefix}/secrets/{name}{end}" for name, key, end in lines]


def _developed(target: Target, place: str) -> dict[str, str]:
    """Where the service sees nodes under development: a system's unit hides home folders, and mounts each here."""
    mounted = target.host.scope == "system"
    return {name: f"{place}/custom_nodes/{name}" if mounted else path for name, path in target.host.developed.items()}


def _binds(target: Target, developed: Mapping[str, str]) -> list[str]:
    """What mounts nodes under development; one that is not there must not keep ComfyUI from starting."""
    folders = target.host.developed
    return [f"BindReadOnlyPaths=-{folders[name]}:{at}" for name, at in developed.items() if at != folders[name]]


# ComfyUI's flags for folders of the data.
_DIRECTORY = {name: f"{name}-directory" for name in ("models", "input", "output", "user")}

OWN_FLAGS = (
    frozenset(
        f"--{name}"
        for name in ("base-directory", "temp-directory", "database-url", "disable-auto-launch", "listen", "port")
    )
    | {"--extra-model-paths-config"}
    | {f"--{name}" for name in _DIRECTORY.values()}
)
"""Flags that a release has beside those of its profile, modes and host."""


def _search_paths(choice: Choice) -> dict[str, dict[str, str]]:
    """ComfyUI's extra search paths: the host's further folders of models."""
    kinds = {kind: "\n".join(names) for kind, names in choice.model_folders.items()}
    return {root: {"base_path": root} | kinds for root in choice.target.host.model_roots}


def _confined(choice: Choice, prefix: str, place: str) -> list[str]:
    """What a command is prefixed with so that it gets its secrets, and confines itself where no system's unit does.

    That is `agent/serve/confine.py`'s work. systemd hands secrets to a service that it decrypts itself.
    """
    host = choice.target.host
    offline = choice.target.profile.network == "offline"
    told: dict[str, Any] = {"secrets": list(choice.secrets)}
    if host.scope == "user" and host.confined:
        named = [value for value in choice.target.flags.values() if value.startswith("/")]  # such as a certificate
        more = [*host.model_roots, *host.develop, *named]
        told |= {
            "folder": f"{prefix}/secrets",
            # its folders: the data's own is closed, so that none of them is replaced by a link to be opened at a start
            "write": [f"{prefix}/data/*", *host.folders.values()],
            # the models may be a link that somebody made, to a larger disk
            "read": [f"{prefix}/parts", place, f"{prefix}/data/models", *more],
            "bind": [host.port],
            "connect": [] if offline else [53, *host.connect, host.port],
            "udp": not offline,
        }
    elif not choice.secrets:
        return []
    elif host.scope == "user":
        told["folder"] = f"{prefix}/secrets"
    return [choice.interpreter, "-I", "-S", f"{place}/agent.pyz", "confine", json.dumps(told), "--"]


# What no service may reach: the machine's own neighbours by link-local addresses, and what clouds answer with
# credentials at (AWS, Azure, Google and most others use 169.254.169.254; these are the ones that are not link-local).
# systemd's word link-local is fe80::/64 alone.
_METADATA = "link-local fe80::/10 multicast 100.100.100.200 168.63.129.16 192.0.0.192 fd00:ec2::254 fd20:ce::254"

# What is nobody's on the Internet, or leads back: IANA's registries of special-purpose addresses (RFC 6890; 2025-10),
# without the loopback's and those that are global. IPv4 in IPv6 (mapped, NAT64, 6to4, Teredo) would go round the rest.
_LAN = (
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 "
    "198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 "
    "::/128 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001:db8::/32 2002::/16 "
    "3fff::/20 5f00::/16 fc00::/7 fec0::/10"
)

_NETWORK = {
    "open": f"IPAddressDeny={_METADATA}",
    "lan-deny": f"IPAddressDeny={_METADATA} {_LAN}",
    # Not "localhost", which is all of 127.0.0.0/8: at 127.0.0.53 systemd-resolved would ask others for it.
    "offline": "IPAddressDeny=any\nIPAddressAllow=127.0.0.1 ::1",
}
"""What a system service may reach, by the profile's `network` (systemd.resource-control(5), IPAddressAllow=)."""

# How names are resolved: files, and sockets of who asks others.
_NAMES = """\
BindReadOnlyPaths=-/run/systemd/resolve -/run/resolvconf -/run/NetworkManager/resolv.conf -/run/nscd
BindReadOnlyPaths=-/run/netconfig -/run/connman/resolv.conf"""


def _unit(
    choice: Choice,
    command: Sequence[str],
    environment: Mapping[str, str],
    data: str,
    release: str,
    more: Sequence[str],
) -> str:
    """The systemd unit, from the template of the host's scope, with `more` lines for what it may touch."""
    target = choice.target
    host, profile = target.host, target.profile
    lines = [f'Environment="{name}={_quoted(value)}"' for name, value in environment.items()]
    storage = f"{host.service}-storage.service"
    values = {
        "service": host.service,
        "release": release,
        "version": choice.application.version,
        "user": host.run_as,
        "python": choice.python,
        "data": data,
        "folders": " ".join(host.folders.values()),
        "storage": f"BindsTo={storage}\nAfter={storage}" if host.mounts else "",
        "network": _NETWORK[profile.network],
        "names": "" if profile.network == "offline" else _NAMES,
        "command": _command(command),
        "environment": "\n".join(lines),
        "restart": profile.restart,
        "limits": f"MemoryMax={profile.memory_max}" if profile.memory_max else "",
        **devices(profile),
        "more": "\n".join(more),
    }
    return _filled(host.scope, values)


def _companions(choice: Choice, prefix: str, release: str, developed: Mapping[str, str]) -> dict[str, str]:
    """Units beside the service's, by the end of their names: mounts, nodes under development, timer, metrics."""
    target = choice.target
    host = target.host

    def command(verb: str) -> str:
        # The release's own copy: another client's submit replaces the one in state/. Not by the environment's Python,
        # whose packages would run as root.
        agent = f"{prefix}/releases/{release}/agent.pyz"
        return _command([choice.interpreter, "-I", "-S", agent, verb, f"{prefix}/state/site.json"])

    values = {
        "service": host.service,
        "release": release,
        "binds": "\n".join(_binds(target, developed)),
        "target": "multi-user.target" if host.scope == "system" else "default.target",
        "interval": host.free_memory,
        "addresses": " ".join(["localhost", *_own_addresses(host.listen)]),
    }
    found: dict[str, str] = {}
    if host.mounts:  # ComfyUI's own unit is bound to it: it lasts as long as everything is mounted
        waits = {
            "mounts": " ".join(host.mounts),
            "mounted": " && ".join(f"mountpoint --quiet {path}" for path in host.mounts),
            "units": " ".join(map(mount_unit, host.mounts)),
            "outside": "+" if host.scope == "system" else "",
        }
        found["storage.service"] = _filled("storage", {**values, **waits})
    if developed:
        found["reload.service"] = _filled("reload", {**values, "command": command("watch")})
    if host.free_memory:
        found["free-memory.service"] = _filled("free-memory", {**values, "command": command("free")})
        found["free-memory.timer"] = _filled("free-memory.timer", values)
    if choice.exporter_part:
        place = f"{prefix}/releases/{release}/exporter"
        # the system's Python, without a look at what else is installed there
        words = [choice.interpreter, "-I", "-S", place, f"{place}.json"]
        more = {"port": str(host.metrics_port), "exporter": target.site["exporter"], **devices(target.profile)}
        found["exporter.service"] = _filled("exporter", {**values, **more, "command": _command(words)})
    if host.scope == "user":
        found = {
            name: re.sub(r"\n# --- Only the system's.*?(?=\n\[|\Z)", "", text, flags=re.S)
            for name, text in found.items()
        }
    return found


def devices(profile: Profile) -> dict[str, str]:
    """Which devices a unit may use."""
    listed = [f"DeviceAllow={name} rw" for name in _DEVICES] if profile.cuda else []
    return {"device_policy": profile.device_policy, "devices": "\n".join(listed)}


def _own_addresses(listen: str) -> list[str]:
    """The addresses that ComfyUI is reached at, where they are not the loopback's."""
    found = []
    for each in listen.split(","):
        try:
            address = ipaddress.ip_address(each)
        except ValueError:
            continue
        if not address.is_loopback and not address.is_unspecified:
            found.append(each)
    return found


def _command(argv: Sequence[str]) -> str:
    """A command for a unit: systemd expands % everywhere and $ in commands."""
    return shlex.join(argv).replace("%", "%%").replace("$", "$$")


def _filled(template: str, values: Mapping[str, str]) -> str:
    name = template if "." in template else f"{template}.service"
    folder = workspace.current().checkout / "recipes/comfyui/units"
    hardening = (folder / "hardening.conf").read_text().strip()
    return Template((folder / name).read_text()).substitute(values, hardening=hardening)


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


# nvidia-frontend and nvidia: the same devices from driver 550.40 on and before.
_DEVICES = ("char-nvidia", "char-nvidia-frontend", "char-nvidia-uvm", "char-nvidia-modeset", "char-nvidia-caps")
