"""The steps of a plan, built by the client and run by the agent (`agent.change.runs.STEPS`)."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Any, ClassVar

from agent.schema.decode import decode
from agent.schema.installed import InstalledExporter, InstalledGateway
from agent.schema.manifest import ReleaseManifest
from agent.schema.record import Record
from agent.schema.records import OldUnit


class Step(Record):
    """One change of a host. An interrupted step is repeated from its beginning."""

    kind: ClassVar[str] = ""
    title: str  # its action, as shown to users
    why: str  # why the plan contains it
    undo: str  # how to undo it


class Account(Step):
    """Create the system users that units run as, and the members' group."""

    kind = "account"


class Linger(Step):
    """Enable lingering: the user's systemd runs without a session."""

    kind = "linger"


class Members(Step):
    """Set the members' group to exactly these users."""

    kind = "members"
    members: tuple[str, ...]


class Rights(Step):
    """Write the sudoers file for members."""

    kind = "rights"
    text: str  # empty: delete it


class Mount(Step):
    """Mount a file system with a mount unit."""

    kind = "mount"
    path: str
    what: str  # device or remote path
    text: str  # text of the unit


class Folders(Step):
    """Create the folders of the prefix and of the data, with owners and modes."""

    kind = "folders"


class Tool(Step):
    """Install the pinned uv for the agent's use."""

    kind = "tool"
    name: str = ""  # its version; set, like the following fields, when packed
    blob: str = ""  # SHA-256 of the program


class Tree(Step):
    """Create a part from a tree of files."""

    part: str
    python: str  # path of the interpreter that compiles it
    writable: tuple[str, ...] = ()  # paths replaced by links into the data; folders end with /
    keeps: str = ""  # the data folder with the targets of these links
    blob: str = ""  # SHA-256 of an archive of missing files; set, like the following fields, when packed
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of every file, with a trailing x for executables
    reuse: dict[str, str] = field(default_factory=dict)  # files on the host: name -> path below parts/


class Base(Step):
    """Create the part with the root file system of containers."""

    kind = "base"
    part: str
    python: str  # path of its interpreter, outside of a container
    blobs: tuple[str, ...] = ()  # SHA-256 of archives, unpacked in this order; set when packed


class App(Tree):
    """Create ComfyUI's part."""

    kind = "app"


class Exporter(Step):
    """Install the metrics exporter, replace it, or remove it."""

    kind = "exporter"
    exporter: InstalledExporter  # without a unit: remove it


class Gateway(Step):
    """Put a gateway in service, replace it, or remove it."""

    kind = "gateway"
    gateway: InstalledGateway  # without a unit: remove it
    address: str = ""  # where it accepts connections, as its own host reaches it
    port: int = 0
    names: tuple[str, ...] = ()  # the names that its own certificate is for
    certificate: str = ""  # a file with another certificate and its key; empty: its own


class Node(Tree):
    """Create the part of a custom node."""

    kind = "node"
    node: str = ""  # its name
    install: str = ""  # the environment part for its install.py; empty: no install.py
    network: bool = False  # install.py may use the network
    confined: tuple[str, ...] = ()  # the command prefix that confines install.py
    environment: dict[str, str] = field(default_factory=dict)  # variables for install.py
    unit: str = ""  # the service's unit, whose sandbox install.py gets


class WheelFile(Record):
    """An uploaded wheel."""

    file: str
    sha256: str


class Env(Step):
    """Create the virtual environment's part."""

    kind = "env"
    part: str
    python: str  # path of its base interpreter
    repair: bool  # replaces a damaged part, so uv's cache may be damaged, too
    requirements: str  # the locked list, with hashes
    kernels: tuple[str, ...]  # file names of kernel wheels
    version: str  # Python's minor version
    requesters: tuple[str, ...]  # requesters of packages
    tool: str = ""  # version of uv; set, like the following fields, when packed
    wheels: tuple[WheelFile, ...] = ()
    offline: bool = False  # all packages are among the wheels
    inside: str = ""  # path of the base interpreter in a container; empty: no container


class Release(Step):
    """Write a release."""

    kind = "release"
    release: ReleaseManifest


class Ending(Step):
    """A step that may stop ComfyUI."""

    drain: float  # seconds to wait for its jobs
    force: bool  # do not wait for jobs, interrupt them


class Proof(Record):
    """A workflow that a release must run, and checks of the pictures that it makes."""

    name: str
    workflow: dict[str, Any]  # in the API format
    seconds: int  # time limit of a run
    images: int  # number of pictures; -1: at least one
    size: tuple[int, ...]  # width and height; empty: any
    like: str  # a reference picture, in base64; empty: none
    within: float  # maximum root mean square difference from it, 0 to 1
    memory: int  # bytes that it needs beside the active release


COMPARED = "proof {}: {:.1f} s, with release {} {:.1f} s"
"""The note of a trial on a workflow that ran on both releases."""


class CutOver(Ending):
    """Put a release in service, or roll back."""

    kind = "cut-over"
    to: str  # id of the release
    trial: str  # "yes", "no", or "only" (no cut-over)
    proofs: tuple[Proof, ...] = ()


class Serve(Step):
    """Start the current release, now and at boot."""

    kind = "serve"


class Prune(Step):
    """Delete old releases, parts and journals."""

    kind = "prune"
    keep: tuple[str, ...]  # ids of releases


class Retire(Ending):
    """Stop another installation and set its units aside."""

    kind = "retire"
    units: tuple[OldUnit, ...]
    path: str  # of the installation
    port: int


class Adopt(Step):
    """Move a folder of another installation into the data."""

    kind = "adopt"
    name: str  # of the folder in the data
    source: str
    owners: tuple[int, ...]  # uids whose files change to the service's ownership


class Withdraw(Ending):
    """Take the current release out of service."""

    kind = "withdraw"


class Unadopt(Step):
    """Undo an adoption."""

    kind = "unadopt"


class Setting(Ending):
    """A change of settings outside the prefix."""

    serves: bool  # ComfyUI is stopped before and started afterwards


class Set(Setting):
    """Change a setting outside the prefix."""

    kind = "set"
    setting: str
    files: dict[str, str]  # drop-in files: path and text
    groups: dict[str, tuple[str, ...]]  # members that a group gets


class Unset(Setting):
    """Undo settings outside the prefix."""

    kind = "unset"
    settings: tuple[str, ...]
    overwrite: bool  # also undo places edited since


class DropCaches(Step):
    """Drop the kernel's page cache."""

    kind = "drop-caches"


class Stop(Ending):
    """Stop ComfyUI."""

    kind = "stop"
    pause: bool  # also at boot, until resumed


class Start(Step):
    """Start ComfyUI."""

    kind = "start"
    resume: bool  # also enable it at boot


class Restart(Ending):
    """Restart ComfyUI."""

    kind = "restart"


class EndLinger(Step):
    """Disable lingering: the user's systemd again ends with the last session."""

    kind = "end-linger"


class Forget(Step):
    """Remove the unit that resumes interrupted runs."""

    kind = "forget"


class ForgetMounts(Step):
    """Remove Hearth's mount units."""

    kind = "forget-mounts"
    units: tuple[str, ...]


class Delete(Step):
    """Delete entries of the prefix."""

    kind = "delete"
    names: tuple[str, ...]


class Erase(Step):
    """Delete Hearth's records on the host; the last step of a plan."""

    kind = "erase"


def _kinds(step: type[Step]) -> dict[str, type[Step]]:
    found = {step.kind: step} if step.kind else {}
    return found | {kind: each for below in step.__subclasses__() for kind, each in _kinds(below).items()}


KINDS = _kinds(Step)


def packed(step: Step) -> dict[str, Any]:
    """Return a step as JSON."""
    return {"kind": step.kind, **asdict(step)}


def unpacked(value: dict[str, Any]) -> Step:
    """Return the step from `packed` JSON. Raises ValueError."""
    fields = {**value}
    kind = fields.pop("kind", "")
    if kind not in KINDS:
        raise ValueError(f"there is no step of kind {kind!r}")
    return decode(KINDS[kind], fields, kind)
