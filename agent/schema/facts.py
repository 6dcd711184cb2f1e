"""The state of a host, read in one round trip before anything is changed there."""

from __future__ import annotations

from dataclasses import field
from typing import TypedDict

from agent.schema.installed import ExporterState
from agent.schema.manifest import ReleaseManifest
from agent.schema.record import Record


class Report(TypedDict, total=False):
    """An expected failure as data."""

    kind: str  # selects the client's error class
    what: str
    cause: str
    hint: str
    log: list[str]  # the service's last log lines, if it died
    result: str  # "reverted": the previous release is restored
    kept: bool  # whether the snapshot of the database was kept because it could not be restored


class Busy(TypedDict, total=False):
    """The run in progress on a host."""

    run: str  # its id
    who: str  # see agent/requester.py
    since: str  # ISO 8601, UTC
    action: str  # such as "deploy"
    alive: bool  # a process is applying it; false after a kill or power loss until it is restarted


class Ended(TypedDict, total=False):
    """The result of a run: a line of the host's history."""

    at: str  # ISO 8601, UTC
    result: str  # "done", "failed" or "reverted"
    run: str
    who: str
    key: str  # fingerprint of the SSH key that logged in; empty if unknown
    action: str
    release: str  # the release that the run was to put in service
    base: str  # the release in service when the run began
    error: str


class Holder(TypedDict, total=False):
    """The process that listens on a port."""

    pid: int  # 0: not visible to this user; -1: not found in time
    command: str
    unit: str | None  # its systemd unit


class Paused(TypedDict, total=False):
    """Who paused the service."""

    who: str
    at: str  # ISO 8601, UTC


class Process(Record):
    """A process that uses a GPU. None: not reported by the driver or /proc."""

    pid: int
    name: str | None
    user: str | None
    unit: str | None  # its systemd unit
    bytes: int | None  # of GPU memory
    kind: str  # "compute", "graphics" or "mps"
    comfyui: bool = False  # belongs to Hearth's service, or to the MPS server of that


class Gpu(Record):
    """The properties of an NVIDIA GPU that a deploy needs."""

    name: str
    capability: str  # compute capability, such as "12.1"
    memory: int | None  # None: it shares the machine's memory
    unified: bool  # whether it shares the machine's memory
    processes: tuple[Process, ...] = ()


class Service(Record):
    """The service as its manager reports it."""

    active: bool  # running, starting or reloading
    state: str  # in the manager's words
    enabled: bool  # starts at boot
    linked: bool  # its unit is the current release's
    restarts: int
    since: str
    pid: int  # of ComfyUI; 0: not running
    waits: bool = False  # not running, but will start on its own: it has just died, or waits for a mount


class Place(Record):
    """The prefix and its contents, as needed before a deletion."""

    real: str = ""  # the path with symbolic links resolved
    link: bool = False  # the prefix is a symbolic link
    mount: bool = False  # the prefix is a mount point
    homes: tuple[str, ...] = ()  # users whose home directory it is or contains
    own: tuple[str, ...] = ()  # entries that Hearth creates
    data: bool = False  # data/ holds more than mount points and the directories above them
    others: tuple[str, ...] = ()  # entries that are neither Hearth's nor data/
    crossings: tuple[str, ...] = ()  # entries of `own` that are symbolic links
    mounts: tuple[str, ...] = ()  # mount points below it
    links: dict[str, str] = field(default_factory=dict)  # links in data/ and their targets
    service: str = ""  # the service that was deployed here last
    scope: str = ""  # its scope
    user: str = ""  # its user, if that user still owns the data
    elsewhere: str = ""  # another existing prefix that the service's unit links to
    ours: bool = False  # Hearth has been deployed here


class MountState(Record):
    """A mount point."""

    mounted: bool
    source: str  # the mounted device or remote path
    unit: str  # the text of Hearth's own mount unit; empty: none
    error: str  # why the wanted file system cannot be mounted; empty: it can
    remedy: str


class Engine(Record):
    """Podman, and what containers need."""

    version: str  # empty: not installed
    quadlet: bool  # it has its systemd generator
    controllers: tuple[str, ...] | None  # what units of the scope can limit; None: no unified control groups
    subids: bool  # the login has subordinate user and group ids
    devices: tuple[str, ...]  # CDI devices of the GPU, such as "nvidia.com/gpu=all"


class WantedMount(Record):
    """A file system that must be mounted."""

    what: str = ""  # device or remote path; empty: others mount it
    type: str = ""


class Questions(Record):
    """What facts are about, in addition to the installation."""

    pythons: tuple[str, ...] = ()  # minor versions
    mounts: dict[str, WantedMount] = field(default_factory=dict)  # by path
    places: dict[str, str] = field(default_factory=dict)  # folders outside the prefix: "read", "write" or "bind"
    packages: tuple[str, ...] = ()  # of Debian
    metrics_port: int | None = None  # None: no metrics
    engine: bool = False  # releases are containers
    roots: tuple[str, ...] = ()  # for the doctor: model folders that the service must read
    verified: float = 0  # parts verified within so many seconds are not verified again


class Facts(Record):
    """The state of a host (`agent.look.facts.facts`)."""

    hostname: str
    os: str  # such as "debian 12"
    machine: str  # "x86_64" or "aarch64"
    kernel: str
    glibc: str  # version; empty: not reported
    pythons: dict[str, str]  # interpreters by minor version, of those asked for
    gpus: tuple[Gpu, ...]
    driver: str  # version of the NVIDIA driver; empty: none
    memory: int
    cores: int
    login: str  # the user that the agent runs as
    root: bool
    prefix: str  # absolute
    writable: bool  # the login may write to the prefix, or create it
    disk_free: int  # bytes free at the prefix
    inodes_free: int | None  # None: the file system has no fixed number
    mounts: dict[str, MountState]  # by path, of those asked for
    places: dict[str, str]  # the problem of each directory outside the prefix; empty: none
    data_free: dict[str, int]  # bytes free where ComfyUI writes, by path
    packages: dict[str, bool]  # whether the Debian packages asked for are installed; empty without dpkg
    port_holder: Holder  # the process that listens on ComfyUI's port; empty: none
    user: bool  # the service's user exists
    exporter_user: bool  # the exporter's user exists
    members: tuple[str, ...] | None  # of the members' group; None: the group must be created or corrected
    shared: bool  # members can change each other's files, and others cannot read them unless the data is public
    rights: str | None  # Hearth's sudoers file for members; None: no sudo
    manager: str  # what runs services: "systemd-system", "systemd-user", "process" or "none"
    lingers: bool  # false where the login's systemd could run the service if lingering were enabled
    current: str  # id of the release in service; empty: none
    current_error: Report  # why `current` is not usable; empty: it is
    releases: tuple[ReleaseManifest, ...]  # all that are kept
    altered: tuple[str, ...]  # ids of releases whose unit or links were changed on disk
    proven: tuple[str, ...]  # ids of releases that passed the health check, latest first
    failed_nodes: dict[str, str]  # nodes that the current release could not import, with the error
    parts: dict[str, str]  # the damage of each part; empty: intact
    data: bool  # the directories in data/ exist
    service: Service
    incoming: dict[str, int]  # uploaded blobs that were not used yet, with their size
    tools: tuple[str, ...]  # installed versions of uv
    busy: Busy  # empty: no run in progress
    last: Ended  # the last run of any kind; empty: none
    user_problem: str = ""  # why the service must not run as its existing user
    unused: tuple[str, ...] = ()  # entries of data/custom_nodes, from which nothing is loaded
    landlock: int = 0  # the kernel's Landlock version; 0: none
    secrets: dict[str, str] = field(default_factory=dict)  # how each is stored: "encrypted" or "plain"
    deployed: Ended = field(default_factory=Ended)  # the last deploy or rollback; empty: none
    foreign_unit: str = ""  # the service's unit file, if Hearth did not write it
    adopted: bool = False  # `inv adopt --undo` has something to undo
    settings: tuple[str, ...] = ()  # settings outside the prefix that are in force
    exporter: ExporterState = field(default_factory=ExporterState)
    metrics_holder: Holder = field(default_factory=Holder)  # like port_holder, for the exporter's port
    paused: Paused = field(default_factory=Paused)  # empty: not paused
    placed: tuple[str, ...] = ()  # Hearth's files in systemd's directory
    drop_ins: tuple[str, ...] = ()  # directories of drop-ins for Hearth's units
    lingered: bool = False  # Hearth enabled lingering for the login
    signers: str | None = None  # /etc/hearth/allowed_signers, the allowed signers of bundles; None: no such file
    place: Place = field(default_factory=Place)
    glibcxx: str = ""  # the newest GLIBCXX symbol version of its libstdc++; empty: not reported
    cxxabi: str = ""  # the same for CXXABI
    databases: dict[str, str] = field(
        default_factory=dict
    )  # releases whose database a newer ComfyUI has migrated: when
    engine: Engine | None = None  # None: not asked for

    @property
    def platform(self) -> str:
        """The machine as wheel tags name it."""
        return f"linux_{self.machine}"

    def release(self, name: str) -> ReleaseManifest | None:
        """Return a kept release's manifest; None if there is none with this id."""
        return next((each for each in self.releases if each.id == name), None)
