"""What a host is now, as the agent tells it in one round trip."""

from __future__ import annotations

from typing import Any

import msgspec

from core import console
from core.errors import UnknownNameError, near


class Process(msgspec.Struct, frozen=True):
    """Who uses a GPU, and for what: compute, graphics or mps. `comfyui` marks those of Hearth's service and its MPS."""

    pid: int
    name: str | None
    user: str | None
    unit: str | None
    bytes: int | None
    kind: str
    comfyui: bool = False


class Gpu(msgspec.Struct, frozen=True):
    """One NVIDIA GPU; `memory` in bytes, None where it shares the machine's."""

    name: str
    capability: str
    memory: int | None
    unified: bool
    processes: tuple[Process, ...] = ()


class Service(msgspec.Struct, frozen=True):
    """The service as its manager sees it; `linked` when its unit is the current release's.

    `waits` says that it does not run, and will by itself: it died a moment ago, or waits for a mount.
    """

    active: bool
    state: str
    enabled: bool
    linked: bool
    restarts: int
    since: str
    pid: int
    waits: bool = False


class Place(msgspec.Struct, frozen=True):
    """The prefix, with links resolved (`real`), and what lies in it.

    `own` are the entries that Hearth makes, `crossings` those of them that are links; `others` are neither these nor
    the data, and `data` says whether there is more of that than mount points and the way to them. `homes` names whose
    home folder it is or holds. `mounts` are the mount points in it, `links` what in the data leads elsewhere. `ours`
    says that Hearth has been there, `service` and `scope` for which service last, and `user` for whom, if the data is
    still that one's. `elsewhere` is another prefix, which the service's unit leads to.
    """

    real: str = ""
    link: bool = False
    mount: bool = False
    homes: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    data: bool = False
    others: tuple[str, ...] = ()
    crossings: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    links: dict[str, str] = {}
    service: str = ""
    scope: str = ""
    user: str = ""
    elsewhere: str = ""
    ours: bool = False


class MountState(msgspec.Struct, frozen=True):
    """A mount point: what is mounted there, Hearth's own unit for it, and why what is wanted could not be mounted."""

    mounted: bool
    source: str
    unit: str
    fault: str
    remedy: str


class Facts(msgspec.Struct, frozen=True):
    """A host as `agent/look/facts.py` found it (its function `facts` names the sources). Sizes are in bytes.

    `places` says of each folder that lies outside the prefix what is wrong with it, `data_free` the bytes left where
    ComfyUI writes; `packages` says which of the Debian packages asked for are installed (of none, where there is no
    dpkg); `user_fault` is why the service must not run as the user that is there, `members` are None where their group
    has to be made; `shared` is false where members could not change each other's files, or others see them; `unused`
    names what lies in the data's custom_nodes, from which nothing is loaded; `landlock` is the version of it that the
    kernel has (0: none), `secrets` says how each is kept ("encrypted" or "plain"); `rights` is what members may do by
    sudo (None: there is no sudo). `manager` is what runs services; `lingers` is false where the login's own systemd
    could, if it outlived the login. `releases` are the manifests kept there, `altered` the ids of those whose unit or
    links were changed since, `proven` those that passed the health gate, the latest first, `failed_nodes` the nodes
    that the current one could not import, with the reason; `parts` says of each what is wrong with it (empty: nothing),
    `incoming` what was sent and not used yet, `tools` which uv is there, `busy` who changes the host now. `last` is how
    the last run of any kind ended, `deployed` the last that was to put a release in service. `exporter` is the exporter
    of metrics as `deploy/exporter.py` describes one, and whether it is `active` (empty: there is none).
    `foreign_unit` is the unit's file where somebody else wrote it; `adopted` says whether `inv adopt --undo` has work;
    `settings` names what was changed outside the prefix on request, and not undone.
    `port_holder` and `metrics_holder` are who listens on ComfyUI's port and on the exporter's.
    `paused` says who took the service out of traffic, and when (empty: nobody); `placed` are the files of Hearth's in
    systemd's folder, `drop_ins` the folders of somebody's own settings for its units; `lingered` says that the login's
    systemd outlives it since Hearth asked for that. `signers` is the host's own list of who may sign bundles for it.
    """

    hostname: str
    os: str
    machine: str
    kernel: str
    glibc: str
    pythons: dict[str, str]
    gpus: tuple[Gpu, ...]
    driver: str
    memory: int
    cores: int
    login: str
    root: bool
    prefix: str
    writable: bool
    disk_free: int
    inodes_free: int | None
    mounts: dict[str, MountState]
    places: dict[str, str]
    data_free: dict[str, int]
    packages: dict[str, bool]
    port_holder: dict[str, Any]
    user: bool
    exporter_user: bool
    members: tuple[str, ...] | None
    shared: bool
    rights: str | None
    manager: str
    lingers: bool
    current: str
    current_fault: dict[str, str]
    releases: tuple[dict[str, Any], ...]
    altered: tuple[str, ...]
    proven: tuple[str, ...]
    failed_nodes: dict[str, str]
    parts: dict[str, str]
    data: bool
    service: Service
    incoming: dict[str, int]
    tools: tuple[str, ...]
    busy: dict[str, Any]
    last: dict[str, Any]
    user_fault: str = ""
    unused: tuple[str, ...] = ()
    landlock: int = 0
    secrets: dict[str, str] = {}
    deployed: dict[str, Any] = {}
    foreign_unit: str = ""
    adopted: bool = False
    settings: tuple[str, ...] = ()
    metrics_holder: dict[str, Any] = {}
    exporter: dict[str, Any] = {}
    paused: dict[str, str] = {}
    placed: tuple[str, ...] = ()
    drop_ins: tuple[str, ...] = ()
    lingered: bool = False
    signers: str | None = None
    place: Place = Place()

    @property
    def platform(self) -> str:
        """The machine as wheel tags name it."""
        return f"linux_{self.machine}"

    def release(self, name: str) -> dict[str, Any] | None:
        """The manifest of a kept release."""
        return next((each for each in self.releases if each["id"] == name), None)

    def named(self, name: str) -> dict[str, Any]:
        """The manifest of a kept release by its id, `current` or `previous` (what a rollback returns to).

        Raises UnknownNameError.
        """
        before = next((each for each in self.proven if each != self.current), "")
        words = {word: meant for word, meant in (("current", self.current), ("previous", before)) if meant}
        found = self.release(words.get(name, name))
        if found is None:
            known = [*words, *(each["id"] for each in self.releases)]
            hint = near(name, known) if known else "nothing is deployed there yet: inv deploy"
            raise UnknownNameError(f"{self.hostname} keeps no release {name!r}", hint=hint)
        return found


def rows(found: Facts) -> list[str]:
    """A host's facts, as a table of two columns."""
    gpus = [f"{gpu.name} ({gpu.capability})" for gpu in found.gpus]
    damaged = [f"{name}: {fault}" for name, fault in found.parts.items() if fault]
    shared = ", shared with the GPU" if any(gpu.unified for gpu in found.gpus) else ""
    cells = [
        ("host", found.hostname),
        ("system", f"{found.os}, {found.machine}, kernel {found.kernel}, glibc {found.glibc}"),
        ("Python", ", ".join(f"{version} ({path})" for version, path in found.pythons.items()) or "no supported one"),
        ("GPU", ", ".join(gpus) or "none"),
        ("driver", found.driver or "none"),
        ("memory", f"{console.size(found.memory)}{shared}"),
        (f"free at {found.prefix}", f"{console.size(found.disk_free)}, {found.inodes_free or 'unlimited'} inodes"),
        ("mounts", "; ".join(_mounted(path, each) for path, each in found.mounts.items()) or "none configured"),
        ("service manager", found.manager),
        ("release", found.current or "none"),
        ("service", found.service.state + (f" since {found.service.since}" if found.service.since else "")),
        ("parts", "; ".join([f"{len(found.parts) - len(damaged)} intact", *damaged])),
        ("failed nodes", "; ".join(f"{name}: {why}" for name, why in found.failed_nodes.items()) or "none"),
        ("in progress", f"{found.busy['action']} by {found.busy['who']}" if found.busy else "nothing"),
    ]
    return console.table(("", ""), cells)


def _mounted(path: str, mount: MountState) -> str:
    return f"{path}: {mount.source}" if mount.mounted else f"{path}: not mounted; ComfyUI waits for it"


def releases(found: Facts) -> list[dict[str, Any]]:
    """The manifests of the kept releases, with the one in service marked `current`."""
    return [{**each, "current": each["id"] == found.current} for each in found.releases]


def release_rows(found: Facts) -> list[str]:
    """A table of the kept releases: the current one, earlier ones from the latest on, then those never healthy."""
    cells = []
    order = [found.current, *found.proven]
    for each in sorted(found.releases, key=lambda each: order.index(each["id"]) if each["id"] in order else len(order)):
        damage = {part: found.parts.get(part, "missing") for part in each["parts"].values()}
        faults = [f"{part}: {fault}" for part, fault in damage.items() if fault]
        faults += ["its unit or links were changed"] if each["id"] in found.altered else []
        kernels = ", ".join(f"{name} {version}" for name, version in each["kernels"].items()) or "-"
        proven = "served before" if each["id"] in found.proven else "never healthy"
        mark = "current" if each["id"] == found.current else proven
        stack = f"{each['stack']}, torch {each['torch']}"
        cells.append((each["id"], each["version"], stack, each["python"], kernels, mark, "; ".join(faults) or "intact"))
    return console.table(("release", "ComfyUI", "stack", "Python", "kernels", "", "parts"), cells)
